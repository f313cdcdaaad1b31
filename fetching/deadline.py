"""Deadlines for network work, and waiting for it in a way that a cancellation can interrupt.

Cog cancels a prediction by raising an exception in its thread at the next Python instruction. A thread inside the
system's getaddrinfo, connect or recv does not reach one. Blocking work therefore runs in a thread of its own, and the
prediction's thread waits for it in short slices.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

SLICE_SECONDS = 0.1
"""The longest that a cancellation waits for a waiting thread."""
T = TypeVar("T")


class Deadline:
    """The moment by which some work must end. Shared between threads; `expire` moves it to now."""

    def __init__(self, seconds: float, outer: Deadline | None = None) -> None:
        """`outer` is a deadline that holds too, such as the one of the whole download."""
        self._started = time.monotonic()
        self._end = self._started + seconds
        self._outer = outer
        self._expired = threading.Event()

    def left(self) -> float:
        """Seconds that are left; 0 once it has passed."""
        if self._expired.is_set():
            return 0.0
        left = max(0.0, self._end - time.monotonic())
        return left if self._outer is None else min(left, self._outer.left())

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def expire(self) -> None:
        """Let all work under this deadline end now."""
        self._expired.set()

    def require(self) -> None:
        """Raise if it has passed.

        Raises:
            TimeoutError: it has.
        """
        if not self.left():
            raise TimeoutError

    def pause(self, seconds: float) -> None:
        """Sleep, unless that would outlast the deadline.

        Raises:
            TimeoutError: it would, or the deadline was moved to now meanwhile.
        """
        if seconds >= self.left() or self._expired.wait(seconds):
            raise TimeoutError


def run_until(deadline: Deadline, work: Callable[[], T], abort: Callable[[], None]) -> T:
    """Return what `work` returns, run in a thread of its own; raise what it raises.

    Args:
        deadline: moved to now when the wait ends early, so that `work` can see that nobody waits for it.
        work: may block. Its thread is abandoned when the wait ends early, and must end soon by itself.
        abort: wakes `work`; called when the wait ends early.

    Raises:
        TimeoutError: the deadline has passed.
    """
    future: Future[T] = Future()
    threading.Thread(target=_run, args=(future, work), name="network", daemon=True).start()
    try:
        while not future.done():
            deadline.require()
            wait([future], timeout=min(SLICE_SECONDS, deadline.left()))
        return future.result()
    finally:
        if not future.done():
            deadline.expire()
            abort()


def _run(future: Future[T], work: Callable[[], T]) -> None:
    try:
        result = work()
    except BaseException as error:  # whatever it is, the waiting thread must get it
        future.set_exception(error)
    else:
        future.set_result(result)
