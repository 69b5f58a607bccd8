"""What the recipe search trains and measures: variants of the mixer, cached activations, one layer's training."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsla.convert.surgery import ConvertedAttention, project
from dsla.distill.objective import relative_error, teacher_output
from dsla.families import attention_shape, family_of
from dsla.mixers import AttentionShape, DslaConfig, DslaMixer, Memory
from dsla.mixers.features import Hedgehog
from dsla.ops import chunk_dsla, window_attention

PREFIXES = {"512": 512, "2k": 2048, "8k": 8192}
WARMUP, GRAD_CLIP = 0.05, 1.0
PROJECTION_LR = 0.1


@dataclass(frozen=True)
class Lab:
    """Variants that exist for the search alone.

    Attributes:
        gate_input: `config` (as `gate_source` says) or `value` (the cached value; foldable).
        fed: the states hold the tokens that left the window (`past`) or `all` of them; sinks stay out either way.
        exp: unnormalised `exp([W x, -W x])` in place of hedgehog's softmax, started so that it meets `exp(q k / sqrt D)`.
        map_scale: factor on the feature map's start.
        half_life: tokens all gates start at, 0 = as the library does.
        frozen: parameters that are not trained.
        projections: q, k, v and o are trained in full, at a tenth of the learning rate.
    """

    gate_input: str = "config"
    fed: str = "past"
    exp: bool = False
    map_scale: float = 1.0
    half_life: float = 0.0
    frozen: tuple[str, ...] = ()
    projections: bool = False


class Exp(Hedgehog):
    """Hedgehog's map without its normaliser."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("...hd,hdf->...hf", x.float(), self.weight)
        return torch.cat([y, -y], -1).clamp_max(20.0).exp()


