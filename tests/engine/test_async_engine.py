"""The engine behind an event loop: streams, cancellation by going away, crashes, and closing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsla.engine import AsyncEngine, Request, RequestStream, SamplingParams, StepOutput
from dsla.errors import BusyError, DrainingError, EngineError, RequestError
from tests.engine.tiny import RecordingEngine, assert_as_reference, random_prompt, tiny_engine

GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture
def engine() -> Iterator[AsyncEngine]:
    runner = AsyncEngine(tiny_engine(units=2000))
    yield runner
    runner.close()


async def collect(
    engine: AsyncEngine, prompt: list[int], params: SamplingParams = GREEDY, **options: Any
) -> list[StepOutput]:
    return [output async for output in engine.generate(prompt, params, **options)]


async def until(condition: Any, seconds: float = 20.0) -> None:
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("the condition was never met")


def test_streams_as_the_engine_alone(engine: AsyncEngine) -> None:
    prompts = {str(i): random_prompt(5 + 6 * i, i) for i in range(5)}

    async def main() -> dict[str, list[StepOutput]]:
        results = await asyncio.gather(*(collect(engine, prompt, request_id=name) for name, prompt in prompts.items()))
        return dict(zip(prompts, results, strict=True))

    results = asyncio.run(main())
    recorder = engine.engine
    assert isinstance(recorder, RecordingEngine)
    for name, prompt in prompts.items():
        tokens = [token for output in results[name] for token in output.tokens]
        assert tokens == recorder.outputs[name]
        assert_as_reference(recorder, name, prompt)
        counts = [output.completion_tokens for output in results[name]]
        assert counts == sorted(set(counts)) and counts[-1] == 10
        assert results[name][-1].finish_reason == "length"
    assert engine.stats()["free_bytes"] == engine.stats()["budget_bytes"]


@pytest.mark.parametrize("how", ["aclose", "task", "cancel"])
def test_consumer_that_goes_away_frees_everything_within_a_step(engine: AsyncEngine, how: str) -> None:
    async def consume() -> None:
        async for output in engine.generate(random_prompt(20), ENDLESS, request_id="x"):
            last = output
        assert last.finish_reason == "abort"

    async def main() -> int:
        if how == "aclose":
            stream = engine.generate(random_prompt(20), ENDLESS, request_id="x")
            await anext(stream)
            await stream.aclose()
        else:
            task = asyncio.create_task(consume())
            await until(lambda: engine.stats()["generated_tokens"] > 2)
            if how == "task":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                engine.cancel("x")
                await task
        steps = engine.stats()["steps"]
        await until(lambda: not engine.engine.has_work)
        return engine.stats()["steps"] - steps

    assert asyncio.run(main()) <= 2
    assert engine.stats()["free_bytes"] == engine.stats()["budget_bytes"]
    assert engine.stats()["finished"] == {"cancel": 1}
    assert engine.stats()["events"][-1]["reason"] == ("by hand" if how == "cancel" else "client left")


def test_a_reader_that_found_the_end_ends_the_request_as_if_by_itself(engine: AsyncEngine) -> None:
    async def main() -> int:
        stream = engine.generate(random_prompt(20), ENDLESS, request_id="x")
        tokens = sum([len((await anext(stream)).tokens) for _ in range(3)])
        stream.stop()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await stream.aclose()
        await until(lambda: not engine.engine.has_work)
        return tokens

    tokens = asyncio.run(main())
    stats = engine.stats()
    assert stats["finished"] == {"stop": 1} and stats["free_bytes"] == stats["budget_bytes"]
    assert tokens <= stats["generated_tokens"] < 400
    assert [sum(stats["times"][name]["counts"]) for name in ("e2e", "tpot")] == [1, 1]


def test_a_stream_that_nobody_has_any_more_ends_its_request(engine: AsyncEngine) -> None:
    async def main() -> None:
        stream = engine.generate(random_prompt(20), ENDLESS)
        await anext(stream)
        del stream
        await until(lambda: not engine.engine.has_work)

    asyncio.run(main())
    assert engine.stats()["finished"] == {"cancel": 1}


def test_what_a_slow_reader_has_not_taken_is_one_output_a_level(engine: AsyncEngine) -> None:
    async def main() -> tuple[list[StepOutput], list[StepOutput]]:
        stream = engine.generate(random_prompt(9), SamplingParams(max_tokens=60, ignore_eos=True, logprobs=0))
        first = await anext(stream)
        await until(lambda: engine.stats()["generated_tokens"] >= 20)
        await asyncio.to_thread(engine.set_level, 2)
        await until(lambda: not engine.engine.has_work)
        slow = [first] + [output async for output in stream]
        return slow, await collect(engine, random_prompt(9), SamplingParams(max_tokens=60, ignore_eos=True, logprobs=0))

    slow, _ = asyncio.run(main())
    assert 2 < len(slow) <= 4, "the first, one for each level, and the last"
    assert sum(len(output.tokens) for output in slow) == 60
    assert [len(output.logprobs or ()) for output in slow] == [len(output.tokens) for output in slow]
    assert slow[-1].finish_reason == "length"
    assert all(output.completion_tokens >= 20 for output in slow[1:])


def test_a_deadline_ends_a_request(engine: AsyncEngine) -> None:
    async def main() -> int:
        loop, tokens = asyncio.get_running_loop(), 0
        with pytest.raises(TimeoutError):
            async for output in engine.generate(random_prompt(9), ENDLESS, deadline=loop.time() + 0.1):
                tokens += len(output.tokens)
                await asyncio.sleep(0.01)
        await until(lambda: not engine.engine.has_work)
        kept = await collect(engine, random_prompt(9), deadline=loop.time() + 60)
        assert kept[-1].finish_reason == "length"
        return tokens

    assert asyncio.run(main()) > 0
    assert engine.stats()["finished"] == {"cancel": 1, "length": 1}
    assert [event["reason"] for event in engine.stats()["events"] if event["kind"] == "cancel"] == ["deadline"]


def test_the_thread_ends_before_the_interpreter() -> None:
    """A thread that computes while the interpreter ends takes the process down with "terminate called"."""
    program = """
