"""The demo on the tiny fp64 model: streams, run, record and picture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from dsla.adaptive import PolicyConfig, make_policy
from dsla.bench.demo import Demo, record
from dsla.bench.demo_plot import plot_demo
from dsla.bench.records import write_record
from dsla.bench.streams import Need, Stream, load_books
from dsla.errors import ConfigError
from tests.engine.tiny import random_prompt, tiny_decoder, tiny_engine
from tests.server.tiny import tiny_tokenizer

LENGTHS = (40, 24, 60, 33)
POLICY = PolicyConfig(low_water=0.85, cooldown_seconds=0.0, calm_seconds=0.0, long_share=1.0)


def tiny_streams(max_tokens: int = 10) -> list[Stream]:
    return [Stream(f"book {i}", "author", random_prompt(n, i), max_tokens) for i, n in enumerate(LENGTHS)]


def tiny_need(streams: list[Stream]) -> Need:
    return Need.of(streams, tiny_decoder(), tiny_engine().arena)


def tiny_demo(streams: list[Stream], budget_bytes: int) -> Demo:
    units = budget_bytes // tiny_engine().arena.page_bytes
    return Demo(tiny_engine(units, policy=make_policy(POLICY), max_step_tokens=12), tiny_tokenizer(), streams)


@pytest.fixture(scope="module")
def demo() -> Demo:
    streams = tiny_streams()
    demo = tiny_demo(streams, tiny_need(streams).default_budget)
    list(demo.run())
    return demo


def test_books_are_eight_of_the_lengths_they_say() -> None:
    books = load_books()
    assert sorted(book.tokens // 500 for book in books) == [3, 4, 5, 6, 7, 8, 9, 11]
    assert len({book.title for book in books}) == 8
    for book in books:
        assert book.source.startswith("https://github.com/standardebooks/") and book.commit
        assert "public domain" in book.licence
        assert 3 < len(book.text) / book.tokens < 5


def test_books_are_counted_with_the_default_tokenizer() -> None:
    transformers = pytest.importorskip("transformers")
    from dsla.hub import cache_dir

    folder = cache_dir() / "models" / "smollm2-135m-instruct"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the default model is not here")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for book in load_books():
        assert len(Stream.of(book, tokenizer, 96, 8192).prompt) == book.tokens


def test_a_context_that_is_too_short_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'Sister Carrie' has [\d,]+ tokens .* context is 4,096 tokens"):
        Stream.of(load_books()[0], tiny_tokenizer(), 96, 4096)


def test_need_is_what_an_arena_holds_in_the_end() -> None:
    stream = Stream("a", "b", random_prompt(50), 11)
    need = tiny_need([stream])
    arena = tiny_engine().arena
    assert need.at_level_0 == 4 * 30 * arena.page_bytes
    assert need.at_least == need.one_at_a_time == (30 + 3 * arena.slot_units) * arena.page_bytes
    demo = tiny_demo([stream], need.at_least)
    assert max(sample.used_bytes for sample in demo.run()) <= need.at_least
    assert demo.results()[0].finished


def test_default_budget_needs_conversions_and_holds_all_at_once(demo: Demo) -> None:
    need, budget = tiny_need(demo.streams), demo.engine.arena.budget_bytes
    assert need.at_least < budget < need.at_level_0
    assert max(sample.waiting for sample in demo.samples) == 0
    assert max(sample.running for sample in demo.samples) == len(LENGTHS)
    with pytest.raises(ConfigError, match="too small for the demo"):
        need.check(need.one_at_a_time - 1)


@pytest.mark.parametrize("at_least", [99_998, 90_000, 80_000, 40_000, 10_000])
def test_default_budget_is_short_at_level_0_however_little_can_be_converted(at_least: int) -> None:
    assert at_least < Need(100_000, at_least, 10_000).default_budget < 100_000


def test_every_stream_finishes_within_the_budget(demo: Demo) -> None:
    assert all(result.finished and result.generated_tokens == 10 for result in demo.results())
    assert [result.prompt_tokens for result in demo.results()] == list(LENGTHS)
    assert sum(sample.prompt_tokens for sample in demo.samples) == sum(LENGTHS)
    assert sum(sample.generated_tokens for sample in demo.samples) == 10 * len(LENGTHS)
    assert max(sample.used_bytes for sample in demo.samples) <= demo.engine.arena.budget_bytes
    assert max(sample.level_0_bytes for sample in demo.samples) > demo.engine.arena.budget_bytes
    assert demo.samples[-1].used_bytes == 0


def test_levels_rise_step_by_step_as_memory_fills(demo: Demo) -> None:
    samples, budget = demo.samples, demo.engine.arena.budget_bytes
    first = next(i for i, sample in enumerate(samples) if sample.conversions)
    assert samples[first - 1].used_bytes > 0.5 * budget
    assert len({sample.conversions for sample in samples}) > 2
    for before, after in zip(samples, samples[1:], strict=False):
        assert all(low <= high for low, high in zip(before.levels, after.levels, strict=True))
    last = samples[-1]
    assert last.levels == tuple(result.levels[-1][1] for result in demo.results())
    assert last.conversions == sum(last.levels)
    assert last.freed_bytes > 0


def test_a_small_budget_makes_streams_wait_and_all_finish() -> None:
    streams = tiny_streams()
    demo = tiny_demo(streams, tiny_need(streams).one_at_a_time)
    list(demo.run())
    assert max(sample.waiting for sample in demo.samples) > 0
    assert all(result.finished for result in demo.results())


def test_a_stream_that_fails_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = tiny_streams()
    demo = tiny_demo(streams, tiny_need(streams).at_level_0)
    forward = demo.engine.decoder.forward

    def broken(batch: object, arena: object) -> torch.Tensor:
        logits: torch.Tensor = forward(batch, arena)  # type: ignore[arg-type]
        return torch.cat([logits[:-1], torch.full_like(logits[-1:], torch.nan)])

    monkeypatch.setattr(demo.engine.decoder, "forward", broken)
    list(demo.run())
    failed = [result for result in demo.results() if not result.finished]
    assert failed and all(result.finish_reason == "error" and result.error for result in failed)


def test_record_says_when_and_by_what_without_folders(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["/home/me/bin/dsla", "demo", "--model", "/home/me/model", "--out=/home/me/out", "--streams=2"]
    monkeypatch.setattr("sys.argv", arguments)
    data = record(demo, tiny_need(demo.streams), "tiny")
    assert data["command"] == "dsla demo --model model --out=out --streams=2"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", data["date"])


def test_record_is_json_with_all_samples(demo: Demo, tmp_path: Path) -> None:
    write_record(record(demo, tiny_need(demo.streams), "tiny"), tmp_path / "demo.json")
    data = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert data["settings"]["model"] == "tiny" and data["settings"]["levels"] == 3
    assert len(data["samples"]) == len(demo.samples)
    assert {"seconds", "kv_bytes", "state_bytes", "mean_level", "max_level"} <= set(data["samples"][0])
    assert [stream["finished"] for stream in data["streams"]] == [True] * len(LENGTHS)
    assert {"dsla", "torch", "transformers"} <= set(data["versions"])


@pytest.mark.parametrize("steps", [1, None], ids=["one step", "whole run"])
def test_picture_is_drawn(demo: Demo, steps: int | None, tmp_path: Path) -> None:
    path = tmp_path / "demo.png"
    plot_demo(demo.samples[:steps], demo.results(), demo.engine.arena.budget_bytes, 3, path)
    assert path.read_bytes().startswith(b"\x89PNG")
