"""Multiple choice: our answers are those of plain forwards, our scores those of the harness."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dsla.errors import ConfigError, DataError
from dsla.evals import harness
from dsla.evals.harness import SOURCES, TASKS, commonsense_tasks, gsm8k_task
from dsla.evals.harness_model import HarnessLM, SubjectLM
from dsla.evals.subject import Subject
from dsla.evals.task import Task
from tests.evals.files import choice_record, write, write_choices
from tests.evals.tiny import subject

LEVELS = (0, 2, 4)
PAIRS = [
    ("the quick brown", " fox jumps"),
    ("the lazy dog, ", "again"),
    ("the quick brown", " dog"),
    ("", "the lazy fox"),
    ("the quick brown", " fox jumps over the lazy dog"),
]
COUNT = 12


@pytest.fixture(scope="module")
def model() -> Subject:
    return subject()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_choices(tmp_path_factory.mktemp("data"), COUNT)


def asked(kind: Any, *arguments: Any) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("t", 0, 1)) for one in arguments]


def plain(model: Subject, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        log_probs = model.model(torch.tensor([context + continuation]), use_cache=False).logits[0].log_softmax(-1)
    log_probs, wanted = log_probs[len(context) - 1 : -1], torch.tensor(continuation)
    return float(log_probs.gather(1, wanted[:, None]).sum()), bool((log_probs.argmax(-1) == wanted).all())


def evaluated(model: Any, data: Path, names: list[str]) -> Any:
    settings: Any = {"data": str(data)}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=settings)
    names = [f"dsla_{name}" for name in names]
    return simple_evaluate(model=model, tasks=list(names), task_manager=manager, bootstrap_iters=0, batch_size=1)


def tasks_of(data: Path, limit: int | None = None) -> dict[str, Task]:
    return {task.name: task for task in [*commonsense_tasks(data, limit), gsm8k_task(data, limit)]}


@pytest.mark.parametrize("level", LEVELS)
def test_likelihoods_are_those_of_plain_forwards(model: Subject, level: int) -> None:
    model.set(level)
    found = SubjectLM(model).loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), answer in zip(PAIRS, found, strict=True):
        whole = model.encode(context + continuation)
        before = model.encode(context.rstrip()) or [model.tokenizer.eos_token_id]
        rest = whole[len(before) :] if context else whole
        expected = plain(model, before, rest)
        assert answer[0] == pytest.approx(expected[0], abs=1e-9)
        assert answer[1] == expected[1]


def test_a_context_is_read_once(model: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    model.set(2)
    reads, read = [], model.read
    monkeypatch.setattr(model, "read", lambda ids, after=None: reads.append(list(ids)) or read(ids, after))
    SubjectLM(model).loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    assert len(reads) == len({context for context, _ in PAIRS})


@pytest.mark.parametrize("level", LEVELS)
def test_likelihood_of_a_text_longer_than_the_context(
    model: Subject, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    model.set(level)
    text = "the quick brown fox jumps over the lazy dog, again and again. " * 3
    ids, end = model.encode(text), model.tokenizer.eos_token_id
    assert len(ids) > 40
    whole = SubjectLM(model).loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert whole == [pytest.approx(plain(model, [end], ids)[0])]
    monkeypatch.setattr(model, "context", 21)
    # Windows of 20 tokens: the first follows the end token, the next the token before it, the last all that fits.
    expected = plain(model, [end], ids[:20])[0]
    for start in range(20, len(ids), 20):
        part = ids[start : start + 20]
        before = ids[start - 1 - (20 - len(part)) : start]
        expected += plain(model, before, part)[0]
    cut = SubjectLM(model).loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert cut == [pytest.approx(expected)]


def test_generation_stops_where_it_is_told(model: Subject) -> None:
    model.set(2)
    lm, context = SubjectLM(model), "the quick brown"
    whole = model.generate_text(model.encode(context), 12)
    stop = whole[5]
    asked_for = [{"until": [], "max_gen_toks": 12}, {"until": [stop], "max_gen_toks": 12, "do_sample": False}]
    requests = asked("generate_until", *((context, settings) for settings in asked_for))
    assert lm.generate_until(requests, disable_tqdm=True) == [whole, whole[: whole.index(stop)]]
    with pytest.raises(ConfigError, match="greedy: pass --gen_kwargs do_sample=False"):
        lm.generate_until(asked("generate_until", (context, {"until": [], "temperature": 0.7})), disable_tqdm=True)


def test_chat_template(model: Subject) -> None:
    turns = [{"role": "user", "content": "duck?"}]
    lm = SubjectLM(model)
    assert lm.apply_chat_template(turns) == "<|im_start|>user\nduck?<|im_end|>\n<|im_start|>assistant\n"


def test_prompts_are_the_harness_own(data: Path) -> None:
    found = evaluated(SubjectLM(subject()), data, sorted(SOURCES))["samples"]
    first = {name: found[f"dsla_{name}"][0] for name in SOURCES}
    prompts = {
        name: [tuple(pair[:2]) for pair in sample["arguments"]] for name, sample in first.items() if name != "gsm8k"
    }
    choices = choice_record("hellaswag", 0)["choices"]
    assert prompts["hellaswag"] == prompts["openbookqa"] == [("The quick fox number 0", f" {x}") for x in choices]
    for name in ("piqa", "arc_easy", "arc_challenge", "boolq_closed"):
        assert prompts[name][1] == ("Question: The quick fox number 0\nAnswer:", f" {choices[1]}")
    assert prompts["social_iqa"][0] == ("Q: The quick fox number 0\nA:", f" {choices[0]}")
    assert prompts["winogrande"] == [
        (f"The fox saw the {x}", "and it was 0 again".join((" ", ""))) for x in choices[:2]
    ]
    lettered = f"The quick fox number 0\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\nAnswer:"
    assert prompts["lsat_lr"] == prompts["aqua_rat"] == [(lettered, " A"), (lettered, " B"), (lettered, " C")]
    head = "The following are multiple choice questions (with answers) about brown foxes.\n\n"
    assert prompts["mmlu"] == [(head + lettered, letter) for letter in (" A", " B", " C")]
    assert first["gsm8k"]["arguments"][0][0] == "Question: 0 and 1?\nAnswer:"


@pytest.mark.parametrize("level", [0, 3])
def test_scores_are_the_harness_own(data: Path, model: Subject, level: int) -> None:
    model.set(level)
    tasks = tasks_of(data)
    expected = evaluated(SubjectLM(model), data, list(tasks))
    for name, task in tasks.items():
        items = list(task.run(model, frozenset()))
        assert len(items) == task.items == COUNT
        samples = {sample["doc"]["id"]: sample for sample in expected["samples"][f"dsla_{name}"]}
        assert {item.id: item.score for item in items} == {key: x[task.metric] for key, x in samples.items()}
        mean = sum(item.score for item in items) / COUNT
        source = SOURCES[name]
        assert mean == pytest.approx(expected["results"][f"dsla_{name}"][f"{source.metric},{source.filter}"])
    assert {task.group for task in tasks.values()} == {"commonsense", "knowledge", "generation"}


def test_level_0_scores_as_the_harness_own_model_does(data: Path, model: Subject) -> None:
    model.set(0)
    names = [name for name in SOURCES if name != "gsm8k"]
    reference: Any = HFLM(pretrained=model.model, tokenizer=model.tokenizer, device="cpu")
    expected, found = evaluated(reference, data, names), evaluated(SubjectLM(model), data, names)
    for name in names:
        for one, other in zip(found["samples"][f"dsla_{name}"], expected["samples"][f"dsla_{name}"], strict=True):
            ours, theirs = ([x[0][0] for x in sample["resps"]] for sample in (one, other))
            assert ours == pytest.approx(theirs, abs=1e-4)
        for key, value in expected["results"][f"dsla_{name}"].items():
            if key.startswith("acc"):
                assert found["results"][f"dsla_{name}"][key] == value


def test_resumed_items_are_the_same(data: Path, model: Subject) -> None:
    model.set(1)
    task = tasks_of(data)["arc_easy"]
    items = list(task.run(model, frozenset()))
    done = frozenset(item.id for item in items[::2])
    assert list(task.run(model, done)) == items[1::2]


def test_chance_is_the_mean_over_the_questions(data: Path) -> None:
    tasks = tasks_of(data)
    assert tasks["hellaswag"].chance == 0.25 and tasks["winogrande"].chance == 0.5 and tasks["gsm8k"].chance == 0
    assert tasks["arc_easy"].chance == pytest.approx((1 / 3 + 1 / 4 + 1 / 5) / 3)


def test_a_limit_takes_a_fixed_sample(data: Path, model: Subject) -> None:
    ids = {
        limit: [item.id for item in tasks_of(data, limit)["piqa"].run(model, frozenset())]
        for limit in (4, 8, 100, None)
    }
    assert [len(x) for x in ids.values()] == [4, 8, COUNT, COUNT]
    assert set(ids[4]) < set(ids[8]) and ids[4] != [f"piqa-{i}" for i in range(4)]
    assert ids[100] == ids[None] == [f"piqa-{i}" for i in range(COUNT)]
    # The sample is part of a result: it must not change between versions.
    assert ids[4] == ["piqa-3", "piqa-6", "piqa-8", "piqa-11"]


def test_only_files_that_are_there(data: Path, tmp_path: Path) -> None:
    assert commonsense_tasks(tmp_path) == []
    with pytest.raises(DataError, match="gsm8k_test"):
        gsm8k_task(tmp_path)
    write(tmp_path / "mc/piqa.jsonl.gz", [choice_record("piqa", 0)])
    assert [task.name for task in commonsense_tasks(tmp_path)] == ["piqa"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"choices": None}, "'choices' must be list, found NoneType"),
        ("piqa", {"choices": ["one"]}, "'choices' must hold 2 to 10 texts, found 1"),
        ("piqa", {"choices": ["one", 2]}, r"'choices'\[1\] must be a text that is not empty, found 2"),
        ("piqa", {"choices": ["one", " "]}, r"'choices'\[1\] must be a text that is not empty"),
        ("piqa", {"answer_index": 2}, "'answer_index' must be from 0 to 1, found 2"),
        ("piqa", {"answer_index": True}, "'answer_index' must be int, found bool"),
        ("piqa", {"context": " "}, "'context' is empty"),
        ("piqa", {"id": "piqa-0"}, "id 'piqa-0' comes twice"),
        ("winogrande", {"context": "no gap"}, "a blank '_' in 'context'"),
        ("mmlu", {"subject": 3}, "'subject' must be str, found int"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    records = [choice_record(name, 0), {**choice_record(name, 1), **change}]
    write(tmp_path / SOURCES[name].file, records)
    with pytest.raises(DataError, match=rf"{name}\.jsonl\.gz, line 2: .*{message}"):
        commonsense_tasks(tmp_path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    record = choice_record("piqa", 0)
    del record["answer_index"]
    write(tmp_path / SOURCES["piqa"].file, [record])
    with pytest.raises(DataError, match=r"line 1: key 'answer_index' is missing; expected keys: id, context"):
        commonsense_tasks(tmp_path)


def test_without_the_harness(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dsla\[eval\]'"):
        commonsense_tasks(data)


def test_task_files_are_of_the_tasks_there_are() -> None:
    assert {path.stem for path in TASKS.glob("*.yaml")} == set(SOURCES)


@pytest.mark.usefixtures("tiny_home")
def test_harness_makes_the_model_by_its_name(folders: tuple[str, str], data: Path) -> None:
    model, adapter = folders
    arguments = {"model": model, "adapter": adapter, "level": 2, "dtype": "float64"}
    settings: Any = {"data": str(data)}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=settings)
    found = simple_evaluate(
        model="dsla", model_args=arguments, tasks=["dsla_piqa"], task_manager=manager, bootstrap_iters=0, batch_size=1
    )
    lm = HarnessLM(**arguments)
    assert lm.subject.level == 2 and lm.subject.dtype == torch.float64
    expected = {item.id: item.details["answers"] for item in tasks_of(data)["piqa"].run(lm.subject, frozenset())}
    assert found is not None
    samples = found["samples"]["dsla_piqa"]
    assert {x["doc"]["id"]: [answer[0][0] for answer in x["resps"]] for x in samples} == expected
    with pytest.raises(ConfigError, match="dtype: expected float32, bfloat16, float16 or float64, found 'int8'"):
        HarnessLM(model=model, dtype="int8")


@pytest.mark.usefixtures("tiny_home")
def test_command_line(
    folders: tuple[str, str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, adapter = folders
    command = ["run", "--model", "dsla", "--model_args", f"model={model},adapter={adapter},level=1", "--device", "cpu"]
    command += [
        "--tasks",
        "dsla_winogrande",
        "--include_path",
        str(TASKS),
        "--metadata",
        json.dumps({"data": str(data)}),
    ]
    monkeypatch.setattr(sys, "argv", ["harness", *command, "--output_path", str(tmp_path / "out")])
    harness.main()
    assert "dsla_winogrande" in capsys.readouterr().out
    (result,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(result.read_text())["results"]["dsla_winogrande"]["acc,none"] >= 0


def test_files_need_a_folder() -> None:
    with pytest.raises(DataError, match="task piqa reads local files: name their folder"):
        harness.dataset(name="piqa")
