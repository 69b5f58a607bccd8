"""Settings become an engine, or an error that says which setting is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsla.cli import diagnosis
from dsla.cli.diagnosis import Kernels
from dsla.cli.serve_view import summary
from dsla.engine import SamplingParams
from dsla.errors import AdapterError, ConfigError, EngineError, ModelError
from dsla.ops import cpu
from dsla.server import build
from dsla.server.build import EngineSettings, build_engine, free_memory
from tests.server.tiny import save_model

pytestmark = pytest.mark.usefixtures("tiny_home")


def test_model_and_adapter_make_an_engine_that_generates(folders: tuple[str, str]) -> None:
    service = build_engine(EngineSettings(*folders, memory_bytes=4 << 20, page_tokens=8, max_step_tokens=100))
    assert service.model_name == "tiny"
    assert service.adaptive
    engine = service.engine
    assert (len(engine.decoder.order), engine.arena.page_tokens, engine.config.max_step_tokens) == (3, 8, 100)
    assert 0.9 * (4 << 20) < engine.arena.budget_bytes <= 4 << 20
    engine.add_request(service.tokenizer("fox")["input_ids"], SamplingParams(5, ignore_eos=True), min_level=3)
    tokens = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.tokens
    assert len(tokens) == 5


@pytest.mark.parametrize(
    ("settings", "adaptive", "level"),
    [({}, True, None), ({"adaptive": True}, True, None), ({"adaptive": False}, False, 0), ({"level": 2}, False, 2)],
    ids=str,
)
def test_who_decides_the_level(folders: tuple[str, str], settings: dict[str, Any], adaptive: bool, level: int) -> None:
    service = build_engine(EngineSettings(*folders, memory_bytes=1 << 20, **settings))
    assert service.adaptive is adaptive
    assert service.engine.stats()["level"] == level


def test_a_fixed_level_can_be_given_back_to_the_policy_unless_that_is_off(folders: tuple[str, str]) -> None:
    build_engine(EngineSettings(*folders, memory_bytes=1 << 20, level=2)).engine.set_level(None)
    fixed = build_engine(EngineSettings(*folders, memory_bytes=1 << 20, level=2, adaptive=False)).engine
    with pytest.raises(EngineError, match="no policy"):
        fixed.set_level(None)


def test_without_an_adapter_there_is_level_0_only(folders: tuple[str, str]) -> None:
    service = build_engine(EngineSettings(folders[0], memory_bytes=1 << 20))
    assert service.adapter is None
    assert not service.adaptive
    assert service.engine.stats()["max_level"] == 0


@pytest.mark.parametrize(("name", "dtype"), [(None, torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_states_in_another_dtype(folders: tuple[str, str], name: str | None, dtype: torch.dtype) -> None:
    service = build_engine(EngineSettings(*folders, memory_bytes=4 << 20, weights="bf16", state_dtype=name))
    assert service.engine.arena.slots["states"].dtype is dtype
    assert dict(summary(service))["adapter"].endswith(", bf16 states") is (name == "bf16")


def test_weights_in_another_dtype(folders: tuple[str, str]) -> None:
    service = build_engine(EngineSettings(*folders, memory_bytes=4 << 20, weights="bf16"))
    assert service.engine.decoder.dtype is torch.bfloat16
    service.engine.add_request([3, 4, 5], SamplingParams(5, ignore_eos=True), min_level=3)
    assert sum(len(output.tokens) for _ in range(6) for output in service.engine.step()) == 5


def test_the_summary_says_why_pytorch_computes(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    service = build_engine(EngineSettings(*folders, memory_bytes=1 << 20))
    assert dict(summary(service))["device"].endswith(
        "PyTorch: native kernels compute in bfloat16 (--weights bf16), this model in float32"
    )
    service = build_engine(EngineSettings(*folders, memory_bytes=1 << 20, weights="bf16"))
    monkeypatch.setattr(cpu, "native", lambda x: None)
    for reason, told in (
        ("no compiler\nat all", "PyTorch: no compiler"),
        ("DSLA_KERNELS=off", "PyTorch: DSLA_KERNELS=off"),
    ):
        found = Kernels(False, reason, None, (), False, None, "AVX2")
        monkeypatch.setattr(diagnosis, "find_kernels", lambda found=found: found)
        assert dict(summary(service))["device"].endswith(told)


def test_objectives_reach_the_policy(folders: tuple[str, str]) -> None:
    service = build_engine(EngineSettings(*folders, memory_bytes=1 << 20, slo_ttft=2.0, slo_tpot=0.1))
    assert (service.policy.ttft_seconds, service.policy.tpot_seconds) == (2.0, 0.1)
    levels = dict(summary(service))["levels"]
    assert levels.endswith("when memory gets short, or TTFT exceeds 2 s, or TPOT exceeds 0.1 s")


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        ({}, 0.25),
        ({"slo_tpot": 0.1}, 0.08),
        ({"slo_tpot": 3.0}, 0.25),
        ({"slo_tpot": 0.1, "max_step_seconds": 0.5}, 0.5),
    ],
)
def test_steps_keep_to_the_objective(folders: tuple[str, str], settings: dict[str, float], seconds: float) -> None:
    service = build_engine(EngineSettings(*folders, memory_bytes=1 << 20, **settings))  # type: ignore[arg-type]
    assert service.engine.config.max_step_seconds == pytest.approx(seconds)


def test_limits_reach_the_engine(folders: tuple[str, str]) -> None:
    config = build_engine(
        EngineSettings(*folders, memory_bytes=1 << 20, park_bytes=3 << 20, max_waiting=7)
    ).engine.config
    assert (config.park_bytes, config.max_waiting) == (3 << 20, 7)


@pytest.mark.parametrize("given", [None, 3])
def test_threads_are_measured_unless_they_are_given(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, given: int | None
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(build, "best_threads", lambda decoder: 2)
    try:
        build_engine(EngineSettings(*folders, memory_bytes=1 << 20, threads=given))
        assert torch.get_num_threads() == (given or 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"level": 4}, ConfigError, r"level 4 is out of range.* 0 \.\.\. 3"),
        ({"level": -1}, ConfigError, "level must be at least 0"),
        ({"level": 1, "adaptive": True}, ConfigError, "exclude each other"),
        ({"memory_bytes": 0}, ConfigError, "memory_bytes must be at least 1"),
        ({"memory_bytes": 10}, EngineError, "holds no request at all: give at least [1-9]"),
        ({"page_tokens": 0}, ConfigError, "page_tokens"),
        ({"weights": "int4"}, ModelError, "int4 weights need projections of multiples of 16 outputs and 32 inputs"),
        ({"threads": 0}, ConfigError, "threads"),
        ({"slo_ttft": 0.0}, ConfigError, "ttft_seconds must be a number of seconds > 0, or None, found 0.0"),
        ({"slo_tpot": -1.0}, ConfigError, "tpot_seconds"),
        ({"slo_ttft": 1.0, "adaptive": False}, ConfigError, "levels are not adaptive: leave out slo_ttft"),
        ({"slo_ttft": 1.0, "adapter": None}, ConfigError, "the model has no adapter"),
        ({"weights": "int3"}, ConfigError, "weights must be one of bf16, int4, found 'int3'"),
        ({"state_dtype": "bf16"}, ModelError, "states in bfloat16 do not go with a model in float32"),
        ({"state_dtype": "fp16"}, ConfigError, "state_dtype must be one of fp32, bf16, found 'fp16'"),
        ({"max_step_tokens": 1}, EngineError, "max_step_tokens must be at least 2"),
        ({"adapter": None, "level": 1}, ConfigError, "it has no adapter"),
        ({"adapter": None, "adaptive": True}, ConfigError, "need an adapter"),
        ({"adapter": "/no/such/folder"}, AdapterError, "no adapter at"),
        ({"model": "/no/such/folder"}, ModelError, "no model folder"),
    ],
    ids=str,
)
def test_bad_settings(folders: tuple[str, str], settings: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"model": folders[0], "adapter": folders[1], "memory_bytes": 1 << 20} | settings
    with pytest.raises(error, match=message):
        build_engine(EngineSettings(**given))


def test_int4_without_kernels_is_refused(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "kernels", lambda: None)
    with pytest.raises(ConfigError, match="int4 weights need the native kernels.*use bf16"):
        build_engine(EngineSettings(*folders, memory_bytes=1 << 20, weights="int4"))


def test_end_tokens_of_the_generation_config_count(folders: tuple[str, str], tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    file = model / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [0, 5]}))
    assert build_engine(EngineSettings(str(model), memory_bytes=1 << 20)).engine.decoder.eos_token_ids == {0, 2, 5}


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        build_engine(EngineSettings(str(model), memory_bytes=1 << 20))


def test_free_memory_minds_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       2000 kB\nMemAvailable:   1000 kB\n")
    monkeypatch.setattr(build, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(build, "_CGROUP", tmp_path)
    assert free_memory() == 1000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert free_memory() == 1000 * 1024
    (tmp_path / "memory.max").write_text("600\n")
    (tmp_path / "memory.stat").write_text("active_file 20\ninactive_file 0\n")
    assert free_memory() == 500
    (tmp_path / "memory.stat").write_text("active_file 20\ninactive_file 30\n")
    assert free_memory() == 530


def test_free_memory_without_meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_MEMINFO", tmp_path / "none")
    assert free_memory() > 0
