"""Whether a tokenizer belongs to a model, as far as its vocabulary tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dsla.errors import DataError
from dsla.families import family_of


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Checks that the model knows every token of the tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        model: a causal language model of a supported family.

    Raises:
        DataError: if the tokenizer has more tokens than the model has embeddings.
    """
    rows = _embeddings(model)
    if len(tokenizer) > rows:
        raise DataError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model's embedding {rows:,}: use the model's own tokenizer"
        )


def check_tokens(batches: Sequence[Tensor], model: Any) -> None:
    """Checks that the model knows every token that occurs.

    Args:
        batches: token ids, int64.
        model: a causal language model of a supported family.

    Raises:
        DataError: naming a token it does not know.
    """
    rows, highest = _embeddings(model), max(int(batch.max()) for batch in batches)
    if highest >= rows:
        raise DataError(
            f"the tokenizer made token {highest:,}, the model's embedding ends at {rows - 1:,}: use the model's own tokenizer"
        )


def _embeddings(model: Any) -> int:
    return int(model.get_submodule(family_of(model.config).embed).weight.shape[0])
