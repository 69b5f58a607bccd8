"""Everything at once: clients that vanish, levels that change all the time, restarts in the middle of it.

Whatever a stream was told must be so: each that ended is complete, and its tokens are those of an independent computation of
its prompt and the level history that came with it.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any, Protocol

import httpx
import pytest
import torch

from dsla.mixers import DslaMixer
from dsla.server.build import EngineSettings, build_engine
from dsla.server.detokenize import Detokenizer, TokenBytes
from dsla.server.logprobs import LogprobWriter
from tests.engine.tiny import reference_logits
from tests.reports import report
from tests.server.process import Process
from tests.server.site import Site
from tests.server.tiny import tiny_model, tiny_tokenizer

LEAVING = 0.3
CLIENTS = 24
LEVELS = (None, 0, 1, 2, 3)
TIE = 1e-3
"""Logits that differ by less may be told apart otherwise in fp32."""


class Restartable(Protocol):
    """A server that goes away in order and comes back."""

    address: str

    def restart(self) -> None: ...


class Chaos:
    """Requests to a server that is not left in peace.

    Args:
        server: the server.
        requests: how many are sent.
        restarts: how often the server is restarted meanwhile, evenly spread.
        seed: of everything random.

    Attributes:
        counts: what became of requests, and how often levels were set.
        answers: prompt, text, names of tokens and level history of each stream that ended.
    """

    def __init__(self, server: Restartable, requests: int, restarts: int, seed: int) -> None:
        self._server, self._requests, self._restarts = server, requests, restarts
        self._rng = random.Random(seed)
        self._sent = iter(range(requests))
        self.counts: Counter[str] = Counter()
        self.answers: list[tuple[list[int], str, list[str], list[list[int]]]] = []

    async def run(self) -> None:
        """Sends all requests, and waits until each has ended or its client has vanished."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self._server.address, timeout=60, limits=limits) as http:
            clients = asyncio.gather(*(self._client(http) for _ in range(CLIENTS)))
            others = [asyncio.create_task(self._change_levels(http)), asyncio.create_task(self._restart())]
            await clients
            for task in others[1:]:
                await task
            others[0].cancel()

    async def _client(self, http: httpx.AsyncClient) -> None:
        for _ in self._sent:
            leaves = self._rng.random() < LEAVING
            prompt = [self._rng.randrange(3, 300) for _ in range(self._rng.randint(4, 40))]
            while not await self._ask(http, prompt, self._rng.randint(0, 12) if leaves else None):
                await asyncio.sleep(0.05)  # the server is away or about to go: it comes back

    async def _ask(self, http: httpx.AsyncClient, prompt: list[int], leave_after: int | None) -> bool:
        """Sends a request; whether it was taken."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": self._rng.randint(8, 40), "ignore_eos": True}
        fields = {"stream": True, "temperature": 0, "logprobs": 0}
        text, names, levels, last = "", [], [], ""
        try:
            async with http.stream("POST", "/v1/completions", json=body | fields) as response:
                if response.status_code == 503:
                    self.counts["refused"] += 1
                    return False
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if not line:
                        continue
                    if leave_after == 0:
                        self.counts["vanished"] += 1
                        return True
                    leave_after = None if leave_after is None else leave_after - 1
                    last = line.removeprefix("data: ")
                    if last != "[DONE]":
                        (choice,) = json.loads(last)["choices"]
                        text += choice["text"]
                        names += choice["logprobs"]["tokens"]
                        levels = json.loads(last).get("dsla", {}).get("levels", levels)
        except httpx.TransportError as error:
            assert not last, f"a stream was cut off: {error!r}"
            self.counts["not connected"] += 1
            return False
        assert last == "[DONE]", f"a stream ended with {last}"
        assert len(names) == body["max_tokens"]
        self.counts["ended"] += 1
        self.answers.append((prompt, text, names, levels))
        return True

    async def _change_levels(self, http: httpx.AsyncClient) -> None:
        while True:
            try:
                response = await http.post("/admin/level", json={"level": self._rng.choice(LEVELS)})
                assert response.status_code in (200, 503), response.text
                self.counts["levels"] += response.status_code == 200
            except httpx.TransportError:
                self.counts["levels not set"] += 1
            await asyncio.sleep(0.02)

    async def _restart(self) -> None:
        for number in range(1, self._restarts + 1):
            while self.counts["ended"] + self.counts["vanished"] < number * self._requests // (self._restarts + 1):
                await asyncio.sleep(0.01)
            await asyncio.to_thread(self._server.restart)
            self.counts["restarts"] += 1


@cache
def token_ids() -> dict[str, int]:
    """Name of a token in `logprobs` -> its id."""
    tokenizer = tiny_tokenizer()
    writer = LogprobWriter(TokenBytes.of(tokenizer, keep_special=True))
    return {writer._name(token): token for token in range(len(tokenizer))}


def check(
    prompt: list[int], text: str, names: Sequence[str], levels: list[list[int]], mixers: dict[int, DslaMixer]
) -> None:
    """An answer's tokens are the most likely ones by the dense reference in fp64, and its text is theirs."""
    tokens = [token_ids()[name] for name in names]
    detokenizer = Detokenizer(TokenBytes.of(tiny_tokenizer()))
    assert text == detokenizer.add(tokens) + detokenizer.finish()
    logits = reference_logits((prompt + tokens)[:-1], levels, mixers, tiny_model())[len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1))[:, 0]
    missed = (logits.max(1).values - chosen).max().item()
    assert missed < TIE, f"a token has a logit {missed:.3f} below the highest, levels {levels}"


def idle(address: str) -> dict[str, Any]:
    """The state of a server, once nothing is open any more."""
    with httpx.Client(base_url=address, timeout=60) as http:
        while (stats := http.get("/admin/state").json()["stats"])["running"] or stats["waiting"]:
            pass
    found: dict[str, Any] = stats
    return found


@pytest.mark.parametrize(
    ("requests", "process"), [(80, False), pytest.param(500, True, marks=pytest.mark.slow)], ids=["short", "full"]
)
def test_all_that_ends_is_right(requests: int, process: bool, folders: tuple[str, str], tiny_home: None) -> None:
    settings = EngineSettings(*folders, memory_bytes=2 << 20, max_step_tokens=64)
    options = ("--adapter", folders[1], "--memory", "2MiB", "--max-step-tokens", "64", "--log-level", "warning")
    mixers = {
        layer: copy.deepcopy(mixer).double() for layer, mixer in build_engine(settings).engine.decoder.mixers.items()
    }
    with ExitStack() as stack:
        server = stack.enter_context(
            Process(folders[0], *options) if process else Site("tiny", lambda: build_engine(settings).engine)
        )
        chaos = Chaos(server, requests, restarts=2, seed=requests)
        asyncio.run(chaos.run())
        stats = idle(server.address)
    counts = chaos.counts
    assert counts["ended"] + counts["vanished"] == requests and counts["restarts"] == 2, counts
    assert counts["vanished"] > 0.1 * requests and counts["levels"] > 20, counts
    assert len({level for *_, levels in chaos.answers for _, level in levels}) == 4
    assert sum(len(levels) > 1 for *_, levels in chaos.answers) > 0.1 * requests, "levels changed while streams ran"
    assert (stats["kv_bytes"], stats["state_bytes"], stats["parked_bytes"]) == (0, 0, 0)
    assert stats["free_bytes"] == stats["budget_bytes"]
    for answer in chaos.answers:
        check(*answer, mixers)
    if process:
        report("chaos", {"requests": requests, **counts})
