"""A tiny GGUF, written here, as a model folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dsla.from_gguf import convert_gguf

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 32, 4, 2, 8, 64
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as GGUF keeps them: the two halves of a rotated head interleaved."""
    return weight.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ĠĠ", "12", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ", "1 2", "a b"])
    for role, token in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{role}_token_id")(token)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), HIDDEN),
        "blk.0.attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "output_norm": (HIDDEN,),
    }
    weights = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", interleave(weight, heads[name]) if name in heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("gguf")
    weights = write_gguf(folder / "tiny.gguf")
    made = folder / "made"
    made.mkdir()
    convert_gguf(folder / "tiny.gguf", made, "tiny")
    return made, weights


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("model.embed_tokens", "token_embd"),
        ("model.layers.0.self_attn.q_proj", "blk.0.attn_q"),
        ("model.layers.0.self_attn.k_proj", "blk.0.attn_k"),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down"),
    ],
)
def test_weights_are_the_files_in_bf16(converted: tuple[Path, dict[str, np.ndarray]], module: str, name: str) -> None:
    from transformers import AutoModelForCausalLM

    folder, weights = converted
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.get_submodule(module).weight, torch.from_numpy(weights[name]).bfloat16())


def test_tokenizer_and_ids_are_the_files(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder, _ = converted
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    assert tokenizer.model_max_length == config.max_position_embeddings == 128
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert tokenizer.tokenize("ab  12<|im_end|>") == ["ab", "ĠĠ", "1", "2", "<|im_end|>"]
    text = "ab ▁ é , 漢字 ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    message = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<|im_start|>ab<|im_end|>"
