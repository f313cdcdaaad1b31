"""Verdicts, and the guard that fails closed: no image passes without a valid verdict.

Knows no detector, model or file. A detector may be simple and may raise, hang or return anything: `FailClosed` turns
whatever is not a valid verdict into a withheld image. Failing checks are handled here and nowhere else.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

from PIL import Image

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 60.0
"""Twenty times the 3 s that the slowest detector, strict, takes for an image on one busy CPU core."""


SLICE_SECONDS = 0.1
"""The longest that a cancellation waits for a check; see `fetching.deadline`."""


@dataclass(frozen=True)
class Verdict:
    """What the check of one image found."""

    flagged: bool
    """Whether the image is withheld."""
    scores: tuple[tuple[str, float], ...]
    """What the verdict rests on, by name, for the log."""
    reason: str = ""
    """Why it is withheld, in words; empty for an image that passes."""
    failed: bool = False
    """Whether the image is withheld because the check itself failed."""

    def __str__(self) -> str:
        scores = ", ".join(f"{name} {score:.3f}" for name, score in self.scores)
        return f"{self.reason} ({scores})" if self.reason and scores else self.reason or scores


class SafetyChecker(Protocol):
    """Judges images; never changes them."""

    name: str

    def check(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Return one verdict an image, in order, each with its scores. May raise."""
        ...


@dataclass(frozen=True)
class Answer:
    """The verdicts of one check, and how long its detector took."""

    verdicts: list[Verdict]
    seconds: float = 0.0


@dataclass(frozen=True)
class Pending:
    """A running check."""

    images: tuple[Image.Image, ...]
    answer: Future[Answer] = field(default_factory=Future)


class FailClosed:
    """A checker that always answers with one valid verdict an image; withheld where the detector gave none.

    All checks run in one thread, which stays: cuDNN plans a detector's convolutions anew in each thread. It is not the
    models' thread, since a detector may hang.
    """

    def __init__(self, detector: SafetyChecker, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.name = detector.name
        self._detector = detector
        self._timeout_seconds = timeout_seconds
        self._begun: SimpleQueue[Pending | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._hanging: Pending | None = None

    def check(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Return one verdict an image, in order. Raises nothing but a cancellation."""
        return self.finish(self.begin(images)).verdicts

    def begin(self, images: Sequence[Image.Image]) -> Pending:
        """Start a check in the thread and return at once; checks run one after another."""
        pending = Pending(tuple(images))
        if self._hanging is not None and not self._hanging.answer.done():
            pending.answer.set_result(_all_withheld(pending, "an earlier check still hangs"))
            return pending
        self._hanging = None
        try:
            self._require_thread()
        except RuntimeError as error:  # no further thread can be started
            pending.answer.set_exception(error)
        else:
            self._begun.put(pending)
        return pending

    def _require_thread(self) -> None:
        if self._thread is None:
            given = (self._begun, self._detector)
            thread = threading.Thread(target=_check_all, args=given, name="safety-check", daemon=True)
            thread.start()
            self._thread = thread
            weakref.finalize(self, self._begun.put, None)

    def finish(self, pending: Pending) -> Answer:
        """Wait for a check's answer, at most for the timeout. Raises nothing but a cancellation."""
        deadline = time.monotonic() + self._timeout_seconds
        while not pending.answer.done() and time.monotonic() < deadline:
            wait([pending.answer], timeout=SLICE_SECONDS)
        hangs = not pending.answer.done()
        error = TimeoutError() if hangs else pending.answer.exception()
        if hangs:
            self._hanging = pending
        if error is None:
            return pending.answer.result()
        logger.error("the safety check %s failed, images withheld: %d", self.name, len(pending.images), exc_info=error)
        return _all_withheld(pending, f"the check failed: {type(error).__name__}")


def _check_all(begun: SimpleQueue[Pending | None], detector: SafetyChecker) -> None:
    """Answer all that is begun, until None."""
    while (pending := begun.get()) is not None:
        started = time.monotonic()
        try:
            verdicts = validated(detector.check(pending.images), len(pending.images)) if pending.images else []
        except BaseException as error:  # whatever it is, the waiting caller must get an answer
            pending.answer.set_exception(error)
        else:
            pending.answer.set_result(Answer(verdicts, time.monotonic() - started))
        del pending  # an image is not kept until the next one comes


def _all_withheld(pending: Pending, reason: str) -> Answer:
    return Answer([withheld(reason)] * len(pending.images))


def withheld(reason: str) -> Verdict:
    """The verdict of a check that failed."""
    return Verdict(flagged=True, scores=(), reason=reason, failed=True)


def validated(verdicts: object, count: int) -> list[Verdict]:
    """Return exactly `count` verdicts: the given ones where they are valid, else withheld ones."""
    if not isinstance(verdicts, list) or len(verdicts) != count:
        found = f"{len(verdicts)} verdicts" if isinstance(verdicts, list) else type(verdicts).__name__
        return [withheld(f"the check returned {found} for {count} images")] * count
    return [_validated_one(verdict) for verdict in verdicts]


def _validated_one(verdict: object) -> Verdict:
    if not isinstance(verdict, Verdict) or not isinstance(verdict.flagged, bool):
        return withheld("the check returned no verdict")
    if not verdict.scores:
        return verdict if verdict.flagged else withheld("the check returned no score")
    bad = [name for name, score in verdict.scores if not math.isfinite(score)]
    return withheld(f"the score {bad[0]} is not finite") if bad else verdict
