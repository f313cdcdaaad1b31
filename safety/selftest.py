"""Proof at setup that a checker sees: harmless images pass with the scores recorded for them, a positive is caught.

The positives are no unsafe images: for open_nsfw an abstract pattern that it takes for one, for the reference pair a
harmless image declared to be the concept that is looked for. `images/README.md` names the images' sources.
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

IMAGES = Path(__file__).parent / "images"
TOLERANCE = 0.01
"""Between processors; on one machine the scores agree to 0.0001."""


@dataclass(frozen=True)
class Known:
    """A bundled image, whether it must be flagged, and its first score where one is recorded."""

    image: str
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
    """Check the images and compare.

    Raises:
        SettingsError: a check fails, or a verdict or a score is not the known one.
    """
    verdicts = FailClosed(checker).check([bundled_image(one.image) for one in known])
    found = (f"{one.image} {verdict}" for one, verdict in zip(known, verdicts, strict=True))
    logger.info("self-test of %s: %s", checker.name, "; ".join(found))
    for one, verdict in zip(known, verdicts, strict=True):
        if problem := _problem(one, verdict):
            raise SettingsError(
                f"The safety checker {checker.name} failed its self-test on {one.image}: {problem}. Its weights or "
                "its libraries are not the tested ones: reinstall requirements.txt, or choose another FLUX_SAFETY."
            )


def prove_reference(pair: ReferencePair) -> None:
    """Harmless images pass, and a pair that looks for the first of them flags that one and no other.

    The changed copy's second stage agrees with everything, so both stages run on the positive.

    Raises:
        SettingsError: otherwise.
    """
    prove(pair)
    looking = ReferencePair(pair.concepts.looking_for(bundled_image(HARMLESS[0].image)), pair.opinion, threshold=0.0)
    prove(looking, (Known(HARMLESS[0].image, flagged=True), *HARMLESS[1:]))


def prove_strict(checker: StrictChecker) -> None:
    """The pair inside is proven, and harmless images pass the detector too.

    Raises:
        SettingsError: otherwise.
    """
    prove_reference(checker.first)
    prove(checker)


def bundled_image(name: str) -> Image.Image:
    """A bundled image."""
    with Image.open(IMAGES / name) as image:
        return image.convert("RGB")


def _problem(known: Known, verdict: Verdict) -> str | None:
    if verdict.failed:
        return verdict.reason
    if verdict.flagged != known.flagged:
        return f"it is {'flagged' if verdict.flagged else 'not flagged'} ({verdict})"
    if known.score is not None and not abs(verdict.scores[0][1] - known.score) <= TOLERANCE:
        return f"its score is {verdict.scores[0][1]:.4f} instead of {known.score:.4f}"
    return None
