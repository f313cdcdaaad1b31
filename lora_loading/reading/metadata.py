"""What a file says of itself: PEFT's settings, which scale its factors, the base model, and its trigger words.

    lora_adapter_metadata       {"transformer.r": 16, "transformer.lora_alpha": 32, ...}   diffusers' pipelines
    lora_adapter_metadata       {"r": 16, "lora_alpha": 32, ...}                            diffusers' save_lora_adapter
    adapter_config.json         {"r": 16, "lora_alpha": 32, ...}, a file beside it          PEFT
    modelspec.architecture      "flux-1-dev/lora"                                           kohya, OneTrainer
    ss_base_model_version       "flux1"                                                     kohya, ai-toolkit
    modelspec.trigger_phrase    "TOK"
    ss_tag_frequency            {"10_ohwx man": {"ohwx man": 10, "smiling": 3}}             kohya
    ss_network_args, ...        not read: kohya's files hold every alpha as a tensor

All of it was written by a stranger: an entry that cannot be read counts as absent, and texts are shortened. Two things
are refused: a pattern that cannot be read, since without it the strength would be another one, and an initialisation
that changed the base model's weights, since the file does not hold that change.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from errors import LoraFormatError
from lora_loading.reading.patterns import Pattern, PatternError
from lora_loading.shapes import COMPONENTS, TRANSFORMER

MAX_WORDS = 4
MAX_WORD = 80
MAX_PATTERNS = 2000
WITHOUT_PATTERNS = {
    "alpha_pattern": "Save it with an alpha tensor for each layer.",
    "rank_pattern": "Save it with one rank for all layers.",
}
"""What helps where a pattern cannot be read."""
NEUMANN_TERMS = 5
"""PEFT's default for OFT."""
CHANGED_BASE = re.compile(r"(?:pissa|corda).*|olora|loftq|lora_ga")
"""Values of `init_lora_weights` with which PEFT changes the base model's weights before the training. Source: PEFT,
`tuners.lora.layer`: those of its methods `..._init` that write to `get_base_layer().weight`.
"""
PHRASES = ("modelspec.trigger_phrase", "trigger_phrase", "trigger_words", "trained_words", "trigger_word")
BASE_MODEL = ("modelspec.architecture", "ss_base_model_version")

Numbers = tuple[tuple[Pattern, float], ...]
"""A number for the layers whose names a pattern matches."""


@dataclass(frozen=True)
class PeftSettings:
    """The part of a configuration of PEFT's that decides what a layer's tensors do."""

    lora_alpha: float | None = None
    alpha_pattern: Numbers = field(default=())
    r: float | None = None
    """LoKr: PEFT's rank, by which it divides alpha even where no tensor has that size."""
    rank_pattern: Numbers = field(default=())
    use_rslora: bool = False
    neumann_terms: int | None = NEUMANN_TERMS
    """OFT: how many terms of the series replace the exact rotation, None for the exact one."""
    given: bool = False
    """Whether a configuration was there to read."""

    def scale(self, names: tuple[str, ...], rank: int) -> float | None:
        """alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA; None where nothing is said.

        As in PEFT, the first pattern counts that matches one of the module's names.

        Args:
            names: what the settings may call the layer.
            rank: that of the tensors; 0 if they have none, as two whole matrices of LoKr: then PEFT's own counts.
        """
        alpha = _first(self.alpha_pattern, names, self.lora_alpha)
        divisor = rank or _first(self.rank_pattern, names, self.r)
        if alpha is None or divisor is None or divisor < 1:
            return None
        return alpha / math.sqrt(divisor) if self.use_rslora else alpha / divisor


def _first(numbers: Numbers, names: tuple[str, ...], otherwise: float | None) -> float | None:
    """The number of the first pattern that matches one of the names."""
    return next((number for pattern, number in numbers if any(map(pattern.matches, names))), otherwise)


def peft_settings(metadata: Mapping[str, str], component: str) -> PeftSettings:
    """PEFT's settings of a component as diffusers saves them; nothing is said where there are none.

    The pipelines write a component's name before each entry. A transformer's own `save_lora_adapter` writes none.

    Raises:
        LoraFormatError: see `peft_config`.
    """
    notes = _json(metadata.get("lora_adapter_metadata"))
    if not any(key.startswith(tuple(f"{name}." for name in COMPONENTS)) for key in notes):
        notes = {f"{TRANSFORMER}.{key}": value for key, value in notes.items()}
    return peft_config({k.removeprefix(f"{component}."): v for k, v in notes.items() if k.startswith(f"{component}.")})


def peft_config(config: Mapping[str, Any]) -> PeftSettings:
    """The settings of one configuration of PEFT's, such as its `adapter_config.json`.

    Raises:
        LoraFormatError: a pattern cannot be read, or the adapter belongs to base weights that PEFT changed.
    """
    _expect_unchanged_base(config)
    # ranks of other kinds are those of their tensors, whether or not their patterns can be read
    ranks = config if config.get("peft_type") in (None, "LOKR") else {}
    terms = _number(config.get("num_cayley_neumann_terms"))
    return PeftSettings(
        lora_alpha=_number(config.get("lora_alpha", config.get("alpha"))),
        alpha_pattern=_numbers(config, "alpha_pattern"),
        r=_number(ranks.get("r")),
        rank_pattern=_numbers(ranks, "rank_pattern"),
        use_rslora=config.get("use_rslora") is True,
        neumann_terms=None if config.get("use_cayley_neumann") is False else min(int(terms or NEUMANN_TERMS), 64),
        given=bool(config),
    )


def config_from(text: str) -> PeftSettings | None:
    """The settings in the text of an `adapter_config.json`; None if it is empty or cannot be read.

    Raises:
        LoraFormatError: see `peft_config`.
    """
    config = _json(text)
    return peft_config(config) if config else None


def _expect_unchanged_base(config: Mapping[str, Any]) -> None:
    """Refuse an adapter of PiSSA and its kin: its factors begin at B0 A0, and the base that it fits is W - B0 A0."""
    init = config.get("init_lora_weights")
    if isinstance(init, str) and CHANGED_BASE.fullmatch(init.lower()):
        raise LoraFormatError(
            f'its init_lora_weights is "{init[:80]}", so it belongs to base weights that PEFT changed before the '
            "training. Convert it with PEFT, save_pretrained(..., path_initial_model_for_weight_conversion=...), "
            "or train it with init_lora_weights=True."
        )


def _numbers(config: Mapping[str, Any], name: str) -> Numbers:
    """What a setting by patterns says; entries that are no numbers are left out."""
    patterns = config.get(name)
    found = [
        (str(pattern), number)
        for pattern, value in (patterns.items() if isinstance(patterns, dict) else ())
        if (number := _number(value)) is not None
    ]
    if len(found) > MAX_PATTERNS:
        many = f"its {name} has {len(found)} entries, more than {MAX_PATTERNS}"
        raise LoraFormatError(f"{many}. {WITHOUT_PATTERNS[name]}")
    return tuple((_pattern(expression, name), number) for expression, number in found)


def _pattern(expression: str, name: str) -> Pattern:
    try:
        return Pattern(expression)
    except PatternError as error:
        raise LoraFormatError(
            f'its {name} has "{expression[:80]}", which cannot be read: {error}. {WITHOUT_PATTERNS[name]}'
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
    """A finite number as a float; None for anything else, and for an integer beyond all floats."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
