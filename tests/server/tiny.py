"""A tiny tokenizer with a chat template, a tiny model, and engines on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsla.adaptive import make_policy
from dsla.convert import Plan, Teacher
from dsla.convert.adapter import save_layer
from dsla.engine import Engine, EngineConfig, PackedDecoder
from dsla.engine.weights import build_weights
from dsla.families import attention_shape, family_of
from dsla.hub import model_hash
from dsla.mixers import DslaConfig, DslaMixer

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAMPLE = ["the quick brown fox jumps over the lazy dog, again and again.\n", "漢字かな 🦆🦆 مرحبا"]


@cache
def _backend() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(SAMPLE * 4, trainer)
    return backend


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 384 tokens, its own object each time."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend().to_str()), eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer as SentencePiece makes them: spaces as `▁`, a byte a token where no piece fits; fits `tiny_model`."""
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("漢", "字"), ("▁", "▁")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*dict.fromkeys("▁the quickfoxж漢字🦆".replace(" ", "")), *(left + right for left, right in merges)]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def tiny_model() -> LlamaForCausalLM:
    """A random Llama of four layers and 4,096 positions."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=24, intermediate_size=40, num_hidden_layers=4, head_dim=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.3,
        eos_token_id=2, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@cache
def tiny_mixers() -> dict[int, DslaMixer]:
    """Mixers of three of its layers."""
    shape, settings = attention_shape(tiny_model().config), DslaConfig(window=4, sinks=2, delta_rank=2)
    torch.manual_seed(9)
    return {layer: DslaMixer(settings, shape).eval().requires_grad_(False) for layer in (2, 0, 3)}


@cache
def tiny_decoder() -> PackedDecoder:
    """The decoder of both."""
    model = tiny_model()
    family = family_of(model.config)
    weights = build_weights(model.state_dict(), model.config, family, torch.float32)
    return PackedDecoder(weights, model.config, family, tiny_mixers())


def save_model(path: Path) -> Path:
    """The tiny model and its tokenizer as a model folder."""
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def save_adapter(path: Path, model: Path) -> Path:
    """The tiny mixers as an adapter of a saved model."""
    path.mkdir()
    mixers = tiny_mixers()
    settings = mixers[2].config
    teacher = Teacher("tiny", model_hash(model), tiny_model().config.num_hidden_layers)
    Plan(teacher, tuple(mixers), settings).save(path / "plan.json")
    for layer, mixer in mixers.items():
        save_layer(path, layer, mixer, {})
    return path


def tiny_engine(
    decoder: PackedDecoder | None = None,
    budget_bytes: int = 8 << 20,
    level: int | None = None,
    config: EngineConfig | None = None,
) -> Engine:
    """An engine on it, adaptive where no level is given."""
    decoder = decoder or tiny_decoder()
    config = config or EngineConfig(max_step_tokens=256, level=level)
    return Engine(decoder, decoder.arena(budget_bytes), config, make_policy())
