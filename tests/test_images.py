"""Input limits, decoding, and encoding of images."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from errors import InputError
from images import composite, encode, open_image, open_mask

Save = Callable[..., Path]
RED, GREEN = (200, 30, 40), (20, 180, 60)


def two_halves(size: tuple[int, int] = (64, 32)) -> Image.Image:
    """Red on the left, green on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (size[0] // 2, 0, *size))
    return image


def close(found: Any, wanted: tuple[int, ...], tolerance: int = 12) -> bool:
    return bool(np.abs(np.subtract(found, wanted)).max() <= tolerance)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.avif"])
def test_six_formats_are_read(save: Save, name: str) -> None:
    if name == "a.avif" and not features.check("avif"):
        raise AssertionError("this Pillow has no AVIF")
    image = open_image(save(two_halves(), name))
    assert image.mode == "RGB"
    assert close(image.getpixel((5, 16)), RED)
    assert close(image.getpixel((58, 16)), GREEN)


@pytest.mark.parametrize("name", ["a.tiff", "a.ppm", "a.ico", "a.pdf", "a.eps"])
def test_other_formats_are_refused(save: Save, name: str) -> None:
    with pytest.raises(InputError, match="Give a PNG, JPEG, WebP, GIF, BMP or AVIF file"):
        open_image(save(two_halves(), name))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(save: Save, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    image = open_image(save(two_halves(), "a.png", exif=tags))
    assert image.size == ((64, 32) if orientation < 5 else (32, 64))
    corner = {1: RED, 2: GREEN, 3: GREEN, 4: RED, 5: RED, 6: RED, 7: GREEN, 8: GREEN}[orientation]
    assert close(image.getpixel((3, 3)), corner)


def exif_of(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF with these tags, each with its type, count and four bytes, whether they make sense or not."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)


UPRIGHT_BY_90 = (0x0112, 3, 1, b"\x06\0\0\0")
BROKEN_EXIF = {
    "zeros": bytes(64),
    "EXIF within EXIF": b"Exif\0\0" + exif_of(UPRIGHT_BY_90),
    "a resolution in words": exif_of(UPRIGHT_BY_90, (0x011A, 2, 4, b"72 \0")),
    "a width below zero": exif_of((0x0100, 9, 1, struct.pack("<i", -5)), UPRIGHT_BY_90),
    "an orientation of 77": exif_of((0x0112, 3, 1, b"\x4d\0\0\0")),
    "an orientation in words": exif_of((0x0112, 2, 4, b"up!\0")),
}


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
@pytest.mark.parametrize("exif", BROKEN_EXIF)
def test_a_whole_image_with_broken_exif_is_read(save: Save, name: str, exif: str) -> None:
    """And turned where its orientation can be read."""
    image = open_image(save(two_halves(), name, exif=BROKEN_EXIF[exif]))
    if exif in ("a resolution in words", "a width below zero"):
        assert image.size == (32, 64)
    assert close(image.getpixel((3, 3)), RED)


def test_the_first_frame_of_an_animation_is_used(save: Save) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN)]
    path = save(frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert close(open_image(path).getpixel((3, 3)), RED)


def test_transparency_is_composited_over_white(save: Save) -> None:
    image = Image.new("RGBA", (32, 32), (*RED, 0))
    image.paste((*RED, 255), (0, 0, 16, 32))
    read = open_image(save(image))
    assert read.getpixel((4, 4)) == RED
    assert read.getpixel((28, 4)) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour_is_composited_over_white(save: Save) -> None:
    image = two_halves().quantize(4)
    path = save(image, "a.png", transparency=image.getpixel((60, 3)))
    read = open_image(path)
    assert close(read.getpixel((4, 4)), RED)
    assert read.getpixel((60, 4)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "CMYK"])
def test_every_mode_becomes_rgb(save: Save, mode: str) -> None:
    name = "a.jpg" if mode == "CMYK" else "a.png"
    white = Image.new("RGB", (32, 32), "white").convert(mode)
    read = open_image(save(white, name))
    assert read.mode == "RGB"
    assert close(read.getpixel((4, 4)), (255, 255, 255))


def test_sixteen_bits_are_scaled_to_eight(save: Save) -> None:
    grey = np.array([[0, 65535], [32896, 257]], dtype=np.uint16)
    image = open_image(save(Image.fromarray(np.repeat(np.repeat(grey, 16, 0), 16, 1))))
    assert [image.getpixel(xy) for xy in ((4, 4), (20, 4), (4, 20), (20, 20))] == [(v, v, v) for v in (0, 255, 128, 1)]


def test_every_value_of_sixteen_bits_is_rounded(save: Save) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(512, 128)
    image = open_image(save(Image.fromarray(values)))
    assert np.array_equal(np.asarray(image)[..., 0], np.rint(values / 257))


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares this size but holds hardly any data: small to send, large to decode."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("sides", [(8000, 5001), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_more_than_forty_megapixels_are_refused_before_decoding(tmp_path: Path, sides: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*sides))
    with pytest.raises(InputError, match="at most 40 megapixels"):
        open_image(path)


@pytest.mark.parametrize("sides", [(900, 100), (10, 90)])
def test_sides_beyond_eight_to_one_are_refused(save: Save, sides: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="within 8:1"):
        open_image(save(Image.new("RGB", sides)))


def test_eight_to_one_is_read(save: Save) -> None:
    assert open_image(save(Image.new("RGB", (800, 100)))).size == (800, 100)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_a_file_that_is_not_an_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match="image") as caught:
        open_image(path)
    assert str(tmp_path) not in str(caught.value)


