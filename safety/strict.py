"""A stricter choice for operators: the pair and one more detector; either of them withholds an image.

The detector is Marqo/nsfw-image-detection-384 (Apache-2.0), a ViT-tiny of 2024 whose authors report 98.6% on their
own 20,000 images. Its weights carry timm's names; they are renamed here, so that timm and torchvision are not
needed. Unlike the pair's first stage it sees the whole image: a wide or tall one in several squares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from errors import SettingsError
from safety import pair
from safety.checker import Verdict
from safety.manifest import WeightFile, Weights
from safety.selftest import HARMLESS, prove
from safety.vision import Preprocessing, Tensors, VitClassifier, load_vit, read_tensors

MARQO = WeightFile(
    repository="Marqo/nsfw-image-detection-384",
    revision="0c26ec22111b83f106d72a55f611ec35962bcb65",
    size_bytes=22_404_720,
    sha256="6bf2e0f64a1d20169736c2836e3a787b12379fdc08ba87f7d94a7a3d58eeefce",
)
THRESHOLD = 0.5
"""The more likely of the two classes, as in the published use."""
VIT_TINY = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "image_size": 384,
    "patch_size": 16,
    "num_labels": 2,
    "layer_norm_eps": 1e-6,
}
NSFW_CLASS = 0
"""Of "NSFW", "SFW"."""
PIXELS = Preprocessing(size=384, keep_aspect=True, resample=Image.Resampling.BICUBIC)
TIMM_NAMES = (
    # cls_token
    (r"cls_token", r"vit.embeddings.cls_token"),
    # pos_embed
    (r"pos_embed", r"vit.embeddings.position_embeddings"),
    # patch_embed.proj.weight
    (r"patch_embed\.proj\.(weight|bias)", r"vit.embeddings.patch_embeddings.projection.\1"),
    # blocks.0.norm1.weight
    (r"blocks\.(\d+)\.norm1\.(weight|bias)", r"vit.encoder.layer.\1.layernorm_before.\2"),
    # blocks.0.norm2.weight
    (r"blocks\.(\d+)\.norm2\.(weight|bias)", r"vit.encoder.layer.\1.layernorm_after.\2"),
    # blocks.0.attn.query.weight, split from blocks.0.attn.qkv.weight
    (r"blocks\.(\d+)\.attn\.(query|key|value)\.(weight|bias)", r"vit.encoder.layer.\1.attention.attention.\2.\3"),
    # blocks.0.attn.proj.weight
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"vit.encoder.layer.\1.attention.output.dense.\2"),
    # blocks.0.mlp.fc1.weight
    (r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)", r"vit.encoder.layer.\1.intermediate.dense.\2"),
    # blocks.0.mlp.fc2.weight
    (r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)", r"vit.encoder.layer.\1.output.dense.\2"),
    # norm.weight
    (r"norm\.(weight|bias)", r"vit.layernorm.\1"),
    # head.weight
    (r"head\.(weight|bias)", r"classifier.\1"),
)


class Strict:
    """Flags what the pair flags, and what the detector finds unsafe in any part of an image."""

    name = "strict"

    def __init__(self, first: pair.Pair, detector: pair.Opinion) -> None:
        self.first = first
        self._detector = detector

    def check(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Return one verdict an image."""
        verdicts = self.first.check(images)
        return [combine(verdict, self._unsafe(image)) for verdict, image in zip(verdicts, images, strict=True)]

    def _unsafe(self, image: Image.Image) -> list[float]:
        parts = squares(image)
        scores = self._detector.unsafe(parts)
        if len(scores) != len(parts):
            raise ValueError(f"{len(scores)} scores for {len(parts)} parts of an image")
        return scores


def combine(verdict: Verdict, unsafe: Sequence[float]) -> Verdict:
    """The two verdicts combined: the pair's, and the detector's on the worst square."""
    passes = all(score < THRESHOLD for score in unsafe)
    reasons = [verdict.reason, "" if passes else f"the strict detector's score reaches {THRESHOLD}"]
    return Verdict(
        flagged=verdict.flagged or not passes,
        scores=(*verdict.scores, *(("strict", score) for score in unsafe)),
        reason=", and ".join(filter(None, reasons)),
    )


def squares(image: Image.Image) -> list[Image.Image]:
    """The fewest squares, of the shorter side, that cover the image, evenly spaced along the longer side."""
    side, longer = min(image.size), max(image.size)
    count = math.ceil(longer / side)
    offsets = [round(step * (longer - side) / max(count - 1, 1)) for step in range(count)]
    if image.width >= image.height:
        return [image.crop((offset, 0, offset + side, side)) for offset in offsets]
    return [image.crop((0, offset, side, offset + side)) for offset in offsets]


def load(weights: Weights, device: torch.device) -> Strict:
    """Return the pair and the detector, their weights verified and complete, self-tested.

    Raises:
        SettingsError: weights are missing, altered or incomplete, or the self-test fails.
    """
    tensors = from_timm(read_tensors(weights.obtain(MARQO)))
    detector = VitClassifier(load_vit(VIT_TINY, tensors, MARQO.repository, device), NSFW_CLASS, PIXELS)
    checker = Strict(pair.load(weights, device), detector)
    prove(checker, HARMLESS)
    return checker


def from_timm(tensors: Tensors) -> Tensors:
    """The tensors of a timm vision transformer under the names of transformers.

    Raises:
        SettingsError: a name that no vision transformer has.
    """
    return {_renamed(name): tensor for name, tensor in _split(tensors)}


def _split(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if ".attn.qkv." not in name:
            yield name, tensor
            continue
        for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):  # (3 D, ...) -> 3 x (D, ...)
            yield name.replace(".qkv.", f".{part}."), piece


def _renamed(name: str) -> str:
    for pattern, replacement in TIMM_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise SettingsError(f'The safety checker\'s weights of {MARQO.repository} hold an unknown tensor "{name}".')
