"""How LoRA files name their tensors: one module for each family of names. Knows names and shapes, no weights."""

from __future__ import annotations

from lora_loading.reading.formats import bfl, diffsynth, diffusers, flat, text, xlabs
from lora_loading.reading.formats.targets import Family, Target
from lora_loading.shapes import ModelShapes

FAMILIES: tuple[Family, ...] = (
    diffusers.FAMILY,
    bfl.FAMILY,
    xlabs.FAMILY,
    diffsynth.FAMILY,
    *flat.FAMILIES,
    text.FAMILY,
)
"""No path means different layers in two of them, so their order decides nothing but the name in the log."""


def locate(path: str, shapes: ModelShapes) -> tuple[Family, Target] | None:
    """The family that knows a path, and what it means in this model; None if no family does."""
    found = ((family, family.locate(path, shapes)) for family in FAMILIES)
    return next(((family, target) for family, target in found if target is not None), None)
