"""`script/predict` run as a user runs it: arguments, messages, exit status."""

from __future__ import annotations

import io
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cli.predict import LORA_INPUTS, free_names, inputs_again, name_value, parse_inputs
from cli.schema import predictor_schemas
from errors import InputError
from image_metadata import xmp_packet
from images import encode
from lora_loading.finding.reference import parse
from predict import Predictor
from tests.conftest import request_of
from tests.paths import PROJECT
from tests.services import Storage, StoredFile

SCHEMAS = predictor_schemas(Predictor.predict)
SMALL = ["-i", "aspect_ratio=custom", "-i", "width=256", "-i", "height=256", "-i", "num_inference_steps=2"]


def script_predict(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(PROJECT / "script" / "predict"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_a_prediction_prints_its_files_seed_seconds_and_progress(tmp_path: Path) -> None:
    done = script_predict(
        tmp_path, "-i", "prompt=a red circle", *SMALL, "-i", "num_outputs=2", "-i", "seed=5", "-o", "out"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:-1] == ["wrote out/output.0.webp", "wrote out/output.1.webp"]
    assert "Using seed: 5\n" in done.stdout
    assert " s in all" in done.stdout
    assert "100%" in done.stderr
    with Image.open(tmp_path / "out" / "output.1.webp") as image:
        assert image.size == (256, 256)


def test_a_newcomer_sees_none_of_the_libraries_chatter(tmp_path: Path) -> None:
    done = script_predict(tmp_path, "-i", "prompt=a red circle", *SMALL)
    for word in ("torchao", "torchvision", "pytree", "deprecat", "Warning", "not expected", "Loading weights"):
        assert word not in done.stdout + done.stderr


def test_a_file_is_given_with_an_at_sign(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "in.png")
    inputs = ["-i", "prompt=x", "-i", "image=@in.png", "-i", "prompt_strength=0", "-i", "output_format=png"]
    done = script_predict(tmp_path, *inputs)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "output.0.png") as image:
        assert image.tobytes() == Image.new("RGB", (64, 48), "red").tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prompt is required"),
        (["-i", "prompt=x", "-i", "num_outputs=9"], "num_outputs is 9. Give a number from 1 to 4."),
        (["-i", "prompt=x", "-i", "mask=@m.png"], "A mask was given without an image"),
        (
            ["-i", "prompt=x", "-i", "image=@m.png", "-i", "mask=@l.safetensors"],
            "mask is not in a format that can be read",
        ),
        (["-i", "prompt=x", "-i", "aspect_ratio=custom"], 'aspect_ratio "custom" needs both width and height'),
        (["-i", "prompt=x", "-i", "replicate_weights=l.safetensors"], "write -i replicate_weights=@l.safetensors"),
        (["-i", "prompt=x", "-i", "extra_lora=/no/l.safetensors"], "write -i extra_lora=@/no/l.safetensors"),
        (["-i", "prompt=x", "-i", "replicate_weights=civitai.com/x"], 'Cannot read LoRA "civitai.com/x"'),
        (["-i", "prompt=x", "-o", "m.png"], '-o is "m.png", and m.png is a file. Give a folder'),
        (["-i", "prompt=x", "-o", "m.png/below"], "is a file. Give a folder"),
    ],
)
def test_a_wrong_input_prints_one_message_and_exits_1_before_a_model_loads(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "m.png")
    (tmp_path / "l.safetensors").write_bytes(b"content")
    done = script_predict(tmp_path, *arguments)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.safetensors", "m.png"]


def test_a_wrong_setting_is_told_before_a_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_COMPILE", "maybe")
    done = script_predict(tmp_path, "-i", "prompt=x")
    assert (done.returncode, done.stdout) == (1, "")
    assert "FLUX_COMPILE" in done.stderr


def test_an_error_of_the_prediction_is_printed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_TRUSTED_HOSTS", "127.0.0.1:9")
    lora = "replicate_weights=http://127.0.0.1:9/x.safetensors"
    done = script_predict(tmp_path, "-i", "prompt=x", "-i", lora, *SMALL)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("The connection to 127.0.0.1:9 failed") == 1
    assert "Traceback" not in done.stderr


