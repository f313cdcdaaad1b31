"""Which images and changes are looked at, by the dry run as by the measurements on a GPU. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from PIL import Image

from request import GenerationRequest, Mode, Size

PRECISIONS = ("exact", "fast")
SQUARE = Size(1024, 1024)
SIZES = (SQUARE, Size(256, 256), Size(1440, 1440))
RANK = 16
"""Of the LoRAs, on all linear layers of the blocks."""


@dataclass(frozen=True)
class Case:
    """One request's kind."""

    model: str
    precision: str
    mode: Mode
    size: Size
    loras: int

    @property
    def name(self) -> tuple[str, ...]:
        """A table's first cells."""
        size = f"{self.size.width}x{self.size.height}"
        return self.model, self.precision, self.mode.value, size, str(self.loras)


NAME_COLUMNS = ("model", "precision", "mode", "size", "LoRAs")


def cases(sizes: Sequence[Size] = SIZES, models: Sequence[str] = ("dev", "schnell")) -> Iterator[Case]:
    """Every model, precision, mode and size with no, one and two LoRAs; with one in the first size alone."""
    for model, precision, number in product(models, PRECISIONS, (0, 1, 2)):
        for mode, size in product(Mode, sizes if number != 1 else sizes[:1]):
            yield Case(model, precision, mode, size, number)


@dataclass(frozen=True)
class Change:
    """A change of what go_fast's fp8 copy holds, from what the row before left in it."""

    name: str
    model: str
    loras: int


CHANGES = (
    Change("to one LoRA", "dev", 1),
    Change("to two LoRAs", "dev", 2),
    Change("to none", "dev", 0),
    Change("to the other model", "schnell", 0),
)


def request_of(case: Case, steps: int, prompt: str = "a circle") -> GenerationRequest:
    """A request for one image; the later modes begin from an empty one."""
    image = Image.new("RGB", (case.size.width, case.size.height))
    return GenerationRequest(
        prompt=prompt,
        mode=case.mode,
        size=case.size,
        model=case.model,
        num_outputs=1,
        num_inference_steps=steps,
        guidance_scale=3.0,
        strength=1.0 if case.mode is Mode.TXT2IMG else 0.8,
        seed=0,
        output_format="png",
        output_quality=80,
        go_fast=case.precision == "fast",
        image=None if case.mode is Mode.TXT2IMG else image,
        mask=Image.new("L", image.size, 255) if case.mode is Mode.INPAINT else None,
    )
