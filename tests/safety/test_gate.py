"""The guard and the gate: whatever goes wrong in a check, its image stays inside."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from PIL import Image

from errors import UnsafeOutputError
from safety.checker import FailClosed, Verdict
from safety.gate import Gate
from safety.load import choose_checker

SAFE = Verdict(flagged=False, scores=(("nsfw", 0.1),))
UNSAFE = Verdict(flagged=True, scores=(("nsfw", 0.9),), reason="the NSFW score reaches 0.4")
Check = Callable[[Sequence[Image.Image]], Any]


class Double:
    """A detector that does what it is told."""

    name = "double"

    def __init__(self, check: Check) -> None:
        self._check = check

    def check(self, images: Sequence[Image.Image]) -> list[Verdict]:
        result: list[Verdict] = self._check(images)
        return result


def by_colour(images: Sequence[Image.Image]) -> list[Verdict]:
    """Red images are unsafe."""
    return [UNSAFE if image.getpixel((0, 0)) == (255, 0, 0) else SAFE for image in images]


def coloured(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), colour) for colour in colours]


def fail(error: BaseException) -> Check:
    def check(images: Sequence[Image.Image]) -> Any:
        raise error

    return check


def scored(*scores: tuple[str, float], flagged: Any = False) -> Check:
    return lambda images: [Verdict(flagged=flagged, scores=scores)] * len(images)


FAULTS: dict[str, Check] = {
    "an exception": fail(RuntimeError("device lost")),
    "out of memory": fail(MemoryError()),
    "the end of the thread": fail(SystemExit()),
    "an interrupt in the thread": fail(KeyboardInterrupt()),
    "a score that is NaN": scored(("nsfw", float("nan"))),
    "a later score that is NaN": scored(("concept", 0.1), ("care", float("nan"))),
    "an infinite score": scored(("nsfw", float("-inf"))),
    "no score": scored(),
    "a flag that is None": scored(("nsfw", 0.1), flagged=None),
    "a flag that is 0": scored(("nsfw", 0.1), flagged=0),
    "one verdict too few": lambda images: [SAFE] * (len(images) - 1),
    "one verdict too many": lambda images: [SAFE] * (len(images) + 1),
    "no verdicts": lambda images: [],
    "None": lambda images: None,
    "a truth instead of a list": lambda images: True,
    "booleans instead of verdicts": lambda images: [False] * len(images),
    "a generator": lambda images: (SAFE for _ in images),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_check_that_fails_withholds_every_image(fault: str) -> None:
    verdicts = FailClosed(Double(FAULTS[fault])).check(coloured("white", "white"))
    assert [(verdict.flagged, verdict.failed) for verdict in verdicts] == [(True, True)] * 2


def test_sound_verdicts_are_passed_on_unchanged() -> None:
    assert FailClosed(Double(by_colour)).check(coloured("white", "red", "blue")) == [SAFE, UNSAFE, SAFE]


def test_an_unsound_verdict_withholds_its_own_image_only() -> None:
    broken = Verdict(flagged=False, scores=(("nsfw", float("nan")),))
    verdicts = FailClosed(Double(lambda images: [SAFE, broken, SAFE])).check(coloured("white", "white", "white"))
    assert [verdict.flagged for verdict in verdicts] == [False, True, False]


def test_no_images_need_no_check() -> None:
    assert FailClosed(Double(fail(RuntimeError()))).check([]) == []


def test_a_check_that_hangs_withholds_its_images_and_those_after_it() -> None:
    release = threading.Event()
    guard = FailClosed(Double(lambda images: [SAFE] if release.wait(30) else []), timeout_seconds=0.05)
    assert guard.check(coloured("white"))[0].failed
    started = time.monotonic()
    assert guard.check(coloured("white"))[0].reason == "an earlier check still hangs"
    assert time.monotonic() - started < 0.05
    release.set()


def test_a_check_that_hung_and_came_back_is_used_again() -> None:
    release = threading.Event()
    guard = FailClosed(Double(lambda images: [SAFE] if release.wait(30) else []), timeout_seconds=0.05)
    guard.check(coloured("white"))
    release.set()
    deadline = time.monotonic() + 10
    while (verdict := guard.check(coloured("white"))[0]).failed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert verdict == SAFE


def test_a_cancellation_while_waiting_reaches_the_caller() -> None:
    class Cancelled(BaseException):
        pass

    def cancel(*_: object) -> None:
        raise Cancelled

    release = threading.Event()
    before = signal.signal(signal.SIGALRM, cancel)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(Cancelled):
            FailClosed(Double(lambda images: [SAFE] if release.wait(30) else [])).check(coloured("white"))
    finally:
        signal.signal(signal.SIGALRM, before)
        release.set()


def test_the_trace_of_a_failed_check_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    FailClosed(Double(fail(RuntimeError("device lost")))).check(coloured("white"))
    assert "device lost" in caplog.text


def test_only_images_that_pass_come_out_with_their_own_index() -> None:
    gate = Gate(FailClosed(Double(by_colour)))
    given = coloured("white", "red", "blue", "red", "green")
    before = [image.tobytes() for image in given]
    passed = list(gate.passing(given))
    assert [index for index, _ in passed] == [0, 2, 4]
    assert [image.tobytes() for _, image in passed] == [before[index] for index in (0, 2, 4)]
    assert (gate.checked, gate.withheld, gate.failed) == (5, 2, 0)


def test_an_image_is_checked_while_the_next_is_made_and_leaves_after_its_verdict() -> None:
    second_is_made = threading.Event()
    checked = []

    def check(images: Sequence[Image.Image]) -> list[Verdict]:
        assert second_is_made.wait(10)
        checked.append(images[0])
        return [SAFE]

    def made() -> Iterator[Image.Image]:
        yield from coloured("white")
        second_is_made.set()
        yield from coloured("blue")

    for _, passed in Gate(FailClosed(Double(check))).passing(made()):
        assert passed in checked


def test_a_failure_while_the_next_is_made_ends_the_prediction() -> None:
    def made() -> Iterator[Image.Image]:
        yield from coloured("white")
        raise ValueError("the model broke")

    with pytest.raises(ValueError, match="the model broke"):
        list(Gate(FailClosed(Double(by_colour))).passing(made()))


def test_the_log_names_a_withheld_image_its_checker_and_the_scores(caplog: pytest.LogCaptureFixture) -> None:
    list(Gate(FailClosed(Double(by_colour))).passing(coloured("white", "red")))
    assert [record.getMessage() for record in caplog.records] == [
        "image 1 withheld by double: the NSFW score reaches 0.4 (nsfw 0.900)"
    ]


def test_all_flagged_is_an_error_with_advice() -> None:
    gate = Gate(FailClosed(Double(by_colour)))
    assert list(gate.passing(coloured("red", "red"))) == []
    with pytest.raises(UnsafeOutputError, match=r"All 2 images were withheld.* as NSFW content.* another seed"):
        gate.require_one()


def test_a_failed_check_does_not_blame_the_prompt() -> None:
    gate = Gate(FailClosed(Double(fail(RuntimeError("secret path /srv")))))
    assert list(gate.passing(coloured("white"))) == []
    with pytest.raises(UnsafeOutputError, match="NSFW content could not be completed") as caught:
        gate.require_one()
    assert "/srv" not in str(caught.value)
    assert gate.failed == 1


def test_one_that_passes_is_enough() -> None:
    gate = Gate(FailClosed(Double(by_colour)))
    list(gate.passing(coloured("red", "white")))
    gate.require_one()


def test_the_seconds_of_the_checks_are_counted() -> None:
    def slow(images: Sequence[Image.Image]) -> list[Verdict]:
        time.sleep(0.02)
        return by_colour(images)

    gate = Gate(FailClosed(Double(slow)))
    list(gate.passing(coloured("white", "white")))
    assert gate.seconds >= 0.04


@pytest.mark.parametrize(
    ("wanted", "profile", "name"),
    [
        ("auto", "full", "reference"),
        ("auto", "tiny", "embedded"),
        ("embedded", "full", "embedded"),
        ("strict", "tiny", "strict"),
        ("reference", "tiny", "reference"),
    ],
)
def test_the_checker_follows_the_setting_or_the_profile(wanted: str, profile: str, name: str) -> None:
    assert choose_checker(wanted, profile)[0] == name