import atexit
from dsla.engine import AsyncEngine
from tests.engine.tiny import tiny_engine
atexit.register(lambda: print(engine._thread.is_alive()))
engine = AsyncEngine(tiny_engine())
raise SystemExit(3)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (found.returncode, found.stdout, found.stderr) == (3, "False\n", "")


def test_level_changes_while_streaming(engine: AsyncEngine) -> None:
    async def main() -> list[StepOutput]:
        outputs = []
        async for output in engine.generate(
            random_prompt(30), SamplingParams(max_tokens=60, ignore_eos=True), request_id="x"
        ):
            outputs.append(output)
            if len(outputs) == 5:
                engine.set_level(2)
        return outputs

    outputs = asyncio.run(main())
    assert [level for _, level in outputs[-1].levels] == [0, 2]
    recorder = engine.engine
    assert isinstance(recorder, RecordingEngine)
    assert_as_reference(recorder, "x", random_prompt(30))


def test_bad_arguments_raise_at_the_call(engine: AsyncEngine) -> None:
    with pytest.raises(RequestError, match="no tokens"):
        engine.generate([], GREEDY)
    with pytest.raises(EngineError, match="level 9"):
        engine.set_level(9)


def test_taken_id_is_refused_and_the_first_request_goes_on(engine: AsyncEngine) -> None:
    async def main() -> list[StepOutput]:
        first = engine.generate(random_prompt(5), SamplingParams(max_tokens=100, ignore_eos=True), request_id="x")
        outputs = [await anext(first)]
        with pytest.raises(EngineError, match="open already"):
            await collect(engine, random_prompt(5), request_id="x")
        return outputs + [output async for output in first]

    assert asyncio.run(main())[-1].finish_reason == "length"


