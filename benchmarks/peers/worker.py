"""One engine under measurement, in a process of its own: reads a task a line as JSON, answers with seconds.

Tasks: `{"prefill": tokens}` (a prompt of random tokens, from nothing to the logits of its last token) and
`{"decode": [batch, context], "steps": n}` (n steps of one token for each request, whose caches hold `context` tokens; every
step ends with logits). Caches of a decode task are filled with random keys and values where the engine lets us: what they
hold does not change how long a step takes.
"""

from __future__ import annotations

import json
import random
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

VOCABULARY = 40_000
CHUNK = 512


class Worker(Protocol):
    """An engine with a model loaded."""

    def prefill(self, tokens: int) -> float: ...
    def decode(self, batch: int, context: int, steps: int) -> list[float]: ...


class Dsla:
    """Our decoder at a level, driven as the engine drives it: chunks of a prompt, packed decode steps."""

    def __init__(self, model: str, threads: int, level: int, weights: str) -> None:
        import torch

        from dsla.convert.load import find_adapter, find_model
        from dsla.engine.batch import PackedBatch, Segment
        from dsla.engine.decoder import PackedDecoder
        from dsla.engine.memory import RequestMemory

        torch.set_num_threads(threads)
        path, config = find_model(model)
        adapter = find_adapter(path, config, None, torch.bfloat16)
        self.decoder = PackedDecoder.load(path, adapter, torch.bfloat16, int4=weights == "int4")
        self.level, self.batch_of, self.segment, self.memory = level, PackedBatch, Segment, RequestMemory

    def _room(self, batch: int, tokens: int) -> tuple[Any, list[Any]]:
        decoder, level = self.decoder, self.level
        pages = decoder.arena(1 << 20).page_count(tokens)
        kept, slots = batch * (decoder.n_layers - level) * (pages + 1), batch * level
        probe = decoder.arena(1 << 20)
        arena = decoder.arena((kept + (slots + 1) * probe.slot_units) * probe.page_bytes)
        memories = [self.memory(arena, decoder.n_layers, decoder.order[:level]) for _ in range(batch)]
        for memory in memories:
            memory.reserve(tokens)
        return arena, memories

    def prefill(self, tokens: int) -> float:
        prompt = [random.randrange(VOCABULARY) for _ in range(tokens)]
        arena, (memory,) = self._room(1, tokens)
        begun = time.perf_counter()
        for start in range(0, tokens, CHUNK):
            new = prompt[start : start + CHUNK]
            segment = self.segment(memory, new, start, start + len(new) == tokens)
            self.decoder.forward(self.batch_of([segment]), arena)
        return time.perf_counter() - begun

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        arena, memories = self._room(batch, context + steps)
        for pool in arena.pages.values():
            pool.normal_()
        seconds = []
        for step in range(steps):
            begun = time.perf_counter()
            segments = [self.segment(memory, [step + 1], context + step, True) for memory in memories]
            self.decoder.forward(self.batch_of(segments), arena)
            seconds.append(time.perf_counter() - begun)
        return seconds

    def attention(self, batch: int, context: int, steps: int) -> list[float]:
        """Seconds of each step that softmax attention over the caches takes."""
        mix, seconds = self.decoder.softmax.step, [0.0]

        def timed(*arguments: Any) -> Any:
            begun = time.perf_counter()
            y = mix(*arguments)
            seconds[-1] += time.perf_counter() - begun
            return y

        self.decoder.softmax.step = timed
        arena, memories = self._room(batch, context + steps)
        for pool in arena.pages.values():
            pool.normal_()
        for step in range(steps):
            segments = [self.segment(memory, [step + 1], context + step, True) for memory in memories]
            self.decoder.forward(self.batch_of(segments), arena)
            seconds.append(0.0)
        self.decoder.softmax.step = mix
        return seconds[:steps]


