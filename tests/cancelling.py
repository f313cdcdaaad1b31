"""Cog's kind of cancellation: an exception raised in the thread that predicts, at its next Python instruction."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable


class Cancelled(BaseException):
    """What Cog raises in the prediction's thread."""


def cancelled_after(seconds: float, work: Callable[[], object]) -> float:
    """Raise in the thread that works, as Cog does, and return how long it took to get through."""
    ended: list[float] = []
    started = threading.Event()

    def run() -> None:
        started.set()
        try:
            work()
        except Cancelled:
            ended.append(time.monotonic())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait()
    time.sleep(seconds)
    raised = time.monotonic()
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Cancelled))
    thread.join(10)
    assert ended, "the cancellation was not raised within 10 s"
    return ended[0] - raised
