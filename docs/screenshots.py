"""Makes the pictures of the dashboard: a real server, eight books at once in memory that does not hold them at level 0.

    python docs/screenshots.py

Needs the default model, Chromium and the development packages. Writes `docs/images/dashboard-light.png` and `-dark.png`.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from dsla.bench.streams import load_books

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT = 1280, 1000
SECONDS = 480


@contextmanager
def served(memory: str) -> Iterator[str]:
    """Address of a server with so little memory."""
    command = [sys.executable, "-m", "dsla.cli.app", "serve", "--port", "0", "--memory", memory]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("Serving"):
                    yield line.split()[4].removesuffix("/v1")
                    break
        finally:
            process.kill()


def ask(address: str, prompt: str, tokens: int, stop: threading.Event) -> None:
    """Has the model go on with a text."""
    body = {"model": model(address), "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with (
        suppress(httpx.HTTPError),
        httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=None) as answer,
    ):
        for _ in answer.iter_lines():
            if stop.is_set():
                return


def model(address: str) -> str:
    """Name of the model that is served."""
    name: str = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
    return name


def stats(address: str) -> dict[str, Any]:
    """What the server says of itself."""
    found: dict[str, Any] = httpx.get(f"{address}/admin/state", timeout=60).json()["stats"]
    return found


def load(address: str, page: Page, tokens: int, level: float, stop: threading.Event) -> None:
    """Books, one after the other; returns when the running requests have reached a mean level."""
    for book in load_books():
        threading.Thread(target=ask, args=(address, book.text, tokens, stop), daemon=True).start()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        page.wait_for_timeout(500)
        levels = [request["level"] for request in stats(address)["requests"] if request["status"] == "running"]
        if len(levels) > 2 and sum(levels) / len(levels) >= level:
            return
    raise SystemExit(f"level {level} was not reached in {SECONDS} seconds: give less memory")


def save(page: Page, path: Path) -> None:
    """A picture of the page down to the end of the panel on memory, in 256 colours: a third of the bytes."""
    box = page.locator("section", has=page.locator("#memory-title")).bounding_box()
    assert box is not None
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 14}
    data = page.screenshot(full_page=True, clip=clip)  # type: ignore[arg-type]
    Image.open(io.BytesIO(data)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Serves, loads, takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", default="160MiB", help="budget of the server")
    parser.add_argument("--tokens", type=int, default=300, help="tokens each book goes on for")
    parser.add_argument("--level", type=float, default=14, help="mean level to wait for")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("there is no Chromium here")
    stop = threading.Event()
    with served(options.memory) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(address)
        page.locator('body[data-server="live"]').wait_for()
        load(address, page, options.tokens, options.level, stop)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            page.wait_for_timeout(1000)
            save(page, IMAGES / f"dashboard-{scheme}.png")
        stop.set()
        browser.close()


if __name__ == "__main__":
    main()