def test_images_are_numbered_on_from_those_that_lie_there(tmp_path: Path) -> None:
    files = [Path("a.png"), Path("b.png")]
    assert [path.name for path in free_names(tmp_path, files)] == ["output.0.png", "output.1.png"]
    for name in ("output.0.webp", "output.7.jpg", "output.x.png", "other.9.png"):
        (tmp_path / name).touch()
    assert [path.name for path in free_names(tmp_path, files)] == ["output.8.png", "output.9.png"]


def test_help_lists_every_input_with_its_bounds(tmp_path: Path) -> None:
    done = script_predict(tmp_path, "--help")
    assert done.returncode == 0
    for name in SCHEMAS["Input"]["properties"]:
        assert f"\n  {name}: " in done.stdout
    assert "num_outputs: whole number from 1 to 4; 1 if not given." in done.stdout
    assert "go_fast: true or false; false if not given." in done.stdout


@pytest.mark.parametrize("arguments", [["--fast"], ["-i", "prompt"], ["-o"]])
def test_wrong_usage_exits_2(tmp_path: Path, arguments: list[str]) -> None:
    done = script_predict(tmp_path, *arguments)
    assert done.returncode == 2
    assert "usage: script/predict" in done.stderr


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("colour=red", 'There is no input "colour". The inputs are: prompt, image'),
        ("seed=many", 'seed is "many". Give a whole number.'),
        ("guidance_scale=lots", "Give a number."),
        ("go_fast=maybe", "Give true or false."),
        ("model=pro", "Choose one of dev, schnell."),
        ("image=@/", '"/" is a folder. Give a file for image.'),
        ("image=photo.png", "write -i image=@photo.png"),
        ("image=", 'image is "". Give @FILE, an http(s) address or a data URI.'),
        ("mask=ftp://a/b.png", 'mask is "ftp://a/b.png". Give @FILE'),
        ("image=@nowhere.png", 'There is no file "nowhere.png" for image.'),
        ("extra_lora=@nowhere.safetensors", 'There is no file "nowhere.safetensors" for extra_lora.'),
    ],
)
def test_each_wrong_input_has_a_message(pair: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        parse_inputs([("prompt", "x"), name_value(pair)], SCHEMAS, tmp_path)
    assert message in str(caught.value)


def test_inputs_are_typed_and_defaults_filled_in(tmp_path: Path) -> None:
    pairs = ["prompt=a = b", "seed=-1", "guidance_scale=2", "go_fast=True", "hf_api_token=hf_x"]
    inputs = parse_inputs([name_value(pair) for pair in pairs], SCHEMAS, tmp_path)
    assert list(inputs) == list(SCHEMAS["Input"]["properties"])
    assert (inputs["prompt"], inputs["seed"], inputs["guidance_scale"], inputs["go_fast"]) == ("a = b", -1, 2.0, True)
    assert (inputs["model"], inputs["num_inference_steps"], inputs["image"]) == ("dev", 28, None)
    assert "hf_x" not in repr(inputs["hf_api_token"])


def test_a_file_for_a_text_input_becomes_a_data_uri(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    file.write_bytes(b"content")
    inputs = parse_inputs([("prompt", "x"), ("extra_lora", f"@{file}")], SCHEMAS, tmp_path)
    assert inputs["extra_lora"] == "data:application/octet-stream;base64,Y29udGVudA=="


def test_an_image_is_made_again_from_its_file_byte_for_byte(tmp_path: Path) -> None:
    prompt = "prompt=a red circle on a white background"
    small = ["-i", "megapixels=0.25", "-i", "model=schnell", "-i", "num_inference_steps=1", "-i", "num_outputs=2"]
    first = script_predict(tmp_path, "-i", prompt, *small, "-i", "output_format=png", "-o", "first")
    assert first.returncode == 0, first.stderr
    made = tmp_path / "first" / "output.1.png"
    again = script_predict(tmp_path, "--again", str(made), "-i", prompt, "-o", "second")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "second" / "output.0.png").read_bytes() == made.read_bytes()


@pytest.mark.parametrize("image", ["http://127.0.0.1:9/photo.jpg", "http://", "data:image/png;base64,A"])
def test_an_address_of_an_image_is_fetched_under_the_servers_rules(tmp_path: Path, image: str) -> None:
    done = script_predict(tmp_path, "-i", "prompt=x", "-i", f"image={image}", *SMALL)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "the image" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_image_behind_an_address_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(buffer, "PNG")
    with Storage("127.0.0.1") as storage:
        address = storage.put("/photo.png", StoredFile(buffer.getvalue()))
        monkeypatch.setenv("FLUX_TRUSTED_HOSTS", storage.authority)
        done = script_predict(tmp_path, "-i", "prompt=x", "-i", f"image={address}", "-i", "prompt_strength=0.2", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "wrote output.0." in done.stdout


@pytest.mark.parametrize("scale", [4.0, 9.0, -3.0, 0.7])
@pytest.mark.parametrize("count", [1, 2])
def test_scales_that_a_line_and_its_factor_made_are_made_again(tmp_path: Path, scale: float, count: int) -> None:
    extra = tuple((parse(f"a/b{index}"), scale) for index in range(count))
    request = replace(request_of(prompt="x", seed=3), loras=((parse("fofr/cars"), 1.0), *extra))
    file = tmp_path / "image.png"
    file.write_bytes(
        encode(Image.new("RGB", (16, 16)), "png", 80, xmp_packet("prompt", request, 0, ["0"] * (1 + count)))
    )
    values = parse_inputs([], SCHEMAS, tmp_path, inputs_again(file, []))
    again = request_of(**{name: values[name] for pair in LORA_INPUTS for name in pair})
    assert [found for _, found in again.loras] == pytest.approx([1.0] + [scale] * count)


def test_what_a_file_says_is_neither_read_from_disk_nor_an_unknown_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text("secret")
    prompt = f"@{tmp_path / 'secret'}"
    base: dict[str, str | float] = {"reference": "a/b", "scale": 0.125, "sha256": "0"}
    packet = xmp_packet("prompt", request_of(prompt=prompt, seed=3), 0, [], base)
    file = tmp_path / "image.png"
    file.write_bytes(encode(Image.new("RGB", (16, 16)), "png", 80, packet))
    assert parse_inputs([], SCHEMAS, tmp_path, inputs_again(file, []))["prompt"] == prompt
    assert 'set FLUX_BASE_LORA to "a/b 0.125"' in capsys.readouterr().err


def test_making_again_asks_for_what_the_file_does_not_hold(tmp_path: Path) -> None:
    request = request_of(image=None, seed=3)
    file = tmp_path / "image.png"
    file.write_bytes(encode(Image.new("RGB", (16, 16)), "png", 80, xmp_packet("settings", request, 0, [])))
    with pytest.raises(InputError, match=r"does not hold the prompt. Give -i prompt=\.\.\."):
        inputs_again(file, [])
    given = [("prompt", "a red circle"), ("seed", "9")]
    values = parse_inputs(given, SCHEMAS, tmp_path, inputs_again(file, given))
    assert (values["prompt"], values["seed"], values["go_fast"]) == ("a red circle", 9, False)
    lora = replace(request, loras=((parse("https://a.example/secret/x.safetensors"), 0.5), (parse("fofr/cars"), 1.0)))
    file.write_bytes(encode(Image.new("RGB", (16, 16)), "png", 80, xmp_packet("prompt", lora, 0, ["0", "1"])))
    with pytest.raises(InputError, match=r"does not hold the replicate_weights. Give"):
        inputs_again(file, [])
    given = [("replicate_weights", "a/b")]
    values = parse_inputs(given, SCHEMAS, tmp_path, inputs_again(file, given))
    assert [values[n] for pair in LORA_INPUTS for n in pair] == ["a/b", 0.5, "replicate.com/fofr/cars", 1.0]
    file.write_bytes(encode(Image.new("RGB", (16, 16)), "png", 80))
    with pytest.raises(InputError, match="holds no settings of this predictor"):
        inputs_again(file, [])
