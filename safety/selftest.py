"""The self-test at setup: harmless images must pass with their recorded scores, and a positive must be flagged.

No unsafe image is needed as a positive: for open_nsfw it is an abstract pattern with a high score, for the pair a
harmless image whose embedding replaces a concept's. `images/README.md` names the images' sources.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from errors import SettingsError
from safety.checker import FailClosed, SafetyChecker, Verdict

logger = logging.getLogger(__name__)

IMAGES = Path(__file__).parent / "images"
TOLERANCE = 0.01
"""Between processors; on one machine scores agree to 0.0001."""


@dataclass(frozen=True)
class Known:
    """A bundled image, whether it must be flagged, and its first score where one is recorded."""

    image: str
    flagged: bool = False
    score: float | None = None


HARMLESS = (Known("astronaut.jpg"), Known("coffee.jpg"), Known("cat.jpg"))
"""Without scores: the pair's are not recorded, since its weights were not available here; the self-test logs them."""


def prove(checker: SafetyChecker, known: Sequence[Known]) -> None:
    """Check the images and compare the verdicts and scores.

    Raises:
        SettingsError: a check fails, or a verdict or a score differs from the known one.
    """
    verdicts = FailClosed(checker).check([bundled_image(one.image) for one in known])
    unrecorded = [f"{one.image} {verdict}" for one, verdict in zip(known, verdicts, strict=True) if one.score is None]
    if unrecorded:
        logger.info("self-test of %s, scores to record: %s", checker.name, "; ".join(unrecorded))
    for one, verdict in zip(known, verdicts, strict=True):
        if problem := _problem(one, verdict):
            raise SettingsError(
                f"The safety checker {checker.name} failed its self-test on {one.image}: {problem}. Its weights or "
                "its libraries are not the tested ones: reinstall requirements.txt, or choose another FLUX_SAFETY."
            )


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