class LabMixer(DslaMixer):
    """A mixer with the variants of `Lab`; with `near_only` it reads window and sinks alone."""

    def __init__(self, config: DslaConfig, shape: AttentionShape, lab: Lab) -> None:
        super().__init__(config, shape)
        self.lab, self.near_only = lab, False
        if lab.exp:
            self.features_q = Exp(shape.n_heads, shape.head_dim, self.width)
            self.features_k = Exp(shape.n_kv_heads, shape.head_dim, self.width)
        with torch.no_grad():
            if lab.exp or lab.map_scale != 1.0:
                scale = shape.head_dim**-0.25 if lab.exp else lab.map_scale
                for features in (self.features_q, self.features_k):
                    features.weight.mul_(scale)
            if lab.exp:
                self.mixing.bias.fill_(-math.log(config.n_states * self.width))
            if lab.half_life:
                log_gate = -math.log(2.0) / lab.half_life * config.gate_temperature
                self.gates.bias.fill_(log_gate - math.log(-math.expm1(log_gate)))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in lab.frozen)

    def gate_input(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the gates read."""
        if self.lab.gate_input == "value":
            return v
        return k if self.config.gate_source == "key" else x

    def heads(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `prefill` from the first token on: the output `[B, T, H, D]`, and that of window and sinks alone."""
        window, tokens = self.config.window, q.shape[1]
        k_near, v_near = F.pad(k, (0, 0, 0, 0, window, 0)), F.pad(v, (0, 0, 0, 0, window, 0))
        late = window if self.lab.fed == "past" else 0
        k_in, v_in = (k_near[:, :tokens], v_near[:, :tokens]) if late else (k, v)
        inputs = self._state_inputs(x, k_in, v_in, (torch.arange(tokens) - late).unsqueeze(0).expand(len(q), -1))
        reads, _ = chunk_dsla(self.features_q(q), *inputs)
        local = None
        if self.config.attends_locally:
            sinks = self.config.sinks
            lengths = torch.zeros(len(q), dtype=torch.int64)
            local = window_attention(q, k_near, v_near, lengths, k[:, :sinks], v[:, :sinks])
        y = self.mixing(q, reads, local)
        return y.to(q.dtype), torch.zeros_like(q) if local is None else local[0].to(q.dtype)

    def prefill(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Memory | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """As the library's; with `near_only` from the first token on, and no memory is left."""
        if self.near_only:
            return self.heads(x, q, k, v)[1], {}
        return super().prefill(x, q, k, v, memory, lengths)

    def _state_inputs(self, x: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, values, log_g = super()._state_inputs(x, k, v, positions)
        if self.lab.gate_input == "value":
            log_g = self.gates(v) * (positions >= self.config.sinks)[..., None, None, None]
        return features, values, log_g


class FullLinear(nn.Module):
    """A projection trained in full: fp32 weights, input and output in the model's dtype."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight).to(x.dtype)


class Teacher:
    """The teacher's layers, and its activations on fixed windows of text, kept in a folder.

    Args:
        model: the teacher as a Hugging Face model.
        folder: where activations are kept.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder, self.family = model.requires_grad_(False), folder, family_of(model.config)
        self.shape = attention_shape(model.config)
        self.layers = model.get_submodule(self.family.layers)
        self.softmax = {i: getattr(layer, self.family.attention) for i, layer in enumerate(self.layers)}
        self.norm, self.head = model.get_submodule(self.family.norm), model.get_submodule(self.family.head)
        rotary = model.get_decoder().rotary_emb
        longest = torch.arange(max(PREFIXES.values())).unsqueeze(0)
        self._position = rotary(torch.zeros(1, dtype=next(model.parameters()).dtype), longest)
        folder.mkdir(parents=True, exist_ok=True)

    def position(self, tokens: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """cos and sin of `tokens` positions from `start` on."""
        return self._position[0][:, start : start + tokens], self._position[1][:, start : start + tokens]

    def attention_norm(self, layer: int) -> nn.Module:
        """The norm before it."""
        return self.layers[layer].get_submodule(self.family.attention_norm)  # type: ignore[no-any-return]

    @torch.no_grad()
    def run(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """Hidden states `[1, T, hidden]` through the layers `first ... last - 1`."""
        for layer in self.layers[first:last]:
            hidden = layer(hidden, position_embeddings=self.position(hidden.shape[1]), attention_mask=None)
        return hidden

    @torch.no_grad()
    def activations(self, name: str, windows: Tensor, layers: Iterable[int]) -> dict[str, Tensor]:
        """Inputs `in.L` and attention outputs `out.L` `[n, T, hidden]` of the layers."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            return load_file(path)
        wanted = sorted(layers)
        kept: dict[str, list[Tensor]] = {}
        for window in windows:
            hidden, at = self.model.get_submodule(self.family.embed)(window.unsqueeze(0)), 0
            for layer in wanted:
                hidden, at = self.run(hidden, at, layer), layer
                kept.setdefault(f"in.{layer}", []).append(hidden)
                x = self.attention_norm(layer)(hidden)
                y = teacher_output(self.softmax[layer], x, self.position(x.shape[1]))
                kept.setdefault(f"out.{layer}", []).append(y)
        found = {key: torch.cat(rows) for key, rows in kept.items()}
        save_file(found, path)
        return found

    def finals(self, name: str, inputs: Tensor, first: int) -> Tensor:
        """The last hidden states `[n, T, hidden]` that follow from the inputs of layer `first`."""
        path = self.folder / f"final_{name}.safetensors"
        if not path.exists():
            save_file({"final": torch.cat([self.run(h, first, len(self.layers)) for h in inputs.split(1)])}, path)
        return load_file(path)["final"]

    def converted(self, layer: int, mixer: LabMixer) -> ConvertedAttention:
        """A converted attention of the layer, with projections of its own where they are trained."""
        attention = ConvertedAttention(self.softmax[layer], mixer, self.family)
        for name in attention.names if mixer.lab.projections else ():
            setattr(attention, name, FullLinear(getattr(attention, name)))
        return attention


def fit(
    teacher: Teacher, layer: int, mixer: LabMixer, data: dict[str, Tensor], train: dict[str, Any]
) -> ConvertedAttention:
    """Trains one layer; `train` holds lr, contrast, loss, epochs, seed and shifted."""
    attention, norm = teacher.converted(layer, mixer), teacher.attention_norm(layer)
    projections = [p for name, p in attention.named_parameters() if ".weight" in name and not name.startswith("mixer")]
    own = [p for p in mixer.parameters() if p.requires_grad and p.numel()]
    lr, groups = train["lr"], [{"params": own, "scale": 1.0}]
    if mixer.lab.projections:
        groups.append({"params": projections, "scale": PROJECTION_LR})
    optimizer = torch.optim.AdamW(groups, lr, weight_decay=0.0)
    inputs, targets = data[f"in.{layer}"], data[f"out.{layer}"]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(train["seed"]))
    rows, starts = order.tolist() * train["epochs"], random.Random(train["seed"])
    room = max(PREFIXES.values()) - inputs.shape[1] if train["shifted"] else 0
    for step, row in enumerate(rows):
        hidden, target = inputs[row : row + 1], targets[row : row + 1]
        # Softmax attention reads distances alone: shifted windows have the same target, but other rotated keys and queries.
        x, position = norm(hidden), teacher.position(hidden.shape[1], starts.randint(0, room))
        q, k, v = project(attention, x, position)
        y, _ = mixer.heads(x, q, k, v)
        loss = _loss(teacher, attention, train["loss"], x, hidden, y, target)
        if train["contrast"] and mixer.config.n_states > 1 and mixer.gates.weight.requires_grad:
            gates = mixer.gates(mixer.gate_input(x, k, v)).exp().flatten(0, 1)
            loss = loss + train["contrast"] * F.cosine_similarity(gates[:, 0], gates[:, -1], dim=0).mean()
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"] * _lr_factor(step, len(rows))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], GRAD_CLIP)
        optimizer.step()
    return attention


def _loss(
    teacher: Teacher, attention: ConvertedAttention, kind: str, x: Tensor, hidden: Tensor, y: Tensor, target: Tensor
) -> Tensor:
    if kind == "mixer":
        return relative_error(y.flatten(2), _teacher_heads(teacher, attention.layer_idx, x))
    found = attention.output(y)
    if kind == "attention":
        return relative_error(found, target)
    if kind == "token":
        expected = target.float().square().sum(-1).clamp_min(1e-20)
        return ((found.float() - target.float()).square().sum(-1) / expected).mean()
    layer = teacher.layers[attention.layer_idx]
    mlp, norm = layer.mlp, layer.get_submodule(teacher.family.mlp_norm)
    after, wanted = hidden + found, hidden + target
    after, wanted = after + mlp(norm(after)), wanted + mlp(norm(wanted))
    change = (wanted - hidden).float().square().sum().clamp_min(1e-20)
    return (after.float() - wanted.float()).square().sum() / change


@torch.no_grad()
def _teacher_heads(teacher: Teacher, layer: int, x: Tensor) -> Tensor:
    base, seen = teacher.softmax[layer], []
    hook = getattr(base, teacher.family.o).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    teacher_output(base, x, teacher.position(x.shape[1]))
    hook.remove()
    return seen[0]  # type: ignore[no-any-return]


def _lr_factor(step: int, total: int) -> float:
    rise = max(int(total * WARMUP), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


@torch.no_grad()
def layer_errors(
    teacher: Teacher, attention: ConvertedAttention, books: dict[str, Tensor], copies: dict[str, Tensor]
) -> dict[str, float]:
    """Relative squared errors of a layer's output over prefixes of long texts, and where a text comes a second time.

    Names ending in `_off`: with the states left out. `4k-8k`: the last half of the long texts. `copy`: the second half of
    texts that say the same twice.
    """
    layer = attention.layer_idx
    found: dict[str, list[float]] = {}
    for data, spans in (
        (books, {name: (0, end) for name, end in PREFIXES.items()} | {"4k-8k": (4096, 8192)}),
        (copies, {"copy": (1024, 2048)}),
    ):
        for hidden, target in zip(data[f"in.{layer}"].split(1), data[f"out.{layer}"].split(1), strict=True):
            x = teacher.attention_norm(layer)(hidden)
            q, k, v = project(attention, x, teacher.position(hidden.shape[1]))
            for suffix, y in zip(("", "_off"), attention.mixer.heads(x, q, k, v), strict=True):
                wrong = (attention.output(y).float() - target.float()).square().sum(-1)[0]
                right = target.float().square().sum(-1)[0]
                for name, (start, end) in spans.items():
                    error = float(wrong[start:end].sum() / right[start:end].sum())
                    found.setdefault(name + suffix, []).append(error)
    return {name: sum(errors) / len(errors) for name, errors in found.items()}
