"""The threads of dynamic batching: several decode, one calls the model.

All that is decided is decided in `queue` and `policy`. Here are the lock, the waiting, and the
futures. The threads start with the first request, and end with `close` or with the last reference
to the batcher.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from threading import Condition, RLock, Thread, current_thread
from typing import Any

from marnet_sdk.cpus import cpus
from marnet_sdk.errors import ClassifierClosed, InferenceError
from marnet_sdk.process import lock_free_in_children
from marnet_sdk.serve.policy import Batching, Decision, Waiting
from marnet_sdk.serve.queue import BatchingStats, Queue, passed

Prepare = Callable[[Any], Any]  # an image to what the model takes
# A kind, prepared images that are run as it, and what each asks for -> an answer or error of each.
Run = Callable[[Any, Sequence[Any], Sequence[Any]], Sequence[Any]]
Known = Sequence[tuple[Hashable, int, float]]  # a kind, the size of a batch, and its seconds
_starting = lock_free_in_children()


@dataclass(eq=False, slots=True)
class Request(Waiting):
    """A request with all that answers it."""

    image: Any
    ask: Any
    future: Future[Any]
    keeps: object  # lives until the request is answered
    pixels: Any = None

    @property
    def cancelled(self) -> bool:
        """Tell whether the caller has cancelled it."""
        return self.future.cancelled()


class Batcher:
    """Answers requests of many threads in batches.

    In a forked child it begins anew, with threads of its own; requests of the parent are answered
    there.
    """

    def __init__(
        self,
        prepare: Prepare,
        run: Run,
        knobs: Batching,
        known: Known = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start nothing yet.

        Args:
            prepare: called in several threads at once.
            run: called in one thread, with requests of the same kinds.
            known: how long batches take, as far as that is known before.
        """
        self._how = prepare, run, knobs, known, clock
        self._numbers = count()
        self._threads: _Threads | None = None
        self._closed = False

    def submit(
        self,
        image: Any,
        ask: Any,
        kinds: tuple[Hashable, ...],
        *,
        deadline: float | None = None,
        priority: int = 0,
        keeps: object = None,
    ) -> Future[Any]:
        """Accept a request.

        Args:
            ask: goes to `run` with the prepared image.
            kinds: how it may be run, the best first.
            deadline: seconds from now.
            keeps: an object that must live until the request is answered.

        Raises:
            QueueFull, DeadlineExceeded: it is refused.
            ClassifierClosed: after `close`.
        """
        threads = self._started()
        until = math.inf if deadline is None else threads.clock() + deadline
        future: Future[Any] = Future()
        request = Request(
            *(next(self._numbers), priority, until, kinds, image, ask, future), keeps=keeps
        )
        threads.accept(request)
        return future

    def close(self) -> None:
        """Accept nothing more, answer what was accepted, and end the threads.

        A thread of the batcher itself, in a callback of a future, does not wait for that.
        """
        with _starting:
            self._closed, threads = True, self._threads
        if threads is not None:
            threads.close()

    def stats(self) -> BatchingStats:
        """Describe the queue, and what happened until now."""
        threads = self._threads
        if threads is None or threads.process != os.getpid():
            return BatchingStats()
        return threads.stats()

    def _started(self) -> _Threads:
        threads = self._threads
        if threads is not None and threads.process == os.getpid():
            return threads
        with _starting:
            if self._closed:
                raise _closed()
            if self._threads is None or self._threads.process != os.getpid():
                self._threads = _Threads(*self._how)
                # Not at exit: a thread may be held there for ever.
                weakref.finalize(self, self._threads.close).atexit = False
            return self._threads


