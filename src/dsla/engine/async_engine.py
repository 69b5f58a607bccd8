"""The engine behind an event loop: one thread steps it, coroutines add requests and receive their tokens."""

from __future__ import annotations

import atexit
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

from dsla.engine.engine import Engine
from dsla.engine.request import Request, StepOutput
from dsla.engine.sampling import SamplingParams
from dsla.engine.stream import LEFT, Mailbox, RequestStream, post
from dsla.engine.threads import release_threads
from dsla.errors import DrainingError, EngineError

T = TypeVar("T")

_logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.1


class AsyncEngine:
    """Runs an engine in a thread of its own, from now until `close`. All methods may be called from any thread.

    Args:
        engine: the engine; nobody else may step or change it.

    Attributes:
        engine: the same.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._wake = threading.Condition()
        self._commands: deque[tuple[Callable[[], object], Mailbox | None]] = deque()
        self._open: dict[str, tuple[Request, Mailbox]] = {}
        self._reserved: set[Request] = set()
        self._closing = False
        self._failure: str | None = None
        self._warm = self._draining = False
        self._thread = threading.Thread(target=self._run, name="dsla-engine", daemon=True)
        release_threads()  # of whoever made the engine
        self._thread.start()
        # A thread that computes when the interpreter ends takes the process down ("terminate called").
        atexit.register(self.close)

    @property
    def healthy(self) -> bool:
        """Whether the engine steps on."""
        return self._failure is None and not self._closing

    @property
    def state(self) -> Literal["warming-up", "ready", "draining", "stopped"]:
        """Whether it takes requests: only while `ready`, and, to be computed a little later, while `warming-up`."""
        if not self.healthy:
            return "stopped"
        if self._draining:
            return "draining"
        return "ready" if self._warm else "warming-up"

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        quality: str | None = None,
        max_level: int | None = None,
        min_level: int | None = None,
        sibling_of: str | None = None,
        deadline: float | None = None,
    ) -> RequestStream:
        """Runs a request. Bad arguments raise here, at once, as does a full queue; after that its place there is kept.

        The request is added when the first output is awaited.

        Args:
            prompt: token ids.
            params: sampling.
            request_id: its name. Default: a random one.
            quality: `full`, `balanced` or `fast`.
            max_level: the highest level allowed.
            min_level: the lowest level allowed.
            sibling_of: id of a request with the same prompt and level bounds; while both are open, it is computed once.
            deadline: time of the event loop's clock, seconds, by which it must have ended; None = there is none.

        Returns:
            Its outputs; to be closed.

        Raises:
            RequestError: if an argument is wrong or the request exceeds the model's context.
            BusyError: if too many requests wait.
            DrainingError: if the engine takes nothing new.
            EngineError: if the engine has stopped, or the memory budget could never hold the request.
        """
        if not self.healthy:
            raise self._stopped()
        if self._draining:
            raise DrainingError("the engine ends what it has accepted and takes nothing new")
        request = self.engine.check_request(
            prompt,
            params,
            request_id=request_id,
            quality=quality,
            max_level=max_level,
            min_level=min_level,
            sibling_of=sibling_of,
        )
        with self._wake:
            self.engine.refuse_if_full(len(self._reserved))
            self._reserved.add(request)
        return RequestStream(
            lambda mailbox: self._begin(request, mailbox), lambda why: self._leave(request, why), deadline
        )

    def drain(self, on: bool = True) -> None:
        """Takes nothing new from now on, or (False) takes requests again. What was accepted before runs to its end."""
        self._draining = on

    def cancel(self, request_id: str) -> bool:
        """Ends a request at the next step boundary, and waits for that; its last output then is an `abort`.

        Returns:
            Whether it was open.

        Raises:
            EngineError: if the engine has stopped.
        """
        return bool(self.cancel_all([request_id]))

    def set_level(self, level: int | None) -> None:
        """Fixes the level of all requests from the next step on, or (None) leaves it to the policy again.

        Waits for the step in hand, so that `stats` tells of it afterwards.

        Raises:
            EngineError: if there is no such level, no policy to return to, or the engine has stopped.
        """
        self.engine.check_level(level)
        self._ask(lambda: self.engine.set_level(level))

    def cancel_all(self, request_ids: Sequence[str]) -> list[str]:
        """Ends requests at one step boundary, as `cancel` does one; which of them were open.

        Raises:
            EngineError: if the engine has stopped.
        """
        return self._ask(lambda: [name for name in request_ids if self.engine.cancel(name)])

    def stats(self, events_after: int | None = 0, most_waiting: int | None = None) -> dict[str, Any]:
        """As `Engine.stats`, with `healthy` and `state`."""
        return {**self.engine.stats(events_after, most_waiting), "healthy": self.healthy, "state": self.state}

    def close(self) -> None:
        """Ends the thread after the step in hand; open requests get an `abort`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def _begin(self, request: Request, mailbox: Mailbox) -> None:
        if not self._send(lambda: self._submit(request, mailbox), mailbox):
            raise self._stopped()

    def _stopped(self) -> EngineError:
        return EngineError(f"the engine has stopped: {self._failure or 'it was closed'}")

    def _send(self, command: Callable[[], object], mailbox: Mailbox | None = None) -> bool:
        """Leaves a command for the engine's thread; False = it has stopped. `mailbox` hears of it if it stops first."""
        with self._wake:
            if not self._closing:
                self._commands.append((command, mailbox))
                self._wake.notify()
            return not self._closing

    def _ask(self, command: Callable[[], T]) -> T:
        """What a command returns, once the engine's thread has carried it out."""
        answer: Future[T] = Future()
        if not self._send(lambda: answer.set_result(command())):
            raise self._stopped()
        while True:
            try:
                return answer.result(_POLL_SECONDS)
            except TimeoutError:
                if not self.healthy:
                    raise self._stopped() from None

    def _submit(self, request: Request, mailbox: Mailbox) -> None:
        with self._wake:
            if request not in self._reserved:  # its reader has left meanwhile
                return
            self._reserved.remove(request)
            try:
                self.engine.submit(request)
            except EngineError as error:
                post([(mailbox, error)])
                return
        self._open[request.id] = (request, mailbox)

    def _leave(self, request: Request, why: str | None) -> None:
        with self._wake:
            if request in self._reserved:
                self._reserved.remove(request)
            else:
                self._send(lambda: self._end(request, why))

    def _end(self, request: Request, why: str | None) -> None:
        """Ends a request nobody listens to any more; not another one that has taken its id."""
        if request.id not in self._open or self._open[request.id][0] is not request:
            return
        if why is not None or not self.engine.finish(request.id):
            self.engine.cancel(request.id, why or LEFT)

    def _run(self) -> None:
        try:
            self.engine.warm_up()
            self._warm = True
            while self._wait():
                self._deliver(self.engine.step())
        except BaseException as error:  # the outermost frame: whatever it is, everyone waiting must hear of it
            # A panic in Rust, for one, is no Exception.
            _logger.exception("the engine has crashed")
            self._failure = f"{type(error).__name__}: {error}"
        self._stop()

    def _wait(self) -> bool:
        """Waits for work and carries out commands; False = close."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._commands or self.engine.has_work)
            if self._closing:
                return False
        while self._commands:
            self._commands[0][0]()
            # Only now: whoever sent a command that fails, or one after it, is still there to be told.
            self._commands.popleft()
        return True

    def _deliver(self, outputs: Sequence[StepOutput]) -> None:
        post([(self._open[output.request_id][1], output) for output in outputs if output.request_id in self._open])
        for output in outputs:
            if output.finish_reason is not None:
                self._open.pop(output.request_id, None)

    def _stop(self) -> None:
        with self._wake:
            self._closing = True
            unheard = [mailbox for _, mailbox in self._commands if mailbox is not None]
        reason = "abort" if self._failure is None else "error"
        post([(mailbox, self._stopped()) for mailbox in unheard])
        post([(mailbox, StepOutput.of(request, [], reason, self._failure)) for request, mailbox in self._open.values()])
        for name in self._open if self._failure is None else ():
            self.engine.cancel(name, "engine closed")
        self._open.clear()
