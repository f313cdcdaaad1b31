"""Every row of the contract's semantics that concerns sizes, modes, seed and strength, without a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from errors import InputError, LoraReferenceError
from lora_loading.finding.reference import parse
from request import Mode, Size
from tests.conftest import request_of

Save = Callable[..., Path]

ONE_MEGAPIXEL = {
    "1:1": (1024, 1024), "16:9": (1344, 768), "21:9": (1536, 640), "3:2": (1216, 832), "2:3": (832, 1216),
    "4:5": (896, 1088), "5:4": (1088, 896), "3:4": (896, 1152), "4:3": (1152, 896), "9:16": (768, 1344),
    "9:21": (640, 1536),
}  # fmt: skip


@pytest.mark.parametrize(("ratio", "sides"), ONE_MEGAPIXEL.items())
def test_aspect_ratio_gives_the_size_of_the_contract(ratio: str, sides: tuple[int, int]) -> None:
    assert request_of(aspect_ratio=ratio).size == Size(*sides)


@pytest.mark.parametrize(("ratio", "sides"), ONE_MEGAPIXEL.items())
def test_a_quarter_megapixel_halves_both_sides(ratio: str, sides: tuple[int, int]) -> None:
    assert request_of(aspect_ratio=ratio, megapixels="0.25").size == Size(sides[0] // 2, sides[1] // 2)


@pytest.mark.parametrize(
    ("asked", "got"), [(256, 256), (263, 256), (264, 272), (1000, 1008), (1431, 1424), (1432, 1440), (1440, 1440)]
)
def test_custom_sides_are_rounded_to_the_nearest_multiple_of_16_ties_up(asked: int, got: int) -> None:
    request = request_of(aspect_ratio="custom", width=asked, height=512, megapixels="0.25")
    assert request.size == Size(got, 512)


def test_sides_that_are_not_used_are_said_to_be_so() -> None:
    request = request_of(width=512, height=768, aspect_ratio="3:2")
    assert request.size == Size(1216, 832)
    assert request.notes == ('width and height are not used: they need aspect_ratio "custom", and it is "3:2"',)


@pytest.mark.parametrize(
    ("sides", "missing"), [({"width": 512}, "height"), ({"height": 512}, "width"), ({}, "width, height")]
)
def test_custom_names_the_missing_side(sides: dict[str, int], missing: str) -> None:
    with pytest.raises(InputError, match=f"Missing: {missing}."):
        request_of(aspect_ratio="custom", **sides)


def test_width_and_height_are_ignored_without_custom() -> None:
    assert request_of(aspect_ratio="1:1", width=256, height=256).size == Size(1024, 1024)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((512, 512), (512, 512)),
        ((2000, 1500), (1440, 1088)),  # 1080 lies between 1072 and 1088: the tie goes up
        ((1500, 3000), (720, 1440)),
        ((100, 37), (96, 32)),
        ((5, 5), (16, 16)),
        ((40, 5), (48, 16)),
    ],
)
def test_an_image_decides_the_size(save: Save, image: tuple[int, int], size: tuple[int, int]) -> None:
    request = request_of(image=save(Image.new("RGB", image)), aspect_ratio="16:9", megapixels="0.25", width=700)
    assert request.size == Size(*size)
    assert request.image is not None
    assert request.image.size == size


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_every_pair_of_sides_gives_a_valid_size(width: int, height: int) -> None:
    size = Size.from_sides(width, height)
    assert 16 <= size.width <= 1440
    assert 16 <= size.height <= 1440
    if max(width, height) <= 1440:
        assert abs(size.width - width) <= 8 or width < 8


@pytest.mark.parametrize("sides", [(0, 16), (16, 8), (17, 16), (-16, 16)])
def test_a_size_that_is_none_cannot_be_made(sides: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        Size(*sides)


def test_a_prompt_that_no_model_reads_is_refused_before_it_is_tokenized() -> None:
    assert request_of(prompt="x" * 20_000).prompt
    with pytest.raises(InputError, match=r"The prompt has 20,001 characters. Give at most 20,000"):
        request_of(prompt="x" * 20_001)


def test_the_mode_follows_from_the_images(save: Save) -> None:
    image = save(Image.new("RGB", (64, 64)))
    assert request_of().mode is Mode.TXT2IMG
    assert request_of(image=image).mode is Mode.IMG2IMG
    assert request_of(image=image, mask=image).mode is Mode.INPAINT


def test_a_mask_without_an_image_is_rejected(save: Save) -> None:
    with pytest.raises(InputError, match="mask was given without an image"):
        request_of(mask=save(Image.new("L", (64, 64))))


def test_a_mask_of_another_shape_is_said_to_be_stretched(save: Save) -> None:
    image = save(Image.new("RGB", (128, 64)))
    square, half = save(Image.new("L", (64, 64)), "square.png"), save(Image.new("L", (64, 32)), "half.png")
    note = "the mask is 64x64 and the image 128x64: the mask is stretched to the image's shape"
    assert request_of(image=image, mask=square).notes == (note,)
    assert request_of(image=image, mask=half).notes == ()


def test_image_and_mask_are_both_upright_and_of_the_output_size(save: Save) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6  # rotated by 90 degrees
    image = save(Image.new("RGB", (100, 60)), "image.jpg", exif=tags)
    mask = save(Image.new("L", (100, 60)), "mask.jpg", exif=tags)
    request = request_of(image=image, mask=mask)
    assert request.image is not None
    assert request.mask is not None
    assert request.image.size == request.mask.size == (64, 96)


@pytest.mark.parametrize("side", [32, 100, 128, 500])
def test_what_a_mask_keeps_stays_black_when_it_is_scaled(save: Save, side: int) -> None:
    """A filter with ripples would make pixels grey that are far from the edge."""
    mask = Image.new("L", (side, side), 0)
    mask.paste(255, (side // 2, 0, side, side))
    scaled = request_of(image=save(Image.new("RGB", (256, 256))), mask=save(mask, "mask.png")).mask
    assert scaled is not None
    pixel = max(1.0, 256 / side)
    assert scaled.crop((0, 0, int(128 - pixel), 256)).getextrema() == (0, 0)
    assert scaled.crop((int(128 + pixel) + 1, 0, 256, 256)).getextrema() == (255, 255)


def test_prompt_strength_counts_only_with_an_image(save: Save) -> None:
    assert request_of(prompt_strength=0.3).strength == 1.0
    assert request_of(prompt_strength=0.3, image=save(Image.new("RGB", (64, 64)))).strength == 0.3


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32, 2**64 - 1])
def test_a_seed_is_used_as_given(seed: int) -> None:
    assert request_of(seed=seed).seed == seed


@pytest.mark.parametrize("seed", [None, -1, -(10**30)])
def test_no_seed_or_a_negative_one_means_random(seed: int | None) -> None:
    assert request_of(seed=seed, random_seed=lambda: 12345).seed == 12345


def test_random_seeds_have_32_bits_and_differ() -> None:
    seeds = {request_of(seed=None).seed for _ in range(50)}
    assert len(seeds) == 50
    assert max(seeds) < 2**32


def test_seeds_beyond_64_bits_are_taken_modulo() -> None:
    assert request_of(seed=2**64 + 5).seed == 5
    assert request_of(seed=2**64 - 1).seed_of(2) == 1


@pytest.mark.parametrize(
    ("given", "loras"),
    [
        ({}, []),
        ({"replicate_weights": " ", "extra_lora": ""}, []),
        ({"replicate_weights": "a/b"}, [("replicate.com/a/b", 1.0)]),
        ({"extra_lora": "a/b", "extra_lora_scale": 0.5}, [("replicate.com/a/b", 0.5)]),
        (
            {"replicate_weights": "a/b", "lora_scale": -1, "extra_lora": "hf.co/c/d", "extra_lora_scale": 2},
            [("replicate.com/a/b", -1.0), ("huggingface.co/c/d", 2.0)],
        ),
        ({"replicate_weights": "a/b", "extra_lora": "a/b"}, [("replicate.com/a/b", 1.0)] * 2),
        ({"replicate_weights": "a/b", "lora_scale": 0, "extra_lora": "c/d"}, [("replicate.com/c/d", 1.0)]),
        ({"extra_lora": "c/d 0.25", "extra_lora_scale": 2}, [("replicate.com/c/d", 0.5)]),
        (
            {
                "replicate_weights": "a/b",
                "extra_lora": "c/d 0.5\r\n\n  hf.co/e/f\t-1 \ng/h 0\ni/j",
                "extra_lora_scale": 2,
            },
            [
                ("replicate.com/a/b", 1.0),
                ("replicate.com/c/d", 1.0),
                ("huggingface.co/e/f", -2.0),
                ("replicate.com/i/j", 2.0),
            ],
        ),
    ],
)
def test_loras_come_with_their_own_strengths(given: dict[str, Any], loras: list[tuple[str, float]]) -> None:
    assert [(str(reference), strength) for reference, strength in request_of(**given).loras] == loras


def test_the_operators_lora_takes_the_place_of_the_main_one_alone() -> None:
    own = parse("own/lora")
    assert request_of(default_lora=own, lora_scale=0.5).loras == ((own, 0.5),)
    assert request_of(default_lora=own, extra_lora="a/b").loras == ((own, 1.0), (parse("a/b"), 1.0))
    assert request_of(default_lora=own, replicate_weights="a/b").loras == ((parse("a/b"), 1.0),)


@pytest.mark.parametrize("name", ["replicate_weights", "extra_lora"])
def test_a_lora_of_no_known_form_is_refused_before_any_work(name: str) -> None:
    with pytest.raises(LoraReferenceError, match='Cannot read LoRA "not a lora"'):
        request_of(**{name: "not a lora"})


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a/b\nnot a lora\nc/d", LoraReferenceError, 'extra_lora, line 2: Cannot read LoRA "not a lora"'),
        ("a/b\n\nc/d 7", InputError, "extra_lora, line 3: the scale is 7. Give a number from -1 to 3."),
        ("a/b nan", InputError, "extra_lora: the scale is nan."),
        ("a/b\nc/d\ne/f\ng/h\ni/j", InputError, "extra_lora has 5 lines. Give at most 4 LoRAs, one a line."),
    ],
)
def test_a_bad_line_of_extra_lora_is_named(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        request_of(extra_lora=text)


@pytest.mark.parametrize("kind", ["text", "image", "mask"])
def test_go_fast_is_for_every_mode(kind: str, save: Callable[..., Path]) -> None:
    image, mask = save(Image.new("RGB", (256, 256))), save(Image.new("L", (256, 256)), "mask.png")
    inputs = {"text": {}, "image": {"image": image}, "mask": {"image": image, "mask": mask}}[kind]
    assert request_of(**inputs, go_fast=True).go_fast
    assert not request_of(**inputs).go_fast


def test_go_fast_with_a_custom_size_runs_exact_and_says_so() -> None:
    request = request_of(go_fast=True, aspect_ratio="custom", width=256, height=256)
    assert not request.go_fast
    assert any("custom size runs in the original precision" in note for note in request.notes)


def test_go_fast_with_an_image_ignores_the_custom_size(save: Callable[..., Path]) -> None:
    """The image decides the size then, and no size of its own was asked for."""
    request = request_of(go_fast=True, image=save(Image.new("RGB", (256, 256))), aspect_ratio="custom")
    assert request.go_fast
    assert request.notes == ()
