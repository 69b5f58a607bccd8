"""The outlier ratio, against a slow definition and a planted outlier."""

from __future__ import annotations

import torch

from dsla.sensitivity.outliers import outlier_ratio
from tests.distill.tiny import teacher
from tests.sensitivity.probes import TOKENS, probe, silent


def test_ratio_is_that_of_weights_times_input_norms() -> None:
    model, inputs = teacher(), {}
    names = [(i, name) for i in range(3) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    for i, name in names:
        module = getattr(model.model.layers[i].self_attn, name)
        module.weight[0, 3] = 9.0
        module.register_forward_hook(lambda _, args, out, key=(i, name): inputs.__setitem__(key, args[0].double()))
    model(TOKENS)
    expected = []
    for layer in range(3):
        sizes = []
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            norms = inputs[layer, name].flatten(0, 1).norm(dim=0)
            sizes += [
                abs(w) * n
                for row in getattr(model.model.layers[layer].self_attn, name).weight.tolist()
                for w, n in zip(row, norms.tolist(), strict=True)
            ]
        mean = sum(sizes) / len(sizes)
        expected.append(sum(size > 5 * mean for size in sizes) / len(sizes))
    found = outlier_ratio(probe(model=model), silent)
    assert min(expected) > 0
    torch.testing.assert_close(torch.tensor(found.scores), torch.tensor(expected))


def test_planted_outliers_put_a_layer_last_and_no_hook_stays() -> None:
    model = teacher()
    assert outlier_ratio(probe(model=model), silent).order[-1] != 1
    weight = model.model.layers[1].self_attn.v_proj.weight
    weight[:, :2] = 50.0 * weight.abs().max()
    found = outlier_ratio(probe(model=model), silent)
    assert found.order[-1] == 1
    assert all(not module._forward_pre_hooks for module in model.model.layers.modules())
