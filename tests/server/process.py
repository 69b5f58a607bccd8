"""`dsla serve` in a process of its own, as people run it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

PROC = Path("/proc")


class Process:
    """A server, from `start` or the beginning of a `with` block to its end.

    Args:
        options: of `dsla serve`, but for the port: after a restart it is the same.

    Attributes:
        address: where it answers.
        log: what it has written to standard error, once it has ended.
    """

    def __init__(self, *options: str) -> None:
        self._options, self._port, self.log = options, "0", ""

    def start(self) -> None:
        """Starts the server and waits until it takes connections."""
        command = [sys.executable, "-m", "dsla.cli.app", "serve", *self._options, "--port", self._port]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        found = next((m for line in self._process.stdout if (m := re.search(r"on (http://\S+:(\d+))/v1", line))), None)
        assert found is not None, self._process.communicate()
        self.address, self._port = found[1], found[2]

    def stop(self) -> None:
        """Ends the server as SIGTERM does; it must end well."""
        self._process.send_signal(signal.SIGTERM)
        try:
            out, self.log = self._process.communicate(timeout=60)
        finally:
            self._process.kill()
        assert (self._process.returncode, out.strip().split("\n")[-1]) == (0, "Stopped"), self.log
        assert "Traceback" not in self.log and "terminate called" not in self.log, self.log

    def restart(self) -> None:
        """Ends it and starts another one at the same address."""
        self.stop()
        self.start()

    @property
    def resident_bytes(self) -> int:
        """Memory that the server has now."""
        status = (PROC / str(self._process.pid) / "status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) << 10

    @property
    def open_files(self) -> int:
        """How many files it has open, connections among them."""
        return len(list((PROC / str(self._process.pid) / "fd").iterdir()))

    def __enter__(self) -> Process:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        self._process.kill()
        self._process.communicate()
