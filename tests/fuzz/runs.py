"""Runs one subject: a limit of time for each input, a limit of memory for the process."""

from __future__ import annotations

import faulthandler
import resource
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.subjects import SUBJECTS

SECONDS_EACH = 5.0
MORE_BYTES = 2**30
"""What a subject may take beyond what its process has once it is open."""


@dataclass
class Found:
    """What a run of one subject came to."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    slowest: int = 0
    seconds: float = 0.0
    grown_bytes: int = 0
    """How much more memory the process took at its peak than when the subject was open."""
    faults: list[str] = field(default_factory=list)


class HangError(BaseException):
    """One input took too long."""


def peak_bytes() -> int:
    """The most memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def data_bytes() -> int:
    """The private writable memory of this process, as RLIMIT_DATA counts it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmData:")[2].split()[0]) * 1024


def on_alarm(*_: object) -> None:
    """End an input that takes too long."""
    raise HangError


def run(name: str, count: int, first: int = 0) -> Found:
    """Run `count` inputs of a subject, each under a limit of time, all under a limit of memory."""
    found = Found(name)
    signal.signal(signal.SIGALRM, on_alarm)
    opened = SUBJECTS[name][0]
    with opened() as attempt:
        attempt(first)  # what the first call imports and allocates is no growth
        before, started = peak_bytes(), time.monotonic()
        limit = data_bytes() + MORE_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
        for number in range(first, first + count):
            began = time.monotonic()
            faulthandler.dump_traceback_later(12 * SECONDS_EACH, exit=True)
            signal.setitimer(signal.ITIMER_REAL, SECONDS_EACH)
            try:
                found.outcomes[attempt(number)] += 1
            except BaseException as fault:
                found.faults.append(f"{number}: {type(fault).__name__}: {fault}"[:300])
                if isinstance(fault, KeyboardInterrupt):
                    raise
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if (took := time.monotonic() - began) > found.slowest_seconds:
                found.slowest_seconds, found.slowest = took, number
        faulthandler.cancel_dump_traceback_later()
        found.seconds, found.grown_bytes = time.monotonic() - started, peak_bytes() - before
    return found
