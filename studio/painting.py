"""From an uploaded image to what is painted on, and from strokes to a mask. Pillow only."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageChops, ImageOps

OPAQUE = 128
"""From this alpha or brightness on a pixel is repainted: what is half covered by a stroke's soft edge counts."""

PAINT = (230, 0, 126, 166)
"""The colour of strokes: the image shows through, and the alpha is above `OPAQUE`."""


def upright(path: Path) -> Image.Image:
    """Return an image turned as its EXIF says, RGB, transparency over white: the server looks at it so too."""
    with Image.open(path) as opened:
        turned = ImageOps.exif_transpose(opened)
        if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
            turned = turned.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned).convert("RGB")
        return turned.convert("RGB")


def mask_of(layers: list[Image.Image], size: tuple[int, int]) -> Image.Image | None:
    """Return the mask of all strokes: greyscale, of this size, 255 where painted, else 0; None without a stroke."""
    mask = Image.new("L", size, 0)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A")
        fitted = alpha if alpha.size == size else alpha.resize(size, Image.Resampling.NEAREST)
        mask = ImageChops.lighter(mask, _black_and_white(fitted))
    return mask if mask.getbbox() else None


def layer_of(path: Path, size: tuple[int, int]) -> Image.Image:
    """Return a mask file as strokes: RGBA, of this size, painted where the mask is bright, else clear."""
    mask = upright(path).convert("L")
    fitted = mask if mask.size == size else mask.resize(size, Image.Resampling.NEAREST)
    layer = Image.new("RGBA", size, PAINT)
    layer.putalpha(_black_and_white(fitted).point([PAINT[3] if value else 0 for value in range(256)]))
    return layer


def _black_and_white(grey: Image.Image) -> Image.Image:
    return grey.point([255 if value >= OPAQUE else 0 for value in range(256)])
