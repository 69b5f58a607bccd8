"""What a suite is made of, and what it says of what is not there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from dsla.errors import ConfigError, DataError
from dsla.evals.suites import SIZES, choose, suite
from tests.server.tiny import tiny_tokenizer

CONTEXT = 8192


def names(data: Path | None, name: str = "quick", context: int = CONTEXT, limit: int | None = None) -> list[str]:
    return [task.name for task in suite(name, data, tiny_tokenizer(), context, limit).tasks]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """All files but those of the long tasks, each of the smallest size that will do."""
    for folder in ("ppl", "mc", "prompts"):
        (tmp_path / folder).mkdir()
    words = " ".join(f"word{i} and more." for i in range(4000))
    (tmp_path / "ppl/wikitext2_valid.txt.gz").write_bytes(gzip.compress(words.encode()))
    prompt = json.dumps({"id": "1", "turns": ["Hello?"]})
    (tmp_path / "prompts/mt_vicuna_bench.jsonl.gz").write_bytes(gzip.compress(prompt.encode()))
    return tmp_path


def test_without_data_what_needs_none_is_run() -> None:
    found = suite("quick", None, tiny_tokenizer(), CONTEXT)
    groups = {task.group for task in found.tasks}
    assert groups == {"synthetic", "generation"}
    assert {"ppl/wikitext2_valid.txt.gz", "ppl/books_long.jsonl.zst", "mc"} <= set(found.left_out)
    assert found.files == {}


def test_with_data_what_is_not_there_is_named(data: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness")
    found = suite("quick", data, tiny_tokenizer(), CONTEXT)
    assert found.tasks[0].name == "perplexity/wikitext2" and found.tasks[0].items == 8
    assert found.left_out["ppl/books_long.jsonl.zst"] == "it is not in the data folder"
    assert found.left_out["hellaswag"] == "its file is not in mc/"
    assert set(found.files) == {"ppl/wikitext2_valid.txt.gz", "prompts/mt_vicuna_bench.jsonl.gz"}
    prompts = [task for task in found.tasks if task.group == "generation"]
    assert {task.items for task in prompts} == {1}


def test_what_needs_more_than_the_context_is_left_out_by_name() -> None:
    found = suite("full", None, tiny_tokenizer(), 2048)
    assert "passkey/2048" in [task.name for task in found.tasks]
    assert found.left_out["passkey/4096"] == "it reads 4,096 tokens at once, the model's context is 2,048"
    assert all(task.tokens <= 2048 for task in found.tasks)


def test_limit_holds_for_every_task() -> None:
    assert {task.items for task in suite("full", None, tiny_tokenizer(), CONTEXT, 3).tasks} == {3}
    with pytest.raises(ConfigError, match="--limit must be at least 1"):
        names(None, limit=0)


def test_full_holds_more_than_quick() -> None:
    quick, full = (suite(name, None, tiny_tokenizer(), CONTEXT).tasks for name in SIZES)
    assert sum(task.reads for task in full) > 5 * sum(task.reads for task in quick)
    assert {"passkey/1024", "passkey/4096", "passkey/8192", "key_value/4096"} <= {task.name for task in full}


def test_choosing() -> None:
    found = suite("full", None, tiny_tokenizer(), 2048)
    chosen = choose(found, ["passkey/*", "generation/kl"])
    assert [task.name for task in chosen.tasks] == ["passkey/1024", "passkey/2048", "generation/kl"]
    with pytest.raises(ConfigError, match="no task 'paskey': there are passkey/1024, "):
        choose(found, ["paskey"])
    with pytest.raises(ConfigError, match="task 'passkey/4096' is left out: it reads 4,096 tokens"):
        choose(found, ["passkey/4096"])


def test_bad_input_is_named(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="no suite 'huge': choose quick or full"):
        names(None, "huge")
    with pytest.raises(ConfigError, match="holds none of the folders ppl, mc"):
        names(tmp_path / "nothing")
    (data / "ppl/wikitext2_valid.txt.gz").write_bytes(gzip.compress(b"too short"))
    with pytest.raises(DataError, match="wikitext2_valid.txt.gz: a text has .* tokens, expected at least 8192"):
        names(data)
