"""Stopping a server with an open stream: nothing new, an error in place of the rest, no traceback, exit status 0."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.server.tiny import save_model


@pytest.mark.parametrize(
    ("signals", "kind", "options", "ends"),
    [
        (1, signal.SIGTERM, (), True),
        (2, signal.SIGINT, (), False),
        (1, signal.SIGTERM, ("--drain-seconds", "0"), False),
        (1, signal.SIGTERM, ("--drain-seconds", "1"), False),
    ],
    ids=["drained", "hurried", "at once", "after a while"],
)
def test_signal_with_an_open_stream(
    signals: int, kind: signal.Signals, options: tuple[str, ...], ends: bool, tmp_path: Path
) -> None:
    home = {**os.environ, "DSLA_HOME": str(tmp_path / "home")}
    model = save_model(tmp_path / "tiny")
    command = [sys.executable, "-m", "dsla.cli.app", "serve", str(model), "--port", "0", "--memory", "16MiB", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=home) as process:
        try:
            assert process.stdout is not None
            url = next(m.group(1) for line in process.stdout if (m := re.search(r"API on (\S+)", line)))
            body = {"model": "tiny", "prompt": "the", "max_tokens": 4000, "ignore_eos": True, "stream": True}
            if ends:
                body["max_tokens"] = 60
            lines: list[str] = []

            def read() -> None:
                with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as answer:
                    lines.extend(line for line in answer.iter_lines() if line)

            reader = threading.Thread(target=read)
            reader.start()
            while len(lines) < 3:
                time.sleep(0.005)
            begun = time.monotonic()
            for _ in range(signals):
                process.send_signal(kind)
                time.sleep(0.3)
            reader.join(30)
            seconds = time.monotonic() - begun
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "Stopped" in out and "Traceback" not in err
    if options:
        least = float(options[1])
        assert least <= seconds < least + 5
    if ends:
        assert lines[-1] == "data: [DONE]"
    else:
        assert "Finishing 1 open request" in out
        assert '"code":"cancelled"' in lines[-1]
