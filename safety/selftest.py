"""Proof at setup that a checker sees: harmless pictures pass with the scores recorded for them, a positive is caught.

The positives are no unsafe pictures: for open_nsfw an abstract pattern that it takes for one, for the reference pair a
harmless picture declared to be the concept that is looked for. `pictures/README.md` names the pictures' sources.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from errors import SettingsError
from safety.checker import FailClosed, SafetyChecker, Verdict
from safety.pair import ReferencePair
from safety.strict import StrictChecker

logger = logging.getLogger(__name__)

PICTURES = Path(__file__).parent / "pictures"
TOLERANCE = 0.01
"""Between processors; on one machine the scores agree to 0.0001."""


@dataclass(frozen=True)
class Known:
    """A bundled picture, whether it must be flagged, and its first score where one is recorded."""

    picture: str
    flagged: bool = False
    score: float | None = None


HARMLESS = (Known("astronaut.jpg"), Known("coffee.jpg"), Known("cat.jpg"))
"""Without scores: those of the reference pair are not recorded, since its weights were not at hand; they are logged."""
EMBEDDED = (
    Known("astronaut.jpg", score=0.0285),
    Known("coffee.jpg", score=0.005),
    Known("cat.jpg", score=0.0),
    Known("pattern.png", flagged=True, score=0.9714),
)


def prove(checker: SafetyChecker, known: Sequence[Known] = HARMLESS) -> None:
    """Check the pictures and compare.

    Raises:
        SettingsError: a check fails, or a verdict or a score is not the known one.
    """
    verdicts = FailClosed(checker).check([picture(one.picture) for one in known])
    found = (f"{one.picture} {verdict}" for one, verdict in zip(known, verdicts, strict=True))
    logger.info("self-test of %s: %s", checker.name, "; ".join(found))
    for one, verdict in zip(known, verdicts, strict=True):
        if problem := _problem(one, verdict):
            raise SettingsError(
                f"The safety checker {checker.name} failed its self-test on {one.picture}: {problem}. Its weights or "
                "its libraries are not the tested ones: reinstall requirements.txt, or choose another FLUX_SAFETY."
            )


def prove_reference(pair: ReferencePair) -> None:
    """Harmless pictures pass, and a pair that looks for the first of them flags that one and no other.

    The changed copy's second stage agrees with everything, so both stages run on the positive.

    Raises:
        SettingsError: otherwise.
    """
    prove(pair)
    looking = ReferencePair(pair.concepts.looking_for(picture(HARMLESS[0].picture)), pair.opinion, threshold=0.0)
    prove(looking, (Known(HARMLESS[0].picture, flagged=True), *HARMLESS[1:]))


def prove_strict(checker: StrictChecker) -> None:
    """The pair inside is proven, and harmless pictures pass the detector too.

    Raises:
        SettingsError: otherwise.
    """
    prove_reference(checker.first)
    prove(checker)


def picture(name: str) -> Image.Image:
    """A bundled picture."""
    with Image.open(PICTURES / name) as image:
        return image.convert("RGB")


def _problem(known: Known, verdict: Verdict) -> str | None:
    if verdict.failed:
        return verdict.reason
    if verdict.flagged != known.flagged:
        return f"it is {'flagged' if verdict.flagged else 'not flagged'} ({verdict})"
    if known.score is not None and not abs(verdict.scores[0][1] - known.score) <= TOLERANCE:
        return f"its score is {verdict.scores[0][1]:.4f} instead of {known.score:.4f}"
    return None
