"""What a caller sees of the safety checker."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cog
import pytest
from PIL import Image

from errors import InputError, SettingsError, UnsafeOutputError
from predict import OutputFolder, Predictor
from safety.checker import FailClosed, Verdict
from safety.load import choose_checker
from settings import Settings
from tests.conftest import QUICK, predict_arguments


class Telling:
    """A detector that answers as told, image by image."""

    name = "telling"

    def __init__(self, *flagged: bool) -> None:
        self._flagged = list(flagged)

    def check(self, images: Sequence[Image.Image]) -> list[Verdict]:
        return [Verdict(self._flagged.pop(0), (("nsfw", 0.5),), "as told") for _ in images]


class Recording(Predictor):
    """Keeps its metrics."""

    def __init__(self, ready: Predictor, *flagged: bool, required: bool = False) -> None:
        self.__dict__.update(ready.__dict__)
        self.outputs = OutputFolder()
        self.checker = FailClosed(Telling(*flagged))
        self.safety_required = required
        self.metrics: dict[str, Any] = {}

    def record_metric(self, key: str, value: Any, mode: str = "replace") -> None:
        self.metrics[key] = value


def predict(predictor: Predictor, **given: Any) -> list[Path]:
    return [Path(file) for file in predictor.predict(**predict_arguments(**{**QUICK, **given}))]


@pytest.fixture
def alone(predictor: Predictor) -> list[bytes]:
    """Three images as they are without a checker."""
    return [file.read_bytes() for file in predict(predictor, num_outputs=3, disable_safety_checker=True)]


def test_flagged_images_are_dropped_and_the_others_keep_their_order(
    predictor: Predictor, alone: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    recording = Recording(predictor, False, True, False)
    files = predict(recording, num_outputs=3)
    assert [file.read_bytes() for file in files] == [alone[0], alone[2]]
    assert "image 1 withheld by telling: as told (nsfw 0.500)" in caplog.text
    assert (recording.metrics["safety_checked"], recording.metrics["safety_withheld"]) == (3, 1)
    assert recording.metrics["safety_seconds"] >= 0


def test_all_flagged_is_an_error_that_leaves_no_files(predictor: Predictor) -> None:
    recording = Recording(predictor, True, True)
    with pytest.raises(UnsafeOutputError, match="All 2 images were withheld"):
        predict(recording, num_outputs=2)
    assert (recording.metrics["safety_checked"], recording.metrics["safety_withheld"]) == (2, 2)
    assert recording.outputs._current is None


def test_a_check_that_fails_withholds(predictor: Predictor) -> None:
    with pytest.raises(UnsafeOutputError, match="could not be completed"):
        predict(Recording(predictor))


def test_a_disabled_checker_is_not_asked(predictor: Predictor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    recording = Recording(predictor)
    assert len(predict(recording, disable_safety_checker=True)) == 1
    assert recording.metrics["safety_checked"] == 0
    assert "not checked" in caplog.text


def test_a_required_checker_cannot_be_disabled(predictor: Predictor) -> None:
    with pytest.raises(InputError, match="disable_safety_checker"):
        predict(Recording(predictor, False, required=True), disable_safety_checker=True)


def test_a_required_checker_changes_nothing_else(predictor: Predictor) -> None:
    assert len(predict(Recording(predictor, False, required=True))) == 1


def test_an_input_image_is_checked_only_as_an_output(predictor: Predictor, save: Any) -> None:
    image = cog.Path(save(Image.new("RGB", (256, 256), "red")))
    recording = Recording(predictor, False)
    predict(recording, image=image, prompt_strength=0.8)
    assert recording.metrics["safety_checked"] == 1


def test_the_tiny_profile_checks_with_the_embedded_detector(predictor: Predictor) -> None:
    assert predictor.checker.name == "embedded"


def test_the_settings_name_the_checker() -> None:
    assert Settings.from_env({}).safety == "auto"
    settings = Settings.from_env({"FLUX_SAFETY": "strict", "FLUX_SAFETY_REQUIRED": "1", "FLUX_SAFETY_FOLDER": "/w"})
    assert (settings.safety, settings.safety_required, settings.safety_folder) == ("strict", True, "/w")


@pytest.mark.parametrize("value", ["none", "off", ""])
def test_there_is_no_setting_without_a_checker(value: str) -> None:
    with pytest.raises(SettingsError, match="FLUX_SAFETY"):
        choose_checker(Settings.from_env({"FLUX_SAFETY": value}).safety, "tiny")