class _Threads:
    """The threads and what they share. They hold it, and nothing of it holds the `Batcher`."""

    def __init__(
        self,
        prepare: Prepare,
        run: Run,
        knobs: Batching,
        known: Known,
        clock: Callable[[], float],
    ) -> None:
        self.process, self.clock = os.getpid(), clock
        self._prepare, self._run = prepare, run
        self._queue: Queue[Request] = Queue(knobs)
        for kind, size, seconds in known:
            self._queue.learn(kind, size, seconds)
        # Reentrant, as garbage may be collected, and a batcher with it, while it is held.
        self._lock = RLock()
        self._to_decode, self._to_run = Condition(self._lock), Condition(self._lock)
        self._idle_decoders = 0
        self._enough = 0  # ready requests that wake the worker; 0: it is not asleep
        decoders = knobs.decoders or cpus().threads
        works = [(f"marnet-decoder-{i}", self._decode_one) for i in range(decoders)]
        works.append(("marnet-batches", self._run_one))
        self._threads = [
            Thread(target=self._repeat, args=(work,), name=name, daemon=True)
            for name, work in works
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError:  # the system gives no more threads
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self.close()
            raise

    def accept(self, request: Request) -> None:
        """Take a request in, or refuse it."""
        try:
            with self._lock:
                if self._queue.closing:
                    raise _closed()
                self._queue.accept(request, self.clock())
                if self._idle_decoders:
                    self._to_decode.notify()
        finally:
            self._tell_dropped()

    def close(self) -> None:
        """Answer what was accepted, and end."""
        if self.process != os.getpid():
            return  # of the parent, where its threads are
        with self._lock:
            self._queue.closing = True
            self._to_decode.notify_all()
            self._to_run.notify_all()
        if current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()

    def stats(self) -> BatchingStats:
        with self._lock:
            return self._queue.stats(self.clock())

    def _repeat(self, work: Callable[[list[Request]], bool]) -> None:
        """Work until nothing is left.

        Errors of requests are theirs. Any other, such as a lack of memory, is reported as that of
        a thread, and what this thread has and what waits fail with it.
        """
        mine: list[Request] = []  # what is neither in the queue nor finished
        while True:
            try:
                if not work(mine):
                    return
            except BaseException as error:
                _report(error)
                self._fail_all(mine, error)
            mine.clear()

    def _fail_all(self, mine: Sequence[Request], error: BaseException) -> None:
        failure = _failure(error)
        with self._lock:
            waiting = self._queue.clear(mine)
        for request in dict.fromkeys((*mine, *waiting)):
            future = request.future
            if future.running() or (not future.done() and future.set_running_or_notify_cancel()):
                _finish(request, failure)

    # --- decoding

    def _decode_one(self, mine: list[Request]) -> bool:
        """Decode one image; False: none comes any more."""
        with self._lock:
            mine += self._wait_for_an_image()
        self._tell_dropped()
        if not mine:
            return not (self._queue.closing and self._queue.all_decoded)
        (request,) = mine
        pixels = _attempt(self._prepare, request.image)
        usable = not isinstance(pixels, _Failure)
        if usable:
            request.pixels, request.image = pixels, None
        with self._lock:
            self._queue.decoded(request, self.clock(), usable=usable)
            urgent = request.deadline < math.inf or self._queue.closing
            if self._enough and (urgent or self._queue.ready >= self._enough):
                self._to_run.notify()
        if not usable and request.future.set_running_or_notify_cancel():
            _finish(request, pixels)
        # The traceback of an error leads here, and this would lead back to the error.
        del request, pixels
        return True

    def _wait_for_an_image(self) -> Sequence[Request]:
        """Wait for the next; none: some were dropped, or all is decoded and no others come."""
        while (request := self._queue.next_to_decode(self.clock())) is None:
            if self._queue.dropped or (self._queue.closing and self._queue.all_decoded):
                return ()
            self._idle_decoders += 1
            try:
                self._to_decode.wait()
            finally:
                self._idle_decoders -= 1
        return (request,)

    # --- the model

    def _run_one(self, mine: list[Request]) -> bool:
        """Run one batch; False: nothing is left, and nothing comes."""
        with self._lock:
            if (decision := self._wait_for_a_batch()) is None:
                return False
            mine += decision.release
            if not self._queue.all_decoded:
                self._to_decode.notify_all()  # fewer are ready now
        self._tell_dropped()
        batch = [request for request in mine if request.future.set_running_or_notify_cancel()]
        with self._lock:
            self._queue.cancelled(len(mine) - len(batch))
            if batch:
                assert decision.reason is not None
                self._queue.begin(batch, decision.kind, decision.reason, self.clock())
        if batch:
            self._answer(batch, decision.kind)
        del batch, decision  # as above
        return True

    def _wait_for_a_batch(self) -> Decision[Request] | None:
        while True:
            now = self.clock()
            decision = self._queue.look(now)
            if decision.release or decision.expired:
                return decision
            if self._queue.done:
                return None
            self._enough = decision.enough
            try:
                never = decision.again == math.inf
                self._to_run.wait(None if never else max(0.0, decision.again - now))
            finally:
                self._enough = 0

    def _answer(self, batch: Sequence[Request], kind: Hashable) -> None:
        started = self.clock()
        got = _attempt(self._run, kind, [r.pixels for r in batch], [r.ask for r in batch])
        now = self.clock()
        answers = [got] * len(batch) if isinstance(got, _Failure) else got
        failed = sum(isinstance(answer, _Failure | BaseException) for answer in answers)
        with self._lock:
            self._queue.end(batch, kind, now - started, now, failed=failed)
        for request, answer in zip(batch, answers, strict=True):
            _finish(request, answer)
        batch = got = answers = request = answer = ()  # as above

    def _tell_dropped(self) -> None:
        """Fail those whose deadline passed; whoever waits for a cancelled one is told of it."""
        if not self._queue.dropped:
            return
        with self._lock:
            dropped = self._queue.take_dropped()
        for request in dropped:
            if request.future.set_running_or_notify_cancel():
                _finish(request, passed(request.deadline - request.accepted))


@dataclass(frozen=True)
class _Failure:
    """An error, apart from an answer that happens to be one."""

    error: Exception


def _attempt(call: Callable[..., Any], *arguments: Any) -> Any:
    """The value of a call, or the `_Failure`."""
    try:
        return call(*arguments)
    except BaseException as error:
        return _failure(error)


def _failure(error: BaseException) -> _Failure:
    """An error as a future may hold it.

    What would end a thread or a process, as SystemExit, must not end the callers who ask futures
    for their results: it becomes an `InferenceError`.
    """
    if isinstance(error, Exception):
        return _Failure(error)
    wrapped = InferenceError(f"the thread that answers was ended by {error!r}; send it again")
    wrapped.__cause__ = error
    return _Failure(wrapped)


def _report(error: BaseException) -> None:
    """Report an error that is no request's, as that of any thread."""
    threading.excepthook(
        threading.ExceptHookArgs((type(error), error, error.__traceback__, current_thread()))
    )


def _finish(request: Request, answer: Any) -> None:
    """Hand an answer or an error over, and let go of all else."""
    future = request.future
    request.image = request.pixels = request.keeps = None
    error = answer.error if isinstance(answer, _Failure) else answer
    try:
        if isinstance(error, BaseException):
            future.set_exception(error)
        else:
            future.set_result(answer)
    except BaseException as escaped:  # of a callback: futures let pass what is no Exception
        _report(escaped)


def _closed() -> ClassifierClosed:
    return ClassifierClosed("this Classifier is closed; open its bundle again")
