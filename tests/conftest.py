"""What the tests share: one loaded predictor, images on disk, and a picker of arguments."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cog.input import FieldInfo
from PIL import Image

from engine.engine import Engine
from logs import configure_logging
from predict import Predictor
from request import GenerationRequest, Mode, build_request
from tests.services import Storage
from training.world import Scene, Thing, draw_scene, place

QUICK: dict[str, Any] = {
    "aspect_ratio": "custom",
    "width": 256,
    "height": 256,
    "num_inference_steps": 3,
    "seed": 7,
    "output_format": "png",
}
"""Inputs that make a small image fast."""


def predict_arguments(**given: Any) -> dict[str, Any]:
    """The arguments of `predict`, each at its default unless given; a server fills them in the same way."""
    parameters = inspect.signature(Predictor.predict).parameters.values()
    defaults = {p.name: p.default.default for p in parameters if isinstance(p.default, FieldInfo)}
    return {**defaults, "prompt": "a red circle on a white background", **given}


def request_of(**given: Any) -> GenerationRequest:
    """A request built from the defaults and what is given."""
    names = inspect.signature(build_request).parameters
    arguments = {name: value for name, value in predict_arguments(**given).items() if name in names}
    extra = {name: value for name, value in given.items() if name in names}
    return build_request(**{**arguments, **extra})


@pytest.fixture(scope="session")
def lora_storage() -> Iterator[Storage]:
    """A host that the session's predictor fetches LoRAs from."""
    with Storage("127.0.0.1") as server:
        yield server


@pytest.fixture(scope="session")
def predictor(lora_storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """A predictor of the tiny profile, set up once."""
    configure_logging()
    predictor = Predictor()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FLUX_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        environment.setenv("FLUX_CACHE_MIN_FREE_GB", "0")
        environment.setenv("FLUX_TRUSTED_HOSTS", lora_storage.authority)
        predictor.setup()
    return predictor


@pytest.fixture(scope="session")
def engine(predictor: Predictor) -> Engine:
    """The predictor's engine."""
    return predictor.engine


@pytest.fixture
def save(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Save an image below the temporary folder, as an uploaded input lies there."""
    with tempfile.TemporaryDirectory(prefix="flux-test-") as folder:

        def write(image: Image.Image, name: str = "image.png", **options: Any) -> Path:
            path = Path(folder) / name
            image.save(path, **options)
            return path

        yield write


@pytest.fixture(scope="session")
def scene_image() -> Image.Image:
    """A blue square on a white background, 256x256."""
    import random

    scene = Scene("white", (Thing("square", "blue"),))
    return draw_scene(scene, 256, 256, place(scene, 256, 256, random.Random(1)))


@pytest.fixture
def broken_vae(engine: Engine) -> Iterator[None]:
    """The VAE gives numbers that are not finite."""
    vae = engine.exact.models["dev"].pipelines[Mode.TXT2IMG].vae
    weight = next(vae.decoder.parameters())
    original = weight.detach().clone()
    weight.data.fill_(float("nan"))
    yield
    weight.data.copy_(original)