class Transformers:
    """The model in transformers, bf16, sdpa; a cache that grows, or one of fixed length."""

    def __init__(self, model: str, threads: int, cache: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from dsla.convert.load import find_model

        torch.set_num_threads(threads)
        path, _ = find_model(model)
        self.torch, self.cache = torch, cache
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    def _filled(self, batch: int, context: int, room: int) -> Any:
        from transformers import DynamicCache, StaticCache

        config, torch = self.model.config, self.torch
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if self.cache == "static":
            cache: Any = StaticCache(config=config, max_cache_len=room)
        else:
            cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            k, v = (torch.randn(batch, config.num_key_value_heads, context, dim).bfloat16() for _ in range(2))
            cache.update(k, v, layer, {"cache_position": torch.arange(context)})
        return cache

    def prefill(self, tokens: int) -> float:
        torch = self.torch
        prompt = torch.randint(0, VOCABULARY, (1, tokens))
        begun = time.perf_counter()
        with torch.inference_mode():
            self.model(prompt, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begun

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        torch, seconds = self.torch, []
        with torch.inference_mode():
            cache = self._filled(batch, context, context + steps)
            for step in range(steps):
                tokens, position = torch.full((batch, 1), step + 1), torch.full((batch, 1), context + step)
                begun = time.perf_counter()
                self.model(tokens, past_key_values=cache, position_ids=position, use_cache=True, logits_to_keep=1)
                seconds.append(time.perf_counter() - begun)
        return seconds


class ContinuousBatching:
    """transformers' own engine: continuous batching over a paged cache, bf16, sdpa. Timed by the time stamps of its tokens."""

    def __init__(self, model: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        from dsla.convert.load import find_model

        torch.set_num_threads(threads)
        path, _ = find_model(model)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
        batching = ContinuousBatchingConfig(
            max_batch_tokens=CHUNK, num_blocks=9 * 8192 // 256, page_size=256, allow_block_sharing=False
        )
        self.manager = self.model.init_continuous_batching(generation, batching)
        self.manager.start()
        self._stamps(8, [1])

    def _stamps(self, context: int, new: list[int]) -> tuple[float, list[list[float]]]:
        """When a run began, and when each request got each of its `new` tokens."""
        prompts = [[random.randrange(VOCABULARY) for _ in range(context)] for _ in new]
        begun = time.perf_counter()
        for prompt, count in zip(prompts, new, strict=True):
            self.manager.add_request(prompt, max_new_tokens=count, record_timestamps=True)
        stamps: list[list[float]] = []
        while len(stamps) < len(new):
            output = self.manager.get_result(timeout=60)
            if output is not None and output.is_finished():
                stamps.append(output.timestamps)
        return begun, stamps

    def prefill(self, tokens: int) -> float:
        begun, ((first,),) = self._stamps(tokens, [1])
        return first - begun

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        # Prompts are read one after the other: earlier requests need more tokens to be decoding still with the last one.
        chunks = -(-context // CHUNK) + 1
        _, stamps = self._stamps(context, [1 + steps + (batch - 1 - i) * chunks for i in range(batch)])
        last = max(stamps, key=lambda request: request[0])
        return [after - before for before, after in pairwise(last)]

    def close(self) -> None:
        self.manager.stop()


class LlamaCpp:
    """The same weights as the GGUF they come from, in llama.cpp, with flash attention or plain; one request at a time."""

    def __init__(self, gguf: str, threads: int, attention: str) -> None:
        import llama_cpp

        self.llama = llama_cpp.Llama(
            gguf, n_ctx=8192, n_threads=threads, n_threads_batch=threads, flash_attn=attention == "flash", verbose=False,
            n_batch=CHUNK,
        )  # fmt: skip

    def _read(self, tokens: int) -> float:
        prompt = [random.randrange(VOCABULARY) for _ in range(tokens)]
        begun = time.perf_counter()
        self.llama.eval(prompt)
        return time.perf_counter() - begun

    def prefill(self, tokens: int) -> float:
        self.llama.reset()
        return self._read(tokens)

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        if batch != 1:
            raise ValueError("one request at a time")
        if self.llama.n_tokens < context:
            self._read(context - self.llama.n_tokens)
        self.llama.n_tokens = context
        seconds = []
        for step in range(steps):
            begun = time.perf_counter()
            self.llama.eval([step + 1])
            seconds.append(time.perf_counter() - begun)
        return seconds


ENGINES = {
    "dsla": Dsla,
    "transformers": Transformers,
    "continuous batching": ContinuousBatching,
    "llama.cpp": LlamaCpp,
}


def main() -> None:
    """Loads what the first line names, then does a task a line."""
    setting = json.loads(sys.stdin.readline())
    name = setting.pop("engine")
    if "gguf" in setting and not Path(setting["gguf"]).is_file():
        raise FileNotFoundError(setting["gguf"])
    worker: Worker = ENGINES[name](**setting)
    print(json.dumps("ready"), flush=True)  # noqa: T201
    for line in sys.stdin:
        task = json.loads(line)
        if "prefill" in task:
            print(json.dumps([worker.prefill(task["prefill"])]), flush=True)  # noqa: T201
        elif "attention" in task:
            print(json.dumps(worker.attention(*task["attention"], task["steps"])), flush=True)  # noqa: T201
        else:
            print(json.dumps(worker.decode(*task["decode"], task["steps"])), flush=True)  # noqa: T201
    if isinstance(worker, ContinuousBatching):
        worker.close()


if __name__ == "__main__":
    main()
