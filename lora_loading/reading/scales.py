"""How a file says its changes are scaled: PEFT's settings of each component, and what is left open. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from lora_loading.reading.keys import SortedFile, SortedLayer
from lora_loading.reading.metadata import PeftSettings, peft_settings
from lora_loading.shapes import COMPONENTS

Settings = Mapping[str, PeftSettings]
"""By component."""
SCALED = ("LoRA", "LoHa", "LoKr")
"""The kinds of change that are multiplied by alpha / rank."""


def settings_of(metadata: Mapping[str, str], beside: PeftSettings | None = None) -> Settings:
    """The settings in a file's metadata; where it has none, those of the file beside it.

    Raises:
        LoraFormatError: see `peft_config`.
    """
    own = {component: peft_settings(metadata, component) for component in COMPONENTS}
    return {name: settings if settings.given or beside is None else beside for name, settings in own.items()}


def layer_names(layer: SortedLayer) -> tuple[str, str]:
    """What PEFT's patterns may call a layer: the file's own name and diffusers'."""
    return layer.name, layer.target.name


def notes_on_scales(file: SortedFile, settings: Settings) -> list[str]:
    """What the file leaves open about the strength of its changes, and what is assumed."""
    scaled = [
        "alpha" in layer.keys or settings[layer.target.component].scale(layer_names(layer), change.rank) is not None
        for layer in file.layers
        for change in layer.changes
        if change.kind in SCALED
    ]
    open_scales, notes = scaled.count(False), []
    if open_scales:
        some = "the file has no alpha"
        if open_scales < len(scaled):
            some = f"{open_scales} of {len(scaled)} layers have no alpha"
        notes.append(f"{some}: alpha / rank = 1 is assumed")
    if any("oft_R" in layer.keys and not settings[layer.target.component].given for layer in file.layers):
        notes.append("OFT of PEFT without its settings: its default series of 5 terms is assumed")
    return notes
