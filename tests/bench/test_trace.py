"""Traces: what is read, what is refused, and that scaling keeps what it says it keeps."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsla.bench.prompts import FIRST_TOKEN, prompt_tokens
from dsla.bench.trace import BLOCK_TOKENS, TraceRequest, Workload, fit, read_trace
from dsla.errors import ConfigError, DataError
from tests.bench.traces import ROWS, write_trace

SHARED = Path(__file__).parents[3] / "shared" / "data" / "traces"
VOCABULARY = 1000

times = st.lists(st.floats(0, 1e4), min_size=2, max_size=20).map(lambda found: [0.0, *sorted(found)])
lengths = st.integers(1, 20_000)


def test_reads_its_own_schema(tmp_path: Path) -> None:
    found = read_trace(write_trace(tmp_path / "a.jsonl"))
    assert [request.at for request in found] == [0.0, 0.0, 0.5, 3.0, 6.0]
    assert found[1] == TraceRequest(0.0, 1100, 60, (0, 1, 3))
    assert found[2].hash_ids == ()


def test_reads_packed_files(tmp_path: Path) -> None:
    plain = write_trace(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    assert read_trace(tmp_path / "a.jsonl.gz") == read_trace(tmp_path / "a.jsonl.zst") == read_trace(plain)


def test_reads_mooncake_as_published(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]},
        {"timestamp": 4500, "input_length": 512, "output_length": 1, "hash_ids": [7]},
    ]
    first, second = read_trace(write_trace(tmp_path / "m.jsonl", rows))
    assert (first.prompt_tokens, first.hash_ids) == (600, (7, 8))
    assert second.at == pytest.approx(1.5)


def test_reads_azure_as_published(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.6805900,374,44"]
    path.write_text("\n".join([*lines, "2023-11-16 18:15:50.9951690,396,109"]) + "\n", encoding="utf-8")
    first, second = read_trace(path)
    assert (first.prompt_tokens, first.output_tokens) == (374, 44)
    assert second.at == pytest.approx(4.314579, abs=1e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected an object with t_s, prompt_tokens, output_tokens, found no JSON"),
        ("[1]", r"line 2: expected an object .*, found \[1\]"),
        ('{"t_s": 11}', "line 2: expected a whole number of at least 1 under 'prompt_tokens', found nothing"),
        ('{"t_s": 11, "prompt_tokens": 0, "output_tokens": 1}', "'prompt_tokens', found 0"),
        ('{"t_s": 11, "prompt_tokens": 1, "output_tokens": 1.5}', "'output_tokens', found 1.5"),
        ('{"t_s": "x", "prompt_tokens": 1, "output_tokens": 1}', "line 2: expected a number under 't_s', found x"),
        ('{"t_s": NaN, "prompt_tokens": 1, "output_tokens": 1}', "a number under 't_s', found nan"),
        ('{"t_s": 1, "prompt_tokens": 1, "output_tokens": 1}', "line 2: it comes before the line above"),
        ('{"t_s": 11, "prompt_tokens": 513, "output_tokens": 1, "hash_ids": [1]}', "has 2 blocks of 512, found 1"),
        ('{"t_s": 11, "prompt_tokens": 5, "output_tokens": 1, "hash_ids": 1}', "a list of whole numbers"),
    ],
)
def test_names_the_line_that_is_wrong(line: str, message: str, tmp_path: Path) -> None:
    path = write_trace(tmp_path / "a.jsonl", ROWS[:1])
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_trace(path)


def test_names_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no trace at"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no request"):
        read_trace(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-20])
    with pytest.raises(DataError, match="cannot read"):
        read_trace(tmp_path / "cut.jsonl.gz")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="line 2: .* no columns TIMESTAMP"):
        read_trace(tmp_path / "other.csv")


def test_too_long_requests_are_dropped_and_counted(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path / "a.jsonl"))
    workload = fit(trace, max_prompt=1200)
    assert [request.prompt_tokens for request in workload.requests] == [1200, 1100, 400, 700]
    assert workload.dropped == 1
    assert fit(trace, max_output=59).dropped == 2
    assert fit(trace, max_total=1159).dropped == 3
    assert fit(trace, max_prompt=1200, count=2) == Workload(tuple(trace[:2]), 0)
    assert fit(trace, length_scale=0.01, max_prompt=900).dropped == 0
    with pytest.raises(ConfigError, match="none of the 5 requests fits"):
        fit(trace, max_prompt=1)


def test_a_workload_begins_at_its_first_request() -> None:
    trace = [TraceRequest(0.0, 100, 1), TraceRequest(5.0, 10, 1), TraceRequest(7.0, 10, 1)]
    workload = fit(trace, max_prompt=50)
    assert [request.at for request in workload.requests] == [0.0, 2.0]
    assert workload.rate == 0.5


@given(times, st.floats(0.01, 100))
def test_a_rate_stretches_time_and_nothing_else(at: list[float], rate: float) -> None:
    workload = fit([TraceRequest(time, 10 + i, 1) for i, time in enumerate(at)])
    if math.isinf(workload.rate) or workload.requests[-1].at < 1e-6:
        return
    paced = workload.at_rate(rate)
    assert paced.rate == pytest.approx(rate)
    factor = workload.rate / rate
    for before, after in zip(workload.requests, paced.requests, strict=True):
        assert after.at == pytest.approx(before.at * factor)
        assert (after.prompt_tokens, after.output_tokens) == (before.prompt_tokens, before.output_tokens)


@given(lengths, lengths, st.floats(0.001, 4))
def test_lengths_scale_by_the_factor(prompt: int, output: int, factor: float) -> None:
    scaled = TraceRequest(0.0, prompt, output).scaled(factor)
    assert abs(scaled.prompt_tokens - prompt * factor) <= 1 and scaled.prompt_tokens >= 1
    assert abs(scaled.output_tokens - output * factor) <= 1 and scaled.output_tokens >= 1
    assert TraceRequest(0.0, prompt, output).scaled(1.0) == TraceRequest(0.0, prompt, output)


@given(st.integers(1, 8), st.integers(0, 8), st.floats(0.02, 1.5), st.integers(1, BLOCK_TOKENS))
def test_prompts_share_what_their_hash_ids_share(blocks: int, common: int, factor: float, rest: int) -> None:
    common = min(common, blocks)
    length = (blocks - 1) * BLOCK_TOKENS + rest
    names = tuple(range(blocks)), (*range(common), *range(100, 100 + blocks - common))
    one, other = (TraceRequest(0.0, length, 1, ids).scaled(factor) for ids in names)
    first, second = (prompt_tokens(request, i, (0,), VOCABULARY) for i, request in enumerate((one, other)))
    assert len(first) == one.prompt_tokens and len(second) == other.prompt_tokens
    assert first == prompt_tokens(one, 0, (0,), VOCABULARY)
    assert all(FIRST_TOKEN <= token < VOCABULARY for token in first)
    shared = math.floor(common * one.block_tokens)
    assert first[: min(shared, len(first) - 1)] == second[: min(shared, len(second) - 1)]
    if common < blocks and one.block_tokens >= 10 and len(first) > shared + 8:
        assert first[shared + 1 :] != second[shared + 1 :]


def test_prompts_without_hash_ids_share_nothing_and_depend_on_the_seed() -> None:
    request = TraceRequest(0.0, 50, 1)
    prompts = [prompt_tokens(request, i, (seed,), VOCABULARY) for i, seed in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert prompts[0] == prompt_tokens(request, 0, (0,), VOCABULARY)
    shared = TraceRequest(0.0, 512, 1, (3,))
    assert prompt_tokens(shared, 0, (0,), VOCABULARY) != prompt_tokens(shared, 0, (1,), VOCABULARY)


@pytest.mark.parametrize(
    "name", ["azure2023_code.jsonl.gz", "azure2023_conv.jsonl.gz", "mooncake_conversation.jsonl.zst"]
)
def test_published_traces_are_read(name: str) -> None:
    if not (SHARED / name).is_file():
        pytest.skip("the traces are not here")
    trace = read_trace(SHARED / name)
    assert len(trace) > 8000
    assert all(bool(request.hash_ids) == name.startswith("mooncake") for request in trace)
