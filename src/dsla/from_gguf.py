"""A GGUF file as a model folder: safetensors, tokenizer, configs. Where the file comes from is not known here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsla.errors import ModelError


def convert_gguf(gguf: Path, folder: Path, name: str) -> None:
    """Reads a GGUF once through transformers and writes bf16 safetensors, tokenizer, config and generation config.

    Args:
        gguf: the file; its tokenizer must be byte-level BPE with single digits (`tokenizer.ggml.pre = smollm`).
        folder: existing folder to write to.
        name: name of the model in its config.

    Raises:
        ModelError: if the packages that read GGUF files are not installed.
    """
    try:
        import accelerate  # noqa: F401  (transformers reads GGUF files only with it)
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise missing_extra(error) from None
    import torch
    import transformers

    # Versions that cannot keep GGUF blocks packed have no such setting and always unpack.
    settings = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": settings(dequantize=True)} if settings else {}
    # In fp32 a block of Q4_1 or Q8_0 unpacks with one rounding at most, so every machine gets the same weights.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **unpack
    )
    model = model.bfloat16()
    model.config._name_or_path = name
    model.generation_config._from_model_config = False
    model.save_pretrained(folder)
    _tokenizer(gguf, model.config.max_position_embeddings).save_pretrained(folder)


def _tokenizer(gguf: Path, max_length: int) -> Any:
    # Built from the file's own tables: what transformers makes of them (end of turn, digits, decoder) varies.
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    read = {
        key: fields[f"tokenizer.{key}"].contents()
        for key in ("ggml.tokens", "ggml.merges", "ggml.token_type", "chat_template")
    }
    tokens = read["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in read["ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, read["ggml.token_type"], strict=True) if kind == TokenType.CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special = {role: tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()] for role, key in roles.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=read["chat_template"],
        **special,
    )


def missing_extra(error: ImportError) -> ModelError:
    """What to say where a package of the extra `gguf` is not installed."""
    return ModelError(f"reading the default model needs the package {error.name!r}: run `pip install 'dsla[gguf]'`")
