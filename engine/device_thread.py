"""One long-lived thread that does all of the models' work on the device, for whichever thread asks.

Cog predicts in changing threads, and libraries keep things for each thread: cuDNN its plans for each shape, cuBLAS its
handles and workspaces, OpenMP on a CPU its team of threads. A new thread would pay for them at each prediction.

Cog cancels by raising an exception in the thread that predicts, at its next Python instruction. That thread waits here,
in short slices. What it waits for is then ended in the same way, and has ended before the exception goes on: it never
works on while the next prediction begins. Exceptions come through as they are, and context variables are the caller's,
so that Cog's server finds the prediction that a log line belongs to.

A cancellation may land between any two instructions, inside a library's code too, which would then leave a lock behind
that this thread waits for. So the predicting thread shares nothing with it but locks and queues that are written in C.

Knows no models. A check of an image, which may hang, has a thread of its own: see `safety.checker`.
"""

from __future__ import annotations

import contextvars
import ctypes
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

from fetching.deadline import SLICE_SECONDS

T = TypeVar("T")
END: Any = object()
"""Comes after the last item of an iterator."""


class Unwanted(BaseException):
    """Raised in the device's thread when nobody waits for its work any more."""


class DeviceThread:
    """The thread; it ends with the process, or when nothing refers to this object."""

    def __init__(self, *, adopt: bool = False) -> None:
        """Start a thread, or, with `adopt`, take the calling one: torch's modes, for one, hold in a single thread."""
        self._adopted = adopt
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        if not adopt:
            threading.Thread(target=_perform_all, args=(self._jobs,), name="device", daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)

    def run(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, and raise what it raises, as it is; both happen in the device's thread.

        An exception that is raised in the calling thread meanwhile ends the work first.
        """
        if self._adopted:
            return work()
        job = Job(work)
        self._jobs.put(job)
        try:
            job.wait()
        finally:
            if not job.is_over:
                job.end()
                job.wait()
                job.forget()
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


def _perform_all(jobs: SimpleQueue[Job | None]) -> None:
    """Perform all that is put in, until None."""
    while (job := jobs.get()) is not None:
        job.perform()
        del job  # nothing of it is kept until the next one comes


class Job:
    """A piece of work: performed in one thread, and waited for or ended by another."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._context = contextvars.copy_context()
        self._result: Any = None
        self._error: BaseException | None = None
        self.is_over = False
        self._over = threading.Lock()
        self._over.acquire()
        self._turn = threading.Lock()
        self._thread: int | None = None
        """The thread's number, while an exception may be raised in it."""
        self._unwanted = False

    # By who asked for it

    def wait(self) -> None:
        """Wait until it is over, in slices, between which an exception can land.

        Raises:
            RuntimeError: the process ends, and with it the device's thread.
        """
        while not self._over.acquire(timeout=SLICE_SECONDS):
            if sys.is_finalizing():
                raise RuntimeError("the process ends")

    def end(self) -> None:
        """Raise `Unwanted` in the thread that performs this, at its next Python instruction; once."""
        with self._turn:
            if self._thread is not None and not self._unwanted:
                number, error = ctypes.c_ulong(self._thread), ctypes.py_object(Unwanted)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(number, error)
            self._unwanted = True

    def result(self) -> Any:  # noqa: ANN401 - the work's own type
        """What the work returned; raises what it raised. Once."""
        error, self._error = self._error, None  # a traceback leads here, and may not lead to its exception
        try:
            if error is not None:
                raise error
            return self._result
        finally:
            del error

    def forget(self) -> None:
        """Keep nothing of how it ended."""
        self._result = self._error = None

    # By who performs it

    def perform(self) -> None:
        """Do the work; raises nothing."""
        try:
            self._perform()
        except Unwanted as late:  # it landed when the work had failed by itself
            self._error = late
        finally:
            self.is_over = True
            self._over.release()

    def _perform(self) -> None:
        try:
            self._open()
            self._result = self._context.run(self._work)
            self._close()
        except BaseException as error:  # whatever it is, the waiting thread must get it
            self._close()
            self._error = error

    def _open(self) -> None:
        with self._turn:
            if self._unwanted:
                raise Unwanted
            self._thread = threading.get_ident()

    def _close(self) -> None:
        """From here on nothing is raised in this thread; what was raised before lands at the end of this block."""
        with self._turn:
            self._thread = None
