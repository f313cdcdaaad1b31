"""Open images and masks from files; encode images as webp, jpg or png. Pillow and NumPy only.

The limits (six formats, 40 megapixels, aspect ratio within 8:1) are checked before any pixel is decoded.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")
MAX_PIXELS = 40_000_000
MAX_ASPECT = 8
ROWS = 256
"""How many rows are scaled at a time: whole images of 40 megapixels would take a gigabyte as float64."""
MAX_FILE_BYTES = 100 * 2**20
WEBP_METHOD = 2
"""Effort of the webp encoder, 0 to 6; `script/bench cpu` measures time and file size for each."""
CONTRAST = 8
"""A transparent mask whose luminance spans fewer than this many of 255 levels is read from its alpha channel."""


def open_image(path: Path) -> Image.Image:
    """Return the first frame as RGB, turned upright by its EXIF orientation, transparency composited over white.

    Raises:
        InputError: not one of the six formats, too many pixels, an aspect ratio beyond 8:1, or damaged.
    """
    return _over_white(_open(path, "image"))


def open_mask(path: Path) -> Image.Image:
    """Return the mask as "L", upright; a transparent one whose visible pixels have no luminance contrast is read from
    its alpha channel.

    Raises:
        InputError: as for `open_image`.
    """
    mask = _open(path, "mask")
    if mask.has_transparency_data:
        rgba = mask.convert("RGBA")
        alpha = rgba.getchannel("A")
        if alpha.getextrema() != (255, 255) and _contrast(rgba.convert("RGB").convert("L"), alpha) < CONTRAST:
            return alpha
    return _over_white(mask).convert("L")


def _contrast(luminance: Image.Image, alpha: Image.Image) -> int:
    """How many levels the luminance spans where the image is not wholly transparent: what lies below is never seen."""
    levels = [level for level, count in enumerate(luminance.histogram(alpha)) if count]
    return levels[-1] - levels[0] if levels else 0


def _open(path: Path, name: str) -> Image.Image:
    """Decode the first frame: upright, 8 bits per channel."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InputError(f"The {name} file has {path.stat().st_size >> 20} MiB. Give one of at most 100 MiB.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's size warning; _check_shape has our own limit
            with Image.open(path, formats=FORMATS) as image:
                _check_shape(image, name)
                image.seek(0)
                image.load()
                return _eight_bit(_upright(image))
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"The {name} has too many pixels. Give one of at most 40 megapixels.") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"The {name} is not in a format that can be read. Give a PNG, JPEG, WebP, GIF, BMP or AVIF file."
        ) from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise InputError(f"The {name} is damaged and cannot be decoded. Save it again, or give another one.") from error


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation; 1 is upright."""


def _upright(image: Image.Image) -> Image.Image:
    """Turned by its EXIF orientation. Of the rest of the EXIF nothing is read: whole images carry broken ones, which
    Pillow's `exif_transpose` parses and writes again."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # SyntaxError, struct.error and more
        orientation = None
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _check_shape(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"The {name} has {width}x{height} pixels ({width * height / 1e6:.0f} megapixels). "
            "Give one of at most 40 megapixels."
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"The {name} has {width}x{height} pixels. Give one whose sides are within 8:1.")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit and floating-point greyscale to 8 bits; return other modes unchanged."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    factor = 255.0 if image.mode == "F" else 1 / 257
    values = np.asarray(image)
    scaled = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), ROWS):
        rows = slice(start, start + ROWS)
        scaled[rows] = np.clip(np.rint(values[rows].astype(np.float64) * factor), 0, 255)
    return Image.fromarray(scaled)


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def composite(original: Image.Image, painted: Image.Image, mask: Image.Image) -> Image.Image:
    """Return `painted` where the mask is white, exactly `original` where it is black, a blend where it is grey."""
    return Image.composite(painted, original, mask)


def encode(image: Image.Image, output_format: str, quality: int, xmp: bytes | None = None) -> bytes:
    """Encode as "webp" or "jpg" with a quality of 0 to 100, or as lossless "png"; `xmp` is an XMP packet to carry.

    Pillow takes JPEG quality 0 for its default of 75, so 0 is encoded as 1.
    """
    buffer = io.BytesIO()
    packet = {} if xmp is None else {"xmp": xmp}
    if output_format == "webp":
        image.save(buffer, "WEBP", quality=quality, method=WEBP_METHOD, **packet)
    elif output_format == "jpg":
        image.save(buffer, "JPEG", quality=max(1, quality), optimize=True, **packet)
    else:
        image.save(buffer, "PNG", compress_level=4, pnginfo=_png_text(xmp))
    return buffer.getvalue()


def _png_text(xmp: bytes | None) -> PngImagePlugin.PngInfo | None:
    if xmp is None:
        return None
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode("utf-8"))  # the keyword that the XMP specification gives for PNG
    return text


def xmp_of(path: Path) -> str | None:
    """The XMP packet that an image file carries, None where it has none.

    Raises:
        InputError: it is not an image that can be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f'"{path}" is not an image that can be read. Give a PNG, JPEG or WebP file.') from error
    return packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
