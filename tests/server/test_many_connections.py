"""More streams at once than can run at once: all are answered in full, in memory that does not grow with them for long."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest

from dsla.server.files import raise_file_limit
from tests.reports import report
from tests.server.process import PROC, Process

pytestmark = pytest.mark.skipif(not PROC.is_dir(), reason="memory of processes is read from /proc")

TOKENS = 20
KIB, MIB = 1 << 10, 1 << 20


async def stream(address: str, number: int, all_asked: asyncio.Barrier) -> bytes:
    """The answer to a request on a connection of its own, of which nothing is read before all have asked."""
    host, _, port = address.removeprefix("http://").partition(":")
    body = {"model": "tiny", "prompt": f"fox {number}", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    content = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    writer.write(b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
    await all_asked.wait()
    answer = await reader.read()
    writer.close()
    return answer


async def streams(server: Process, count: int) -> tuple[list[bytes], int, int]:
    """Answers to as many requests at once, and the most memory and files that the server had meanwhile."""
    all_asked, most_bytes, most_files = asyncio.Barrier(count + 1), 0, 0
    waiting = asyncio.gather(*(stream(server.address, number, all_asked) for number in range(count)))
    asked = asyncio.ensure_future(all_asked.wait())
    while not waiting.done():
        most_bytes, most_files = max(most_bytes, server.resident_bytes), max(most_files, server.open_files)
        await asyncio.sleep(0.02)
    await asked
    return waiting.result(), most_bytes, most_files


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_all_streams_are_answered_in_bounded_memory(count: int, folders: tuple[str, str], tiny_home: None) -> None:
    options = ("--adapter", folders[1], "--memory", "16MiB", "--threads", "1", "--log-level", "warning")
    raise_file_limit()  # of the clients
    with Process(folders[0], *options) as server, httpx.Client(base_url=server.address) as http:
        asyncio.run(streams(server, 20))  # what is loaded with the first requests counts for none of them
        before, files = server.resident_bytes, server.open_files
        begun = time.monotonic()
        answers, peak, most_files = asyncio.run(streams(server, count))
        seconds = time.monotonic() - begun
        for answer in answers:
            assert answer.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in answer
            assert b'"completion_tokens":%d,' % TOKENS in answer
        assert most_files >= files + count, "all were connected at the same time"
        stats = http.get("/admin/state").json()["stats"]
        assert stats["finished"]["length"] == 20 + count
        assert (stats["kv_bytes"], stats["state_bytes"], stats["waiting"]) == (0, 0, 0)
        while server.open_files > files + 1:
            time.sleep(0.02)
        after = server.resident_bytes
    found = {"streams": count, "seconds": round(seconds, 1)}
    found |= {
        f"MiB {name}": round(size / MIB, 1) for name, size in (("before", before), ("peak", peak), ("after", after))
    }
    if count >= 1000:
        report("connections", found)
    assert peak - before < 16 * MIB + count * 100 * KIB
    assert after - before < 16 * MIB + count * 50 * KIB
