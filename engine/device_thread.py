"""One long-lived thread that does all of the models' work on the device, for whichever thread asks.

Cog predicts in changing threads, and libraries keep things for each thread: cuDNN its plans for each shape, cuBLAS its
handles and workspaces, OpenMP on a CPU its team of threads. A new thread would pay for them at each prediction.

Cog cancels by raising an exception in the thread that predicts, at its next Python instruction. That thread waits here,
in short slices. What it waits for is then ended in the same way, and has ended before the exception goes on: it never
works on while the next prediction begins. Exceptions come through as they are, and context variables are the caller's,
so that Cog's server finds the prediction that a log line belongs to.

Knows no models. A check of an image, which may hang, has a thread of its own: see `safety.checker`.
"""

from __future__ import annotations

import contextvars
import ctypes
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from fetching.deadline import SLICE_SECONDS

T = TypeVar("T")
END: Any = object()
"""Comes after the last item of an iterator."""


class Unwanted(BaseException):
    """Raised in the device's thread when nobody waits for its work any more."""


class DeviceThread:
    """The thread; it starts at the first call and ends with the process, or when nothing refers to this object."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._adopted: int | None = None

    @classmethod
    def current(cls) -> DeviceThread:
        """The thread that calls this, in place of a new one: torch's modes, for one, hold in a single thread."""
        thread = cls()
        thread._adopted = threading.get_ident()
        return thread

    def run(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, and raise what it raises, as it is; both happen in the device's thread.

        An exception that is raised in the calling thread meanwhile ends the work first.
        """
        if self._adopted is not None:
            return work()
        job = _Job(work)
        done = self._executor.submit(job.perform)
        try:
            while not done.done():
                wait([done], SLICE_SECONDS)
        finally:
            if not done.done():
                job.end()
                while not done.done():
                    wait([done], SLICE_SECONDS)
        result: T = job.result()
        return result

    def iterate(self, begin: Callable[[], Iterator[T]]) -> Generator[T, None, None]:
        """Yield what the iterator of `begin` yields; it is advanced, and closed, in the device's thread.

        Nothing is worked out ahead. Close the generator, or use it up: what it holds is then given back at once.
        """
        items = begin()
        try:
            while (item := self.run(lambda: next(items, END))) is not END:
                yield item
        finally:
            self.run(getattr(items, "close", lambda: None))


class _Job:
    """A piece of work: performed in one thread, and ended by another."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._context = contextvars.copy_context()
        self._outcome: Future[Any] = Future()
        self._turn = threading.Lock()
        self._thread: int | None = None
        """The thread's number, while an exception may be raised in it."""
        self._unwanted = False

    def result(self) -> Any:  # noqa: ANN401 - the work's own type
        """What the work returned; raises what it raised. Once."""
        outcome, self._outcome = self._outcome, Future()  # a traceback leads here, and may not lead to its exception
        try:
            return outcome.result()
        finally:
            del outcome

    def perform(self) -> None:
        """Do the work; raises nothing."""
        try:
            self._perform()
        except Unwanted as late:  # it landed when the work had failed by itself
            self._outcome.set_exception(late)

    def _perform(self) -> None:
        try:
            self._open()
            result = self._context.run(self._work)
            self._close()
        except BaseException as error:  # whatever it is, the waiting thread must get it
            self._close()
            self._outcome.set_exception(error)
            del error
        else:
            self._outcome.set_result(result)

    def _open(self) -> None:
        with self._turn:
            if self._unwanted:
                raise Unwanted
            self._thread = threading.get_ident()

    def _close(self) -> None:
        """From here on nothing is raised in this thread; what was raised before lands at the end of this block."""
        with self._turn:
            self._thread = None

    def end(self) -> None:
        """Raise `Unwanted` in the thread that performs this, at its next Python instruction; once."""
        with self._turn:
            if self._thread is not None and not self._unwanted:
                number, error = ctypes.c_ulong(self._thread), ctypes.py_object(Unwanted)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(number, error)
            self._unwanted = True
