"""What files say of themselves, read back by Pillow and, where it is installed, by exiftool."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from image_metadata import CONTENTS, VERSION, needs_image, read_settings, settings_of, xmp_packet
from images import encode, xmp_of
from lora_loading.finding.reference import parse
from request import GenerationRequest
from settings import METADATA
from tests.conftest import request_of
from tests.paths import PROJECT

FORMATS = ["png", "jpg", "webp"]
SIGNED = "https://files.example.com/x/style.safetensors?X-Amz-Signature=secret"


def saved(folder: Path, contents: str, output_format: str, request: GenerationRequest) -> Path:
    image = Image.radial_gradient("L").resize((64, 48)).convert("RGB")
    file = folder / f"image.{output_format}"
    packet = xmp_packet(contents, request, 1, ["ab" * 32] * len(request.loras))
    file.write_bytes(encode(image, output_format, 80, packet))
    return file


def request_with_lora(**given: Any) -> GenerationRequest:
    request = request_of(seed=7, prompt='a <red> & "blue" circle, ½', **given)
    return replace(request, loras=((parse(SIGNED), 0.5),))


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_settings_are_read_back_from_every_format(tmp_path: Path, output_format: str) -> None:
    request = request_with_lora(output_format=output_format)
    packet = xmp_of(saved(tmp_path, "settings", output_format, request))
    assert packet is not None
    assert read_settings(packet) == {
        "version": VERSION, "model": "dev", "seed": 8, "aspect_ratio": "1:1", "megapixels": "1",
        "num_inference_steps": 28, "guidance_scale": 3.0, "go_fast": False, "output_format": output_format,
        "output_quality": 80,
        "loras": [{"reference": "files.example.com/.../style.safetensors", "scale": 0.5, "sha256": "ab" * 32}],
    }  # fmt: skip


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize(("contents", "keeps_prompt"), [("mark", False), ("settings", False), ("prompt", True)])
def test_the_prompt_is_there_only_where_it_is_wanted_and_secrets_never(
    tmp_path: Path, output_format: str, contents: str, keeps_prompt: bool
) -> None:
    packet = xmp_of(saved(tmp_path, contents, output_format, request_with_lora()))
    assert packet is not None
    assert "trainedAlgorithmicMedia" in packet
    settings = read_settings(packet)
    assert (settings is None) == (contents == "mark")
    assert ((settings or {}).get("prompt") == 'a <red> & "blue" circle, ½') == keeps_prompt
    assert ("circle" in packet) == keeps_prompt
    assert "secret" not in packet


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("prompt", ["🦊" * 20_000, "&" * 20_000, "x" * 20_000])
def test_a_prompt_that_a_jpeg_has_no_room_for_is_left_out(tmp_path: Path, output_format: str, prompt: str) -> None:
    request = replace(request_of(prompt=prompt, seed=7), output_format=output_format)
    packet = xmp_of(saved(tmp_path, "prompt", output_format, request))
    assert packet is not None
    settings = read_settings(packet)
    assert settings is not None
    assert settings["seed"] == 8
    fits = output_format != "jpg" or prompt.startswith("x")
    assert settings.get("prompt") == (prompt if fits else None)


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_pixels_and_the_bytes_are_the_same_with_and_without(tmp_path: Path, output_format: str) -> None:
    def pixels(contents: str) -> bytes:
        with Image.open(saved(tmp_path, contents, output_format, request_with_lora())) as image:
            return image.tobytes()

    assert len({pixels(contents) for contents in CONTENTS}) == 1
    files = {saved(tmp_path, "prompt", output_format, request_with_lora()).read_bytes() for _ in range(2)}
    assert len(files) == 1
    assert xmp_of(saved(tmp_path, "off", output_format, request_with_lora())) is None


def test_an_image_that_was_given_makes_it_a_composite(tmp_path: Path, save: Callable[..., Path]) -> None:
    request = request_of(image=save(Image.new("RGB", (64, 64))), prompt_strength=0.6)
    packet = xmp_of(saved(tmp_path, "settings", "png", request)) or ""
    assert "digitalsourcetype/compositeWithTrainedAlgorithmicMedia<" in packet
    settings = read_settings(packet) or {}
    assert (settings["mode"], settings["prompt_strength"]) == ("img2img", 0.6)
    assert needs_image(settings) == ("image",)
    assert "aspect_ratio" not in settings


@pytest.mark.parametrize(
    "size", [{"aspect_ratio": "21:9"}, {"aspect_ratio": "2:3", "megapixels": "0.25"}, {"width": 400, "height": 304}]
)
def test_the_size_inputs_give_the_same_size_again(size: dict[str, Any]) -> None:
    given = {"aspect_ratio": "custom", **size}
    request = request_of(**given)
    names = ("aspect_ratio", "megapixels", "width", "height")
    again = {name: value for name, value in settings_of(request, 0, []).items() if name in names}
    assert request_of(**again).size == request.size == request_of(**again).size
    assert again["aspect_ratio"] == given["aspect_ratio"]


def test_a_packet_is_made_in_well_under_five_milliseconds() -> None:
    request = request_with_lora()
    image = Image.new("RGB", (1024, 1024))
    started = time.perf_counter()
    for _ in range(20):
        xmp_packet("prompt", request, 0, ["ab" * 32])
    assert (time.perf_counter() - started) / 20 < 0.005
    packet = xmp_packet("prompt", request, 0, ["ab" * 32]) or b""
    assert len(encode(image, "png", 80, packet)) - len(encode(image, "png", 80)) < len(packet) + 100 < 2500


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_independent_reader_sees_the_mark(tmp_path: Path, output_format: str) -> None:
    if shutil.which("exiftool") is None:
        pytest.skip("exiftool is not installed (Debian: libimage-exiftool-perl)")
    file = saved(tmp_path, "settings", output_format, request_with_lora())
    done = subprocess.run(["exiftool", "-j", "-XMP:all", str(file)], capture_output=True, text=True, check=True)
    (tags,) = json.loads(done.stdout)
    assert tags["DigitalSourceType"].endswith(("trainedAlgorithmicMedia", "Trained Algorithmic Media"))
    assert tags["CreatorTool"] == f"flux-predictor {VERSION}"
    assert json.loads(tags["Settings"])["seed"] == 8


@pytest.mark.parametrize("packet", ["", "<flux:settings>{</flux:settings>", "<flux:settings>[1]</flux:settings>"])
def test_what_is_no_packet_of_ours_has_no_settings(packet: str) -> None:
    assert read_settings(packet) is None


def test_the_version_is_the_projects_and_in_the_changelog() -> None:
    assert f'version = "{VERSION}"' in (PROJECT / "pyproject.toml").read_text()
    assert f"[{VERSION}]" in (PROJECT / "CHANGELOG.md").read_text()


def test_the_settings_know_the_contents() -> None:
    assert METADATA == CONTENTS


def test_a_broken_file_is_refused_in_words(tmp_path: Path) -> None:
    from errors import InputError

    file = tmp_path / "text.png"
    file.write_text("no image")
    with pytest.raises(InputError, match="is not an image that can be read"):
        xmp_of(file)
