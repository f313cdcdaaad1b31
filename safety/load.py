"""Which checker runs, and getting it ready: loaded, self-tested, and under the guard. Never another one instead."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import torch

from safety.checker import FailClosed, SafetyChecker
from safety.manifest import Weights
from safety.open_nsfw import load_embedded
from safety.pair import load_reference
from safety.selftest import EMBEDDED, prove, prove_reference, prove_strict
from safety.strict import load_strict

logger = logging.getLogger(__name__)


def choose_checker(wanted: str, profile: str) -> tuple[str, str]:
    """The checker to run and the reason in words.

    Args:
        wanted: the operator's setting: a checker's name, or "auto".
        profile: "full" or "tiny".
    """
    if wanted != "auto":
        return wanted, "FLUX_SAFETY says so"
    if profile == "full":
        return "reference", "FLUX_SAFETY is auto and the profile is full"
    return "embedded", "FLUX_SAFETY is auto and the profile is tiny"


def load_checker(name: str, weights: Weights, device: torch.device) -> FailClosed:
    """Return the checker of this name, self-tested and guarded.

    Args:
        name: one of `LOADERS`.
        weights: where the weight files come from.
        device: where they run; embedded always runs on the CPU.

    Raises:
        SettingsError: weights are missing, altered or incomplete, or the self-test fails.
    """
    started = time.monotonic()
    checker = LOADERS[name](weights, device)
    logger.info("safety checker %s loaded and self-tested in %.1f s", name, time.monotonic() - started)
    return FailClosed(checker)


def _embedded(weights: Weights, device: torch.device) -> SafetyChecker:
    checker = load_embedded()
    prove(checker, EMBEDDED)
    return checker


def _reference(weights: Weights, device: torch.device) -> SafetyChecker:
    pair = load_reference(weights, device)
    prove_reference(pair)
    return pair


def _strict(weights: Weights, device: torch.device) -> SafetyChecker:
    checker = load_strict(weights, device)
    prove_strict(checker)
    return checker


LOADERS: Mapping[str, Callable[[Weights, torch.device], SafetyChecker]] = {
    "embedded": _embedded,
    "reference": _reference,
    "strict": _strict,
}
