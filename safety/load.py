"""Which checker runs, and loading it: self-tested, and behind the guard that fails closed.

If the chosen checker cannot be loaded, setup fails; no other checker takes its place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import torch

from errors import SettingsError
from safety import open_nsfw, pair, strict
from safety.checker import FailClosed, SafetyChecker
from safety.manifest import Weights

logger = logging.getLogger(__name__)

CHECKERS: Mapping[str, Callable[[Weights, torch.device], SafetyChecker]] = {
    "embedded": open_nsfw.load,
    "reference": pair.load,
    "strict": strict.load,
}
"""By the values of FLUX_SAFETY; a loader returns a checker that passed its self-test."""
AUTO = {"full": "reference", "tiny": "embedded"}
"""The checker of each profile, where the operator chose none."""


def choose_checker(wanted: str, profile: str) -> tuple[str, str]:
    """The checker to run and the reason in words.

    Args:
        wanted: the operator's setting: a checker's name, or "auto".
        profile: "full" or "tiny".

    Raises:
        SettingsError: there is no such checker.
    """
    if wanted == "auto":
        return AUTO[profile], f"FLUX_SAFETY is auto and the profile is {profile}"
    if wanted not in CHECKERS:
        raise SettingsError(f'FLUX_SAFETY is "{wanted}". Set it to one of auto, {", ".join(CHECKERS)}.')
    return wanted, "set by FLUX_SAFETY"


def load_checker(name: str, weights: Weights, device: torch.device) -> FailClosed:
    """Return the checker of this name, self-tested and guarded.

    Args:
        name: one of `CHECKERS`.
        weights: where weight files come from.
        device: where it runs, if it can use one.

    Raises:
        SettingsError: weights are missing, altered or incomplete, or the self-test fails.
    """
    started = time.monotonic()
    checker = CHECKERS[name](weights, device)
    logger.info("safety checker %s loaded and self-tested in %.1f s", name, time.monotonic() - started)
    return FailClosed(checker)
