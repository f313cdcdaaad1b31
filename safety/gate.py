"""The gate: each image is checked while the next one is generated, and only images that pass go through."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from PIL import Image

from errors import UnsafeOutputError
from safety.checker import FailClosed, Pending, Verdict

logger = logging.getLogger(__name__)


class Gate:
    """Checks and counts the images of one prediction."""

    def __init__(self, checker: FailClosed) -> None:
        self._checker = checker
        self.checked = 0
        self.withheld = 0
        self.failed = 0
        """How many images are withheld because their check failed."""
        self.seconds = 0.0
        """What all checks took together, mostly while the next image was generated."""

    def passing(self, images: Iterable[Image.Image]) -> Iterator[tuple[int, Image.Image]]:
        """Yield the index and the image of each that passes, in order; log the others and drop them.

        Pipelined: image n is yielded while image n+1 is being generated.
        """
        before: tuple[int, Image.Image, Pending] | None = None
        for index, image in enumerate(images):
            pending = self._checker.begin([image])
            if before is not None and self._passes(before[0], before[2]):
                yield before[:2]
            before = (index, image, pending)
        if before is not None and self._passes(before[0], before[2]):
            yield before[:2]

    def _passes(self, index: int, pending: Pending) -> bool:
        answer = self._checker.finish(pending)
        (verdict,) = answer.verdicts
        self.checked += 1
        self.seconds += answer.seconds
        if verdict.flagged:
            self._withhold(index, verdict)
        return not verdict.flagged

    def _withhold(self, index: int, verdict: Verdict) -> None:
        self.withheld += 1
        self.failed += verdict.failed
        logger.warning("image %d withheld by %s: %s", index, self._checker.name, verdict)

    def require_one(self) -> None:
        """Raise unless an image passed.

        Raises:
            UnsafeOutputError: all were withheld.
        """
        if self.checked and self.withheld == self.checked:
            raise UnsafeOutputError(_advice(self.withheld, self.failed))


def _advice(withheld: int, failed: int) -> str:
    """The message; clients of other FLUX predictors look for the words "NSFW content" in it."""
    which = "The image was" if withheld == 1 else f"All {withheld} images were"
    if failed:
        return (
            f"{which} withheld: the check for NSFW content could not be completed for {failed} of {withheld}. "
            "Try again; if it happens again, whoever runs this server finds the cause in its log."
        )
    advice = "Change the prompt, try another seed, or use another LoRA."
    return f"{which} withheld by the safety checker as NSFW content. {advice}"