def test_a_truncated_image_is_refused(save: Save) -> None:
    path = save(Image.effect_noise((200, 200), 50), "a.jpg")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="damaged"):
        open_image(path)


def files() -> dict[str, bytes]:
    found = {}
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"):
        buffer = io.BytesIO()
        two_halves((24, 24)).save(buffer, kind)
        found[kind] = buffer.getvalue()
    return found


FILES = files()


@settings(max_examples=2500, deadline=5000)
@given(st.sampled_from(sorted(FILES)), st.integers(0, 2**32))
def test_a_mutated_file_is_read_or_refused_and_never_crashes(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(FILES[kind])
    for _ in range(rng.randint(1, 12)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        for read in (open_image, open_mask):
            with contextlib.suppress(InputError):
                assert read(Path(file.name)).size[0] > 0


# Masks


def test_a_mask_is_read_by_luminance(save: Save) -> None:
    mask = Image.new("RGB", (32, 32), "black")
    mask.paste("white", (16, 0, 32, 32))
    read = open_mask(save(mask))
    assert read.mode == "L"
    assert (read.getpixel((4, 4)), read.getpixel((28, 4))) == (0, 255)


def test_a_mask_without_contrast_is_read_from_its_alpha(save: Save) -> None:
    mask = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    mask.paste((0, 0, 0, 255), (16, 0, 32, 32))
    read = open_mask(save(mask))
    assert (read.getpixel((4, 4)), read.getpixel((28, 4))) == (0, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("stroke", ["white", "red", "black"])
def test_a_mask_painted_on_a_transparent_canvas_is_read_from_its_alpha(save: Save, mode: str, stroke: str) -> None:
    """Whatever colour the transparent pixels have: it is never seen."""
    mask = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    mask.paste(Image.new("RGBA", (16, 32), stroke), (16, 0))
    read = open_mask(save(mask.convert(mode)))
    assert (read.getpixel((4, 4)), read.getpixel((28, 4))) == (0, 255)


@pytest.mark.parametrize(("colour", "expected"), [((0, 0, 0, 255), 0), ((255,) * 4, 255), ((0, 0, 0, 0), 0)])
def test_a_mask_of_one_colour_keeps_or_repaints_all(
    save: Save, colour: tuple[int, int, int, int], expected: int
) -> None:
    assert open_mask(save(Image.new("RGBA", (32, 32), colour))).getextrema() == (expected, expected)


def test_a_mask_with_contrast_and_alpha_is_read_by_luminance(save: Save) -> None:
    mask = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    mask.paste((255, 255, 255, 255), (16, 0, 32, 32))
    read = open_mask(save(mask))
    assert (read.getpixel((4, 4)), read.getpixel((28, 4))) == (0, 255)


def test_black_keeps_the_original_exactly() -> None:
    original, painted = Image.effect_noise((64, 64), 90).convert("RGB"), Image.new("RGB", (64, 64), RED)
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    both = composite(original, painted, mask)
    assert both.crop((0, 0, 32, 64)).tobytes() == original.crop((0, 0, 32, 64)).tobytes()
    assert both.crop((32, 0, 64, 64)).tobytes() == painted.crop((32, 0, 64, 64)).tobytes()


# Out


@pytest.mark.parametrize(("name", "kind"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_the_output_format_is_the_one_asked_for(name: str, kind: str) -> None:
    with Image.open(io.BytesIO(encode(two_halves(), name, 80))) as image:
        assert image.format == kind
        assert image.size == (64, 32)


@pytest.mark.parametrize("name", ["webp", "jpg"])
def test_more_quality_means_more_bytes_and_less_error(name: str) -> None:
    noise = Image.merge("RGB", [Image.effect_noise((128, 128), 60) for _ in range(3)])
    encoded = [encode(noise, name, quality) for quality in (0, 40, 80, 100)]
    errors = [np.abs(np.asarray(Image.open(io.BytesIO(data)), int) - np.asarray(noise, int)).mean() for data in encoded]
    assert [len(data) for data in encoded] == sorted(len(data) for data in encoded)
    assert errors == sorted(errors, reverse=True)


def test_png_is_lossless_at_any_quality() -> None:
    noise = Image.effect_noise((64, 64), 60).convert("RGB")
    for quality in (0, 100):
        with Image.open(io.BytesIO(encode(noise, "png", quality))) as image:
            assert image.tobytes() == noise.tobytes()
