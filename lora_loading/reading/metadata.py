"""What a file says of itself: PEFT's settings, which scale its factors, the base model, and its trigger words.

    lora_adapter_metadata       {"transformer.r": 16, "transformer.lora_alpha": 32, ...}   diffusers
    adapter_config.json         {"r": 16, "lora_alpha": 32, ...}, a file beside it          PEFT
    modelspec.architecture      "flux-1-dev/lora"                                           kohya, OneTrainer
    ss_base_model_version       "flux1"                                                     kohya, ai-toolkit
    modelspec.trigger_phrase    "TOK"
    ss_tag_frequency            {"10_ohwx man": {"ohwx man": 10, "smiling": 3}}             kohya
    ss_network_args, ...        not read: kohya's files hold every alpha as a tensor

All of it was written by a stranger: an entry that cannot be read counts as absent, and texts are shortened. Only a
pattern of alphas that cannot be read is refused, since without it the strength would be another one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from errors import LoraFormatError
from lora_loading.reading.patterns import Pattern, PatternError

MAX_WORDS = 4
MAX_WORD = 80
MAX_PATTERNS = 2000
NEUMANN_TERMS = 5
"""PEFT's default for OFT."""
PHRASES = ("modelspec.trigger_phrase", "trigger_phrase", "trigger_words", "trained_words", "trigger_word")
BASE_MODEL = ("modelspec.architecture", "ss_base_model_version")


@dataclass(frozen=True)
class PeftSettings:
    """The part of a configuration of PEFT's that decides what a layer's tensors do."""

    lora_alpha: float | None = None
    alpha_pattern: tuple[tuple[Pattern, float], ...] = field(default=())
    use_rslora: bool = False
    neumann_terms: int | None = NEUMANN_TERMS
    """OFT: how many terms of the series replace the exact rotation, None for the exact one."""
    given: bool = False
    """Whether a configuration was there to read."""

    def scale(self, names: tuple[str, ...], rank: int) -> float | None:
        """alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA; None where nothing is said.

        As in PEFT, the first pattern counts that matches one of the module's names. The rank is that of the tensors,
        so PEFT's `rank_pattern` has nothing to add.
        """
        matching = (alpha for pattern, alpha in self.alpha_pattern if any(map(pattern.matches, names)))
        alpha = next(matching, self.lora_alpha)
        if alpha is None:
            return None
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def peft_settings(metadata: Mapping[str, str], component: str) -> PeftSettings:
    """PEFT's settings of a component as diffusers saves them; nothing is said where there are none.

    Raises:
        LoraFormatError: a pattern of alphas cannot be read.
    """
    notes = _json(metadata.get("lora_adapter_metadata"))
    return peft_config({k.removeprefix(f"{component}."): v for k, v in notes.items() if k.startswith(f"{component}.")})


def peft_config(config: Mapping[str, Any]) -> PeftSettings:
    """The settings of one configuration of PEFT's, such as its `adapter_config.json`.

    Raises:
        LoraFormatError: a pattern of alphas cannot be read.
    """
    patterns = config.get("alpha_pattern")
    alphas = [
        (str(pattern), number)
        for pattern, value in (patterns.items() if isinstance(patterns, dict) else ())
        if (number := _number(value)) is not None
    ]
    if len(alphas) > MAX_PATTERNS:
        raise LoraFormatError(
            f"its alpha_pattern has {len(alphas)} entries, more than {MAX_PATTERNS}. "
            "Save it with an alpha tensor for each layer."
        )
    terms = _number(config.get("num_cayley_neumann_terms"))
    return PeftSettings(
        lora_alpha=_number(config.get("lora_alpha", config.get("alpha"))),
        alpha_pattern=tuple((_pattern(expression), alpha) for expression, alpha in alphas),
        use_rslora=config.get("use_rslora") is True,
        neumann_terms=None if config.get("use_cayley_neumann") is False else min(int(terms or NEUMANN_TERMS), 64),
        given=bool(config),
    )


def config_from(text: str) -> PeftSettings | None:
    """The settings in the text of an `adapter_config.json`; None if it is empty or cannot be read.

    Raises:
        LoraFormatError: a pattern of alphas cannot be read.
    """
    config = _json(text)
    return peft_config(config) if config else None


def _pattern(expression: str) -> Pattern:
    try:
        return Pattern(expression)
    except PatternError as error:
        raise LoraFormatError(
            f'its alpha_pattern has "{expression[:80]}", which cannot be read: {error}. '
            "Save it with an alpha tensor for each layer."
        ) from error


def base_model(metadata: Mapping[str, str]) -> str:
    """What the file says it was trained on, in the trainer's words; empty where it says nothing."""
    said = (metadata.get(name, "").strip() for name in BASE_MODEL)
    return next((" ".join(text.split())[:MAX_WORD] for text in said if text), "")


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The trigger words that the file names, or else the tags that all its training images have; at most 4."""
    said = next((metadata[name] for name in PHRASES if metadata.get(name)), None)
    if said is not None:
        return _words(said.strip("[]").replace('"', "").split(","))
    counts: dict[str, float] = {}
    for tags in _json(metadata.get("ss_tag_frequency")).values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            counts[tag] = counts.get(tag, 0) + (_number(count) or 0)
    most = max(counts.values(), default=0)
    return _words(tag for tag, count in counts.items() if count == most)


def _words(texts: Any) -> tuple[str, ...]:  # noqa: ANN401 - any iterable of str
    clean = (" ".join("".join(c if c.isprintable() else " " for c in str(text)).split()) for text in texts)
    return tuple(dict.fromkeys(word[:MAX_WORD] for word in clean if word))[:MAX_WORDS]


def _number(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None  # type: ignore[arg-type]


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
