"""The predictor called as Cog calls it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cog
import pytest
from PIL import Image

from errors import InputError, LoraError, ModelError
from fetching.files import temporary_folder
from predict import OutputFolder, Predictor
from tests.conftest import QUICK, predict_arguments

Save = Callable[..., Path]


def predict(predictor: Predictor, **given: Any) -> list[Path]:
    return [Path(file) for file in predictor.predict(**predict_arguments(**{**QUICK, **given}))]


@pytest.mark.parametrize(("name", "kind"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_an_image_comes_in_the_format_asked_for(predictor: Predictor, name: str, kind: str) -> None:
    (file,) = predict(predictor, output_format=name)
    assert file.suffix == f".{name}"
    with Image.open(file) as image:
        assert (image.format, image.size) == (kind, (256, 256))


def test_outputs_have_unique_names_and_the_ones_before_are_removed(predictor: Predictor) -> None:
    first = predict(predictor, num_outputs=2)
    assert all(file.exists() for file in first)
    second = predict(predictor, num_outputs=2)
    assert len({file.name for file in first + second}) == 4
    assert not any(file.exists() for file in first)
    assert not first[0].parent.exists()


def test_a_failed_prediction_leaves_the_next_one_unharmed(predictor: Predictor) -> None:
    golden = predict(predictor)[0].read_bytes()
    with pytest.raises(InputError):
        predict(predictor, aspect_ratio="custom", width=None)
    with pytest.raises(LoraError):
        predict(predictor, extra_lora="not a lora")
    assert predict(predictor)[0].read_bytes() == golden


def test_go_fast_is_deterministic_and_leaves_the_exact_model_alone(predictor: Predictor) -> None:
    given = {"aspect_ratio": "1:1", "megapixels": "0.25"}
    exact = predict(predictor, **given)[0].read_bytes()
    fast = predict(predictor, **given, go_fast=True)[0].read_bytes()
    assert fast != exact
    assert predict(predictor, **given, go_fast=True, num_outputs=2)[0].read_bytes() == fast
    assert predict(predictor, **given)[0].read_bytes() == exact


@pytest.mark.usefixtures("broken_vae")
def test_a_prediction_that_fails_half_way_leaves_no_files(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor.outputs.clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # its own, since other processes write into the shared one
    with pytest.raises(ModelError):
        predict(predictor)
    assert list(tmp_path.iterdir()) == []


def test_the_seed_is_in_the_log_and_the_prompt_is_not(predictor: Predictor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    predict(predictor, seed=4242, prompt="the phrase is hidden, pin 4242x", hf_api_token=cog.Secret("hf_canary"))
    assert "Using seed: 4242" in caplog.text
    assert "phrase is hidden" not in caplog.text
    assert "4242x" not in caplog.text
    assert "canary" not in caplog.text


def test_the_uploaded_image_is_used(predictor: Predictor, save: Save, scene_image: Image.Image) -> None:
    image = cog.Path(save(scene_image))
    (file,) = predict(predictor, image=image, prompt_strength=0.0)
    with Image.open(file) as shown:
        assert shown.tobytes() == scene_image.tobytes()


@pytest.mark.parametrize("name", ["image", "mask"])
@pytest.mark.parametrize(
    "value",
    [
        "/etc/hostname",
        "",
        "file:///etc/hostname",
        cog.Path("/etc/hostname"),
        cog.Path(tempfile.gettempdir()) / "../etc",
    ],
)
def test_a_file_that_was_not_uploaded_is_refused(predictor: Predictor, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} is not an uploaded file") as caught:
        predict(predictor, **{name: value})
    assert "etc" not in str(caught.value)


def test_a_link_out_of_the_temporary_folder_is_refused(predictor: Predictor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "image.png"
        link.symlink_to("/etc/hostname")
        with pytest.raises(InputError, match="not an uploaded file"):
            predict(predictor, image=cog.Path(link))


def test_a_cancellation_right_after_the_folder_is_made_leaves_no_folder(tmp_path: Path, monkeypatch: Any) -> None:
    """Cog raises at the next Python instruction, which may be the one after the system's mkdir."""

    class Cancelled(BaseException):
        pass

    def mkdir(path: Path, mode: int) -> None:
        made(path, mode)
        raise Cancelled

    made = Path.mkdir
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "mkdir", mkdir)
    outputs = OutputFolder()
    with pytest.raises(Cancelled):
        outputs.fresh()
    assert len(list(tmp_path.iterdir())) == 1
    outputs.clear()
    with pytest.raises(Cancelled), temporary_folder("flux-input-"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_goes_also_while_a_thread_writes_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancellation can reach the prediction while it waits for the thread that encodes: an image comes at the worst
    moment, after the folder was emptied and before it is removed."""

    def rmdir(path: Any, **given: Any) -> None:
        if late:
            late.pop().write_bytes(b"image")
        removed(path, **given)

    removed = os.rmdir
    outputs = OutputFolder()
    folder = outputs.fresh()
    late = [folder / "late.png"]
    monkeypatch.setattr(os, "rmdir", rmdir)
    outputs.clear()
    assert late == []
    assert not folder.exists()
