"""Masks have the upright image's size and two values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from studio.painting import layer_of, mask_of, upright

SIZES = [(1024, 1024), (1344, 768), (2000, 3000)]


def strokes(size: tuple[int, int]) -> Image.Image:
    """A stroke with a soft edge, as a canvas gives it."""
    layer = Image.new("RGBA", size)
    for alpha, radius in ((40, 60), (200, 50), (255, 40)):
        ImageDraw.Draw(layer).circle((size[0] // 2, size[1] // 2), radius, (255, 255, 255, alpha))
    return layer


@pytest.mark.parametrize("size", SIZES)
def test_a_mask_has_the_images_size_and_two_values(size: tuple[int, int]) -> None:
    mask = mask_of([strokes(size)], size)
    assert mask is not None
    assert (mask.size, mask.mode) == (size, "L")
    assert np.unique(np.asarray(mask)).tolist() == [0, 255]
    assert 2 * 45**2 < (np.asarray(mask) > 0).sum() < 4 * 51**2


def test_without_a_stroke_there_is_no_mask() -> None:
    assert mask_of([], (64, 64)) is None
    assert mask_of([Image.new("RGBA", (64, 64), (255, 255, 255, 0))], (64, 64)) is None


def test_a_photograph_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200)).save(tmp_path / "turned.jpg", exif=exif)
    assert upright(tmp_path / "turned.jpg").size == (200, 300)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert upright(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_an_uploaded_mask_becomes_strokes_and_the_same_mask_again(tmp_path: Path) -> None:
    drawn = Image.new("L", (64, 48))
    ImageDraw.Draw(drawn).rectangle((8, 8, 40, 30), fill=255)
    drawn.save(tmp_path / "mask.png")
    again = mask_of([layer_of(tmp_path / "mask.png", (64, 48))], (64, 48))
    assert again is not None
    assert np.array_equal(np.asarray(again), np.asarray(drawn))
    assert layer_of(tmp_path / "mask.png", (128, 96)).size == (128, 96)
