"""`check_adapter` runs the model, and names what is wrong with an adapter that is whole by its hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsla.convert.adapter import save_layer
from dsla.convert.check import check_adapter
from dsla.convert.surgery import ConvertedAttention
from dsla.errors import AdapterError
from dsla.mixers import DslaMixer
from tests.server.tiny import save_adapter, save_model, tiny_mixers


@pytest.fixture
def folders(tmp_path: Path, empty_cache: Path) -> tuple[Path, Path]:
    model = save_model(tmp_path / "model")
    return save_adapter(tmp_path / "adapter", model), model


def check(folders: tuple[Path, Path]) -> str:
    return "\n".join(check_adapter(*folders, torch.float32))


def test_says_what_was_found_good(folders: tuple[Path, Path]) -> None:
    found = check(folders)
    assert "3 of 3 in the plan" in found and "fold equals the live run" in found
    assert "0 equals the teacher bit for bit, 3 gives finite logits" in found


def test_no_layers_is_no_adapter(folders: tuple[Path, Path]) -> None:
    (folders[0] / "manifest.json").write_text('{"format": 1, "layers": {}}')
    with pytest.raises(AdapterError, match="no converted layer yet"):
        check(folders)


def test_values_that_are_not_finite(folders: tuple[Path, Path]) -> None:
    mixer = DslaMixer(tiny_mixers()[0].config, tiny_mixers()[0].shape)
    torch.nn.init.constant_(mixer.gates.weight, torch.nan)
    save_layer(folders[0], 0, mixer, {})
    with pytest.raises(AdapterError, match="layer-00.*'gates.weight' holds a value that is not finite"):
        check(folders)


def test_model_is_run_at_the_highest_level(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ConvertedAttention, y: torch.Tensor) -> torch.Tensor:
        return y.flatten(2) * torch.nan

    monkeypatch.setattr(ConvertedAttention, "output", broken)
    with pytest.raises(AdapterError, match="logits at level 3 are not finite"):
        check(folders)


def test_level_0_is_compared_with_the_teacher(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = ConvertedAttention.forward

    def spoiling(self: ConvertedAttention, *args: Any, **kwargs: Any) -> Any:
        getattr(self, self.names[0]).weight.data.mul_(1.001)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ConvertedAttention, "forward", spoiling)
    with pytest.raises(AdapterError, match="level 0 differs"):
        check(folders)
