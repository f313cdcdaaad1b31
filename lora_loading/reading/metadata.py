"""What a file's own notes say: PEFT's settings, by which its factors are scaled, and the words that trigger it.

    lora_adapter_metadata       {"transformer.r": 16, "transformer.lora_alpha": 32, ...}
    modelspec.trigger_phrase    "TOK"
    ss_tag_frequency            {"10_ohwx man": {"ohwx man": 10, "smiling": 3}}        kohya
    ss_network_args, ...        not read: kohya's files hold every alpha as a tensor

All of it was written by a stranger: a note that cannot be read counts as absent, and texts are shortened.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_WORDS = 4
MAX_WORD = 80
PHRASES = ("modelspec.trigger_phrase", "trigger_phrase", "trigger_words", "trained_words", "trigger_word")


@dataclass(frozen=True)
class PeftSettings:
    """The part of PEFT's LoraConfig that decides the scale of a layer."""

    lora_alpha: float | None = None
    alpha_pattern: tuple[tuple[str, float], ...] = field(default=())
    use_rslora: bool = False

    def scale(self, module: str, rank: int) -> float | None:
        """alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA; None where nothing is said."""
        matching = (alpha for pattern, alpha in self.alpha_pattern if _names(pattern, module))
        alpha = next(matching, self.lora_alpha)
        if alpha is None:
            return None
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def peft_settings(metadata: Mapping[str, str], component: str) -> PeftSettings:
    """PEFT's settings of a component as diffusers saves them; nothing is said where there are none."""
    notes = _json(metadata.get("lora_adapter_metadata"))
    own = {key.removeprefix(f"{component}."): value for key, value in notes.items() if key.startswith(f"{component}.")}
    alpha, patterns = own.get("lora_alpha"), own.get("alpha_pattern")
    return PeftSettings(
        lora_alpha=_number(alpha),
        alpha_pattern=tuple(
            (str(pattern), number)
            for pattern, value in (patterns.items() if isinstance(patterns, dict) else ())
            if (number := _number(value)) is not None
        ),
        use_rslora=own.get("use_rslora") is True,
    )


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The words that the file says, or else the tags that stood at all of its training images; at most 4."""
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


def _names(pattern: str, module: str) -> bool:
    """Whether PEFT's pattern names the module: a name or an end of it, never a regular expression of a stranger's."""
    name = re.sub(r"^(\^|\.\*)|\$$", "", pattern).replace("\\.", ".").lstrip(".")
    return module == name or module.endswith(f".{name}")


def _number(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None  # type: ignore[arg-type]


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
