"""Text written by the teacher: what it is, that it is always the same, and that it is written once."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsla.distill.data import Source, TeacherText, read_documents
from dsla.distill.data.teacher import _Writer, teacher_sources
from dsla.errors import DataError
from tests.server.tiny import tiny_model, tiny_tokenizer

SEQ_LEN = 96


def write(out: Path, tokens: int = 4000, seed: int = 0, seq_len: int = SEQ_LEN, **others: Any) -> Path:
    (source,) = teacher_sources(
        [TeacherText(tokens)], others.pop("model", tiny_model()), others.pop("tokenizer", tiny_tokenizer()), seq_len, seed,
        out, **others,
    )  # fmt: skip
    assert source == Source(out / "teacher-text.jsonl")
    return source.path


def plain() -> Any:
    """A tokenizer without a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("written"))


def test_texts_and_conversations(written: Path) -> None:
    records = [json.loads(line) for line in written.read_text().splitlines()]
    texts = [record for record in records if "text" in record]
    chats = [record for record in records if "messages" in record]
    assert texts and chats
    assert all([message["role"] for message in record["messages"]] == ["user", "assistant"] for record in chats)
    assert all(message["content"] for record in chats for message in record["messages"])
    assert all(record["text"].startswith("<|im_end|>") and 0 < record["tokens"] < SEQ_LEN for record in texts)
    assert sum(record["tokens"] for record in records) >= 4000
    documents = list(read_documents([written], tiny_tokenizer()))
    assert len(set(documents)) == len(records), "the documents differ"


def test_the_same_text_whether_interrupted_or_extended(written: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            write(tmp_path, on_tokens=stop)
    with open(tmp_path / "teacher-text.jsonl", "ab") as file:
        file.write(b'{"text": "half a rec')
    write(tmp_path, tokens=1)
    with open(tmp_path / "teacher-text.jsonl", "ab") as file:
        file.write(b'{"text": "half a rec')
    torch.manual_seed(123)
    assert write(tmp_path).read_bytes() == written.read_bytes()


def test_what_is_there_is_not_written_again(written: Path) -> None:
    before = written.stat().st_mtime_ns
    write(written.parent, model=tiny_model(), on_tokens=lambda done, total: pytest.fail("it was written again"))
    assert written.stat().st_mtime_ns == before
    other = Source(Path("other.txt"), 0.5)
    sources = teacher_sources(
        [other, TeacherText(4000, 0.5)], tiny_model(), tiny_tokenizer(), SEQ_LEN, 0, written.parent
    )
    assert sources == [other, Source(written, 0.5)]


def test_sampling_is_seeded_and_leaves_the_callers_random_numbers_alone(written: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    path = write(tmp_path, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert path.read_bytes() != written.read_bytes()


def test_texts_follow_the_models_distribution() -> None:
    """The first tokens of many documents against the model's own probabilities, whatever its generation config says."""
    tokenizer, model = plain(), copy.deepcopy(tiny_model())
    model.generation_config.update(temperature=0.1, top_k=2, repetition_penalty=3.0)
    end = tokenizer.eos_token_id
    writer = _Writer(model, tokenizer, 8)
    torch.manual_seed(0)
    rows = writer._sample([[end]] * 4000, [end], 1)
    found = torch.bincount(torch.tensor([row[0] if row else end for row in rows]), minlength=len(tokenizer)) / len(rows)
    p = model(torch.tensor([[end]])).logits[0, -1].softmax(-1)
    assert ((found - p).abs() <= 4.5 * (p * (1 - p) / len(rows)).sqrt() + 1 / len(rows)).all()


def test_other_settings_and_damage_are_named(written: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"other settings \(seed\): choose another --out"):
        write(written.parent, seed=3)
    with pytest.raises(DataError, match=r"other settings \(seq_len\)"):
        write(written.parent, seq_len=64)
    path = write(tmp_path, tokens=1)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"not what teacher-text\.json says"):
        write(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write(tmp_path / "file")


def test_a_teacher_that_says_nothing_and_templates_that_do_not_fit_are_named(tmp_path: Path) -> None:
    class Silent:
        def generate(self, ids: torch.Tensor, **others: object) -> torch.Tensor:
            return torch.cat((ids, torch.full((len(ids), 1), 2)), 1)

        def parameters(self) -> Any:
            return tiny_model().parameters()

    with pytest.raises(DataError, match="ends its texts with their first token"):
        write(tmp_path / "silent", model=Silent())
    with pytest.raises(DataError, match=r"chat template takes \d+ tokens, the recipe's seq_len is 6"):
        write(tmp_path / "short", seq_len=6)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(DataError, match="does not show a user's message as it is"):
        write(tmp_path / "upper", tokenizer=tokenizer)
    tokenizer = plain()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="names no token that begins or ends a text"):
        write(tmp_path / "endless", tokenizer=tokenizer)
