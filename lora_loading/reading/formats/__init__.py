"""How LoRA files name their tensors: a file a family of names, all ending in the same targets. Holds no weights."""

from __future__ import annotations

from lora_loading.reading.formats import bfl, diffusers, flat, text, xlabs
from lora_loading.reading.formats.targets import Family, Target
from lora_loading.shapes import ModelShapes

FAMILIES: tuple[Family, ...] = (diffusers.FAMILY, bfl.FAMILY, xlabs.FAMILY, *flat.FAMILIES, text.FAMILY)
"""A path belongs to at most one of them, so their order does not matter."""


def locate(path: str, shapes: ModelShapes) -> tuple[Family, Target] | None:
    """The family that knows a path, and what it means in this model; None if no family does."""
    found = ((family, family.locate(path, shapes)) for family in FAMILIES)
    return next(((family, target) for family, target in found if target is not None), None)
