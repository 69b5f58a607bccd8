"""What the parts of a conversion cost, counted from the model's shapes. No clocks here."""

from __future__ import annotations

from typing import Any

from torch import nn

from dsla.families import attention_shape, family_of
from dsla.mixers import DslaConfig
from dsla.ops.attention import BLOCK
from dsla.ops.chunk import SCALAR_CHUNK, VECTOR_CHUNK


class Costs:
    """FLOPs of a token; a multiplication and an addition are two, elementwise work is none, attention is causal.

    Args:
        model: a Hugging Face causal language model of a supported family.
        mixer: settings of its converted layers.

    Attributes:
        n_layers: decoder layers of the model.
        layer: all projections of a layer.
        head: the output head.
        mixer: what a converted layer has in the place of softmax attention, deltas included.
    """

    def __init__(self, model: Any, mixer: DslaConfig) -> None:
        family, shape = family_of(model.config), attention_shape(model.config)
        layers = model.get_submodule(family.layers)
        attention = getattr(layers[0], family.attention)
        self.n_layers = len(layers)
        self.layer = _linears(layers[0])
        self.head = _linears(model.get_submodule(family.head))
        self._projections, self._o = _linears(attention), _linears(getattr(attention, family.o))
        self._width = shape.n_heads * shape.head_dim
        heads, groups, dim, states = shape.n_heads, shape.n_kv_heads, shape.head_dim, mixer.n_states
        features, columns = mixer.feature_width(dim), dim + (mixer.normalizer != "none")
        vector = mixer.gate_shape == "vector"
        chunk = VECTOR_CHUNK if vector else SCALAR_CHUNK
        maps = (heads + groups) * dim * (features // 2) if mixer.feature_map == "hedgehog" else 0
        gates = (
            states * groups * (features if vector else 1) * (dim if mixer.gate_source == "key" else shape.hidden_size)
        )
        recurrence = states * features * columns * (groups + heads)
        inside = heads * chunk * (features * (states if vector else 1) + states * columns)
        near = 2 * heads * dim * (BLOCK + mixer.window + mixer.sinks) if mixer.attends_locally else 0
        parts = states + (mixer.normalizer == "state" and mixer.attends_locally)
        weighing = heads * dim * parts if mixer.mixing == "query" else 0
        deltas = 2 * mixer.delta_rank * (shape.hidden_size + self._width)
        # Keys, values and the layer's input pass no gradients on where it is trained alone.
        of_keys = maps * groups // (heads + groups) + gates + heads * chunk * states * columns + near
        self._no_gradient = 2 * of_keys
        self.mixer = 2 * (maps + gates + recurrence + inside + near + weighing + deltas)

    def softmax(self, length: int) -> int:
        """Softmax attention of a layer, in a row of `length` tokens."""
        return 2 * self._width * length

    def block(self, length: int) -> int:
        """A layer of the teacher."""
        return self.layer + self.softmax(length)

    def forward(self, length: int, level: int = 0) -> int:
        """The whole model at a level."""
        return (
            self.n_layers * self.layer + (self.n_layers - level) * self.softmax(length) + level * self.mixer + self.head
        )

    def layer_step(self, length: int, again: bool = False) -> int:
        """Training one layer; `again`: where the teacher's answer is known from an earlier epoch."""
        teacher = 0 if again else self._projections + self.softmax(length)
        # Of the projections, only the output's passes gradients on.
        return teacher + self._projections + self._o + 3 * self.mixer - self._no_gradient

    def layer_steps(self, length: int, epochs: int) -> int:
        """Training one layer for some epochs."""
        return self.layer_step(length) + (epochs - 1) * self.layer_step(length, again=True)

    def stage_step(self, length: int, level: int) -> int:
        """Training all layers together at a level: teacher, student, and gradients through the frozen weights."""
        linears = self.n_layers * self.layer + self.head
        mixing = (self.n_layers - level) * self.softmax(length) + level * self.mixer
        return 3 * linears + self.n_layers * self.softmax(length) + 3 * mixing


def mean_level(highest: int) -> int:
    """The level a stage trains at on average: half of its rows at the highest one, half at any of those below."""
    return round((highest + (1 + max(highest - 1, 1)) / 2) / 2)


def _linears(module: nn.Module) -> int:
    return 2 * sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
