"""What the engine says of itself, for those who watch it: where its bytes are, and what is converted."""

from __future__ import annotations

import pytest

from dsla.engine import Engine, SamplingParams
from tests.engine.tiny import MIXER, ORDER, no_policy, random_prompt, tiny_engine


def running(level: int | None = None) -> Engine:
    """An engine that has computed a step of a request of 8 tokens."""
    engine = tiny_engine(level=level)
    engine.add_request(random_prompt(8), SamplingParams(max_tokens=5, ignore_eos=True), request_id="r")
    engine.step()
    return engine


def test_weights_and_what_all_levels_add_to_them() -> None:
    engine = tiny_engine()
    stats = engine.stats()
    parameters = sum(
        p.numel() * p.element_size() for mixer in engine.decoder.mixers.values() for p in mixer.parameters()
    )
    assert stats["adapter_bytes"] == parameters > 0
    assert stats["weights_bytes"] == engine.decoder.weights.nbytes
    assert stats["weights_bytes"] + stats["adapter_bytes"] == engine.decoder.nbytes


def test_layers_and_their_order() -> None:
    stats = tiny_engine().stats()
    assert (stats["layers"], stats["order"]) == (4, list(ORDER))


@pytest.mark.parametrize("policy", [None, no_policy], ids=["fixed", "adaptive"])
def test_whether_there_is_a_policy_to_return_to(policy: object) -> None:
    engine = tiny_engine(policy=policy)  # type: ignore[arg-type]
    engine.set_level(1)
    assert engine.stats()["adaptive"] == (policy is not None)


@pytest.mark.parametrize("level", range(len(ORDER) + 1))
def test_converted_layers_and_windows_of_a_request(level: int) -> None:
    engine = running(level)
    stats = engine.stats()
    (request,) = stats["requests"]
    shape = engine.decoder.shape
    window = 2 * (MIXER.window + MIXER.sinks) * shape.n_kv_heads * shape.head_dim * engine.decoder.dtype.itemsize
    assert request["converted"] == list(ORDER[:level])
    assert request["max_tokens"] == 5
    assert stats["window_bytes"] == level * window
    assert stats["window_bytes"] <= stats["state_bytes"]


def test_memory_of_a_request_changes_with_a_conversion() -> None:
    engine = running()
    before = engine.stats()
    assert before["requests"][0]["memory_bytes"] == before["kv_bytes"]
    engine.set_level(2)
    engine.step()
    after = engine.stats()
    assert after["requests"][0]["converted"] == list(ORDER[:2])
    assert after["requests"][0]["memory_bytes"] == after["kv_bytes"] + after["state_bytes"]
    assert after["kv_bytes"] < before["kv_bytes"]


def test_requests_that_wait_hold_nothing() -> None:
    engine = tiny_engine()
    engine.add_request(random_prompt(8), SamplingParams(max_tokens=5))
    (request,) = engine.stats()["requests"]
    assert (request["memory_bytes"], request["converted"]) == (0, [])


def test_of_the_requests_that_wait_only_so_many_are_told() -> None:
    engine = running()
    for name in ("a", "b", "c"):
        engine.add_request(random_prompt(8), SamplingParams(max_tokens=5), request_id=name)
    told = {most: [request["id"] for request in engine.stats(most_waiting=most)["requests"]] for most in (None, 0, 2)}
    assert told == {None: ["r", "a", "b", "c"], 0: ["r"], 2: ["r", "a", "b"]}
    assert engine.stats(most_waiting=0)["waiting"] == 3
    assert engine.open_ids == ["r", "a", "b", "c"]


def test_events_can_be_left_out() -> None:
    engine = running()
    stats = engine.stats(events_after=None)
    assert (stats["events"], stats["event_count"]) == ([], len(engine.stats()["events"]))
