"""LoRAs as a caller meets them: fetched, checked, applied, and gone again."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cog
import pytest
import torch
from PIL import Image

from errors import DownloadError, LoraAccessError, LoraFormatError, SettingsError
from image_metadata import read_settings
from images import xmp_of
from predict import Predictor
from tests.conftest import QUICK, predict_arguments
from tests.paths import LORAS
from tests.services import HTML_WITH_200, Reply, Storage, StoredFile

STYLE, OBJECT = ((LORAS / f"tok-{name}.safetensors").read_bytes() for name in ("style", "object"))
Save = Callable[..., Path]


@pytest.fixture(scope="module")
def addresses(lora_storage: Storage) -> dict[str, str]:
    """Where the two LoRAs lie."""
    return {
        "style": lora_storage.put("/style.safetensors", StoredFile(STYLE, '"1"')),
        "object": lora_storage.put("/object.safetensors", StoredFile(OBJECT, '"2"')),
    }


def predict(predictor: Predictor, **given: Any) -> bytes:
    """The one image's pixels; the file's bytes also hold the names and scales of the LoRAs."""
    (file,) = predictor.predict(**predict_arguments(**{**QUICK, **given}))
    with Image.open(file) as image:
        return image.tobytes()


def weights_digest(predictor: Predictor) -> str:
    """A digest of every weight of both models and the text encoders."""
    digest = hashlib.sha256()
    for model in predictor.engine.exact.models.values():
        for component in next(iter(model.pipelines.values())).components.values():
            if isinstance(component, torch.nn.Module):
                for name, weight in sorted(component.state_dict().items()):
                    digest.update(name.encode() + weight.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_each_request_has_its_own_loras_and_no_other(predictor: Predictor, addresses: dict[str, str]) -> None:
    style, thing = addresses["style"], addresses["object"]
    before = weights_digest(predictor)
    none = predict(predictor)
    first = predict(predictor, replicate_weights=style)
    assert predict(predictor, replicate_weights=style) == first != none
    other = predict(predictor, replicate_weights=thing)
    both = predict(predictor, replicate_weights=style, extra_lora=thing)
    half = predict(predictor, replicate_weights=style, lora_scale=0.5)
    assert len({none, first, other, both, half}) == 5
    with pytest.raises(DownloadError, match="not on the public internet"):
        predict(predictor, replicate_weights=thing, extra_lora="https://127.0.0.1/x.safetensors")
    assert predict(predictor, replicate_weights=style) == first
    assert predict(predictor) == none
    assert weights_digest(predictor) == before


def test_main_and_extra_are_alike_and_scales_of_the_same_lora_add(
    predictor: Predictor, addresses: dict[str, str]
) -> None:
    style = addresses["style"]
    alone = predict(predictor, replicate_weights=style, lora_scale=0.75)
    assert predict(predictor, extra_lora=style, extra_lora_scale=0.75) == alone
    twice = {"replicate_weights": style, "lora_scale": 0.5, "extra_lora": style, "extra_lora_scale": 0.25}
    assert predict(predictor, **twice) == alone
    assert predict(predictor, replicate_weights=style, lora_scale=0) == predict(predictor)
    assert predict(predictor, **{**twice, "extra_lora_scale": -0.5}) == predict(predictor)


def test_several_extra_loras_act_as_one_after_another(predictor: Predictor, addresses: dict[str, str]) -> None:
    style, thing = addresses["style"], addresses["object"]
    both = predict(predictor, replicate_weights=style, lora_scale=0.5, extra_lora=thing, extra_lora_scale=0.25)
    lines = f"{style} 1\n{thing} 0.5"
    assert predict(predictor, extra_lora=lines, extra_lora_scale=0.5) == both


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_a_data_uri_is_a_lora_like_any_other(predictor: Predictor, addresses: dict[str, str], model: str) -> None:
    uri = "data:application/octet-stream;base64," + base64.b64encode(STYLE).decode()
    expected = predict(predictor, model=model, replicate_weights=addresses["style"])
    assert predict(predictor, model=model, replicate_weights=uri) == expected


def test_image_to_image_and_inpainting_take_loras(
    predictor: Predictor, addresses: dict[str, str], save: Save, scene_image: Image.Image
) -> None:
    image = cog.Path(save(scene_image))
    mask = cog.Path(save(Image.new("L", (256, 256), 255), "mask.png"))
    for given in ({"image": image}, {"image": image, "mask": mask}):
        assert predict(predictor, **given, replicate_weights=addresses["style"]) != predict(predictor, **given)


def test_a_file_is_fetched_once_and_the_log_says_what_it_is(
    predictor: Predictor, lora_storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    address = lora_storage.put("/once.safetensors", StoredFile(STYLE)) + "?token=canary-signature"
    for _ in range(2):
        predict(predictor, replicate_weights=address, hf_api_token=cog.Secret("hf_canary"))
    assert lora_storage.count("/once.safetensors") == 1
    assert "once.safetensors: miss, 0.2 MB" in caplog.text
    assert "once.safetensors: hit, 0.2 MB" in caplog.text
    assert "scale 1" in caplog.text
    assert "rank 6" in caplog.text
    assert "canary" not in caplog.text


BAD: dict[str, tuple[StoredFile, type[Exception], str]] = {
    "a web page": (StoredFile(b"", first=[HTML_WITH_200]), LoraFormatError, "web page"),
    "cut off": (StoredFile(STYLE[:-1]), LoraFormatError, "not fully covered"),
    "refused": (StoredFile(b"", first=[Reply(403)]), LoraAccessError, "403|refus"),
    "gone": (StoredFile(b"", first=[Reply(410)]), LoraAccessError, "410|gone|no longer"),
    "failing": (StoredFile(b"", first=[Reply(500)] * 4), DownloadError, "500|failed"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_lora_says_why_and_leaves_no_trace(
    predictor: Predictor, lora_storage: Storage, addresses: dict[str, str], name: str
) -> None:
    served, error, found = BAD[name]
    golden = predict(predictor, replicate_weights=addresses["style"])
    before = weights_digest(predictor)
    address = lora_storage.put("/bad.safetensors", served)
    with pytest.raises(error, match=found) as caught:
        predict(predictor, replicate_weights=addresses["object"], extra_lora=address)
    assert "bad.safetensors" in str(caught.value)
    assert weights_digest(predictor) == before
    assert predict(predictor, replicate_weights=addresses["style"]) == golden


@pytest.fixture
def set_up(
    lora_storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, str]], Predictor]:
    """Sets up a predictor with settings of its own."""

    def set_up(settings: dict[str, str]) -> Predictor:
        own = {"FLUX_CACHE_DIR": str(tmp_path), "FLUX_CACHE_MIN_FREE_GB": "0"}
        for name, value in {**own, "FLUX_TRUSTED_HOSTS": lora_storage.authority, **settings}.items():
            monkeypatch.setenv(name, value)
        predictor = Predictor()
        predictor.setup()
        return predictor

    return set_up


def test_the_base_lora_is_part_of_every_image_and_exempt_from_the_gain(
    predictor: Predictor, addresses: dict[str, str], set_up: Callable[[dict[str, str]], Predictor]
) -> None:
    style, subject = addresses["style"], addresses["object"]
    based = set_up({"FLUX_BASE_LORA": f"{style} 0.75"})
    assert predict(based) == predict(predictor, replicate_weights=style, lora_scale=0.75)
    both = {"replicate_weights": subject, "extra_lora": style, "extra_lora_scale": 0.75}
    assert predict(based, replicate_weights=subject) == predict(predictor, **both)
    fast = {"go_fast": True, "aspect_ratio": "1:1", "megapixels": "0.25"}
    assert predict(based, **fast) == predict(predictor, **fast, replicate_weights=style, lora_scale=0.5)
    (file,) = based.predict(**predict_arguments(**QUICK))
    settings = read_settings(xmp_of(Path(file)) or "") or {}
    assert settings["base_lora"]["scale"] == 0.75
    assert settings["base_lora"]["sha256"] == hashlib.sha256(STYLE).hexdigest()


def test_a_base_lora_that_cannot_be_had_ends_the_setup(
    addresses: dict[str, str], set_up: Callable[[dict[str, str]], Predictor]
) -> None:
    with pytest.raises(SettingsError, match="FLUX_BASE_LORA: Cannot read LoRA"):
        set_up({"FLUX_BASE_LORA": "./lora"})
    with pytest.raises(SettingsError, match=r"FLUX_BASE_LORA: .*has no such thing"):
        set_up({"FLUX_BASE_LORA": addresses["style"].replace("style", "nothing")})
