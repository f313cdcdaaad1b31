"""Vision transformers as image classifiers: preprocessing, and loading their weights strictly.

Knows model shapes, no thresholds and no verdicts. Preprocessing is done with Pillow and NumPy, in the order of
transformers' image processors; `tests/safety/test_pair.py` compares it with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ViTConfig, ViTForImageClassification

from errors import SettingsError

Tensors = dict[str, Tensor]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """How an image is scaled and normalised for a model."""

    size: int
    keep_aspect: bool
    """Scale the shorter side to `size` and crop the middle square, instead of squeezing both sides."""
    resample: Image.Resampling
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)


def to_pixels(images: Sequence[Image.Image], how: Preprocessing) -> Tensor:
    """(B, 3, size, size), float32, normalised."""
    mean, std = np.array(how.mean, dtype=np.float32), np.array(how.std, dtype=np.float32)
    arrays = [np.asarray(_fitted(image.convert("RGB"), how)) for image in images]
    scaled = [(array.astype(np.float64) * (1 / 255)).astype(np.float32) for array in arrays]
    return torch.from_numpy(np.stack([((array - mean) / std).transpose(2, 0, 1) for array in scaled]))


def _fitted(image: Image.Image, how: Preprocessing) -> Image.Image:
    if not how.keep_aspect:
        return image.resize((how.size, how.size), how.resample)
    shorter = min(image.size)
    width, height = (int(how.size * side / shorter) for side in image.size)
    left, top = (width - how.size) // 2, (height - how.size) // 2
    return image.resize((width, height), how.resample).crop((left, top, left + how.size, top + how.size))


def read_tensors(path: Path) -> Tensors:
    """Return a safetensors file's tensors, all of them finite, in float32 where they are floating.

    Raises:
        SettingsError: it cannot be read, or holds a number that is not finite.
    """
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises a class of its own, and OSError
        raise SettingsError(
            f"The safety checker's weights {path} cannot be read. Delete and fetch them again."
        ) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SettingsError(f"The safety checker's weights {path} hold numbers that are not finite, in {name}.")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def load_strictly(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Tensors, source: str, device: torch.device
) -> PreTrainedModel:
    """Return the model with every one of its tensors from `tensors`, and none left over, in float32 on the device.

    transformers renames tensors of older layouts; a tensor that it would initialise at random is an error here.

    Raises:
        SettingsError: a tensor is missing, unknown or of another shape.
    """
    try:
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True, dtype=torch.float32
        )
    except RuntimeError as error:  # a shape differs
        raise SettingsError(f"The safety checker's weights of {source} do not fit: {error}") from error
    wrong = [f"{what}: {sorted(map(str, info[what]))[:3]}" for what in _WRONG if info[what]]
    if wrong:
        raise SettingsError(f"The safety checker's weights of {source} are not complete and exact. {'; '.join(wrong)}")
    return model.to(device).eval().requires_grad_(False)


_WRONG = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


class VitClassifier:
    """A vision transformer of which one class means "not safe"."""

    def __init__(self, model: ViTForImageClassification, unsafe_class: int, how: Preprocessing) -> None:
        self._model = model
        self._unsafe_class = unsafe_class
        self._how = how

    @torch.inference_mode()
    def unsafe(self, images: Sequence[Image.Image]) -> list[float]:
        """The probability of the unsafe class, one an image."""
        logits = self._model(to_pixels(images, self._how).to(self._model.device)).logits  # (B, classes)
        probabilities: list[float] = logits.float().softmax(-1)[:, self._unsafe_class].tolist()
        return probabilities


def load_vit(
    config: Mapping[str, Any], tensors: Tensors, source: str, device: torch.device
) -> ViTForImageClassification:
    """Return a `ViTForImageClassification` of this configuration, loaded strictly."""
    return load_strictly(ViTForImageClassification, ViTConfig(**config), tensors, source, device)
