"""Quality of what a level writes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from dsla.errors import DataError
from dsla.evals.generation import PROMPTS, Writing, agreement, distinct, generation_tasks, read_prompts, repetition
from dsla.evals.subject import Subject
from tests.evals.tiny import subject


@pytest.fixture(scope="module")
def model() -> Subject:
    return subject()


def test_measures_by_hand() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0 and repetition([7] * 8) == 1 - 1 / 5
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == 1 - 4 / 5
    assert repetition([1, 2]) == 0 and distinct([]) == 0
    assert distinct([1, 2, 1, 2, 1]) == 2 / 4
    assert agreement([1, 2, 3], [1, 9, 3, 4]) == 2 / 4
    assert agreement([], []) == 1 and agreement([], [1]) == 0


def scores(model: Subject, level: int) -> dict[str, list[float]]:
    model.set(level)
    tasks = generation_tasks(PROMPTS[:3], 10)
    return {task.name: [item.score for item in task.run(model, frozenset())] for task in tasks}


def test_the_teacher_agrees_with_itself(model: Subject) -> None:
    found = scores(model, 0)
    assert found["generation/agreement"] == found["generation/top1"] == [1.0] * 3
    assert found["generation/kl"] == [0.0] * 3
    assert set(found) == {f"generation/{name}" for name in ("agreement", "repetition", "distinct2", "kl", "top1")}


def test_a_level_is_compared_along_the_teachers_text(model: Subject) -> None:
    found = scores(model, 4)
    writing = Writing(PROMPTS[:3], 10)
    for i in range(3):
        prompt = writing.prompt(model, i)
        assert model.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
        model.set(0)
        text = model.generate(prompt, 10)
        ids = torch.tensor([[*prompt, *text]])
        teacher = model.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        model.set(4)
        own = model.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        kl = (teacher.exp() * (teacher - own)).sum(-1).mean()
        assert found["generation/kl"][i] == pytest.approx(float(kl)) and kl > 0
        same = (own.argmax(-1) == torch.tensor(text)).double().mean()
        assert found["generation/top1"][i] == pytest.approx(float(same))
        assert found["generation/agreement"][i] == agreement(model.generate(prompt, 10), text)
    assert model.level == 4


def test_without_a_chat_template_the_prompt_is_the_text(model: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    assert Writing(("Hello there",), 5).prompt(model, 0) == model.encode("Hello there")


def test_prompts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl.gz"
    records = [{"id": str(i), "turns": [f"question {i}", "more"]} for i in range(3)]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    assert read_prompts(path) == ["question 0", "question 1", "question 2"]
    assert read_prompts(path, 2) == ["question 0", "question 1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b"}', "line 2: key 'turns' is missing; expected keys: id, turns"),
        ('{"id": 3, "turns": ["x"]}', "line 2: 'id' must be str, found int"),
        ('{"id": "b", "turns": []}', "line 2: 'turns' is empty"),
        ('{"id": "a", "turns": ["x"]}', "line 2: id 'a' comes twice"),
        ("[]", "line 2: expected an object, found list"),
        ("{", "line 2: not JSON"),
    ],
)
def test_a_file_with_another_schema_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a", "turns": ["x"]}\n' + line + "\n")
    with pytest.raises(DataError, match=f"prompts.jsonl, {message}"):
        read_prompts(path)