class Panic(BaseException):
    """As PyO3 raises where Rust panics."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic, SystemExit])
def test_crash_reaches_everyone_and_health(kind: type[BaseException]) -> None:
    engine = AsyncEngine(tiny_engine())
    step = engine.engine.step

    def broken() -> list[StepOutput]:
        if engine.engine.stats()["generated_tokens"] > 30 and len(engine.engine.stats()["requests"]) == 3:
            raise kind("the sky fell")
        return step()

    engine.engine.step = broken  # type: ignore[method-assign]

    async def main() -> list[list[StepOutput]]:
        assert engine.healthy
        requests = (collect(engine, random_prompt(4, i), ENDLESS) for i in range(3))
        return await asyncio.wait_for(asyncio.gather(*requests), 60)

    for outputs in asyncio.run(main()):
        assert outputs[-1].finish_reason == "error"
        assert outputs[-1].error == f"{kind.__name__}: the sky fell"
    assert not engine.healthy
    assert not engine.stats()["healthy"]
    with pytest.raises(EngineError, match=f"has stopped: {kind.__name__}: the sky fell"):
        engine.generate([1], GREEDY)
    engine.close()


def test_a_place_in_the_queue_is_taken_at_once_and_comes_back() -> None:
    engine, gate = AsyncEngine(tiny_engine(max_waiting=2)), threading.Event()

    async def main() -> list[list[StepOutput]]:
        first, second = (engine.generate(random_prompt(4), GREEDY) for _ in range(2))
        with pytest.raises(BusyError, match="2 requests wait already"):
            engine.generate(random_prompt(4), GREEDY)
        await first.aclose()
        first = engine.generate(random_prompt(4), GREEDY)
        del second
        second = engine.generate(random_prompt(4), GREEDY)
        engine._send(lambda: gate.wait(30))
        begun = asyncio.create_task(anext(second))
        await asyncio.sleep(0.02)
        begun.cancel()
        await asyncio.wait([begun])
        third = engine.generate(random_prompt(4), GREEDY)
        gate.set()
        return await asyncio.gather(*(_all(stream) for stream in (first, third)))

    assert [outputs[-1].finish_reason for outputs in asyncio.run(main())] == ["length"] * 2
    assert engine.stats()["finished"] == {"length": 2}, "one that was left before it was added is never computed"
    assert not engine._reserved
    engine.close()


async def _all(stream: RequestStream) -> list[StepOutput]:
    return [output async for output in stream]


def test_command_that_fails_is_heard_by_all() -> None:
    engine = AsyncEngine(tiny_engine())
    submit, gate = engine.engine.submit, threading.Event()

    def broken(request: Request) -> str:
        if request.id == "1":
            raise RuntimeError("the sky fell")
        return submit(request)

    async def main() -> list[Any]:
        requests = [asyncio.create_task(collect(engine, [1, 2], request_id=str(i))) for i in range(3)]
        await asyncio.sleep(0.05)
        gate.set()
        return await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), 10)

    engine.engine.submit = broken  # type: ignore[method-assign]
    engine._send(gate.wait)
    first, failed, never_run = asyncio.run(main())
    assert first[-1].finish_reason == "error"
    for error in (failed, never_run):
        assert isinstance(error, EngineError) and "the sky fell" in str(error)
    engine.close()


def test_request_that_a_crash_overtakes_is_told() -> None:
    engine = AsyncEngine(tiny_engine())

    def broken() -> list[StepOutput]:
        # Left behind while the engine is busy crashing, so never submitted.
        asyncio.run_coroutine_threadsafe(second(), loop).result()
        raise RuntimeError("the sky fell")

    async def second() -> None:
        tasks.append(asyncio.create_task(collect(engine, random_prompt(4), GREEDY)))
        await asyncio.sleep(0.05)

    async def main() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        first = await collect(engine, random_prompt(4), GREEDY)
        assert first[-1].finish_reason == "error"
        with pytest.raises(EngineError, match="the sky fell"):
            await tasks[0]

    loop: asyncio.AbstractEventLoop
    tasks: list[asyncio.Task[list[StepOutput]]] = []
    engine.engine.step = broken  # type: ignore[method-assign]
    asyncio.run(main())
    engine.close()


def test_close_aborts_open_requests() -> None:
    engine = AsyncEngine(tiny_engine())

    async def main() -> list[StepOutput]:
        task = asyncio.create_task(collect(engine, random_prompt(4), ENDLESS))
        await until(lambda: engine.stats()["generated_tokens"] > 2)
        await asyncio.to_thread(engine.close)
        return await task

    assert asyncio.run(main())[-1].finish_reason == "abort"
    assert engine.engine.arena.free_units == engine.engine.arena.n_units
    with pytest.raises(EngineError, match="it was closed"):
        engine.generate([1], GREEDY)
    with pytest.raises(EngineError, match="it was closed"):
        engine.set_level(0)


def test_it_is_ready_once_it_has_warmed_up() -> None:
    gate, engine = threading.Event(), tiny_engine()
    engine.warm_up = gate.wait  # type: ignore[method-assign, assignment]
    runner = AsyncEngine(engine)
    assert runner.stats()["state"] == "warming-up"

    async def main() -> list[StepOutput]:
        asked = asyncio.create_task(collect(runner, random_prompt(4)))
        await asyncio.sleep(0.02)
        assert not asked.done()
        gate.set()
        outputs = await asked
        assert runner.state == "ready"
        return outputs

    assert asyncio.run(main())[-1].finish_reason == "length"
    runner.close()
    assert runner.state == "stopped"


def test_a_failed_warm_up_stops_it() -> None:
    engine = tiny_engine()

    def broken() -> None:
        raise RuntimeError("the sky fell")

    engine.warm_up = broken  # type: ignore[method-assign]
    runner = AsyncEngine(engine)
    runner._thread.join(10)
    assert runner.state == "stopped"
    with pytest.raises(EngineError, match="the sky fell"):
        runner.generate([1], GREEDY)
    runner.close()


def test_draining_ends_what_is_open_and_takes_nothing_new(engine: AsyncEngine) -> None:
    async def main() -> list[StepOutput]:
        opened = asyncio.create_task(collect(engine, random_prompt(4), ENDLESS))
        await until(lambda: engine.stats()["running"])
        engine.drain()
        assert engine.state == "draining"
        with pytest.raises(DrainingError, match="nothing new"):
            engine.generate(random_prompt(4), GREEDY)
        outputs = await opened
        engine.drain(False)
        assert (await collect(engine, random_prompt(4)))[-1].finish_reason == "length"
        return outputs

    assert asyncio.run(main())[-1].completion_tokens == 400


def test_cancel_says_whether_there_was_such_a_request(engine: AsyncEngine) -> None:
    async def main() -> list[StepOutput]:
        opened = asyncio.create_task(collect(engine, random_prompt(4), ENDLESS, request_id="x"))
        await until(lambda: engine.stats()["running"])
        assert not await asyncio.to_thread(engine.cancel, "y")
        assert await asyncio.to_thread(engine.cancel, "x")
        assert not await asyncio.to_thread(engine.cancel, "x")
        return await opened

    assert asyncio.run(main())[-1].finish_reason == "abort"
    engine.close()
    with pytest.raises(EngineError, match="has stopped"):
        engine.cancel("x")
