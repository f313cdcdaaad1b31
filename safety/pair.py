"""The checker of the full profile: a pair, of which the first flags and the second may clear what the first flagged.

First, CompVis/stable-diffusion-safety-checker compares CLIP's embedding of an image with 17 concepts, each with a
threshold of its own, which are lowered a little for images close to one of 3 further concepts ("special care").
Second, Falconsai/nsfw_image_detection is asked about what the first flagged. The second was added against false
alarms: the pair withholds what both find unsafe, and is therefore more permissive than its first stage alone.

Published preprocessing is kept: the first stage sees the middle square of an image, the second all of it, squeezed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig

from safety.checker import Verdict
from safety.manifest import CONCEPTS, OPINION, Weights
from safety.vision import Preprocessing, Tensors, VitClassifier, load_strictly, load_vit, read_tensors, to_pixels

CARE_ADJUSTMENT = 0.01
"""What special care adds to every concept's margin; the published class's constant."""
OPINION_THRESHOLD = 0.5
"""The published use takes the likelier of the two classes."""
CLIP = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
    "projection_dim": 768,
}
VIT = {"image_size": 224, "patch_size": 16, "num_labels": 2, "layer_norm_eps": 1e-12}
NSFW_CLASS = 1
"""Of "normal", "nsfw"."""
CLIP_PIXELS = Preprocessing(
    size=224,
    keep_aspect=True,
    resample=Image.Resampling.BICUBIC,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
VIT_PIXELS = Preprocessing(size=224, keep_aspect=False, resample=Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class Margins:
    """How far an image is beyond the nearest threshold, a cosine; not above 0 means free of it."""

    concept: float
    care: float


class Concepts(Protocol):
    """The first stage."""

    def margins(self, images: Sequence[Image.Image]) -> list[Margins]:
        """One an image."""
        ...

    def looking_for(self, image: Image.Image) -> Concepts:
        """A copy that looks for this very image, for the self-test."""
        ...


class Opinion(Protocol):
    """The second stage."""

    def unsafe(self, images: Sequence[Image.Image]) -> list[float]:
        """The probability that it is not safe, one an image."""
        ...


class ClipConcepts:
    """The published checker's weights, without its `forward`, which blackens images and lets NaN pass."""

    def __init__(self, model: StableDiffusionSafetyChecker, how: Preprocessing = CLIP_PIXELS) -> None:
        self._model = model
        self._how = how

    @torch.inference_mode()
    def margins(self, images: Sequence[Image.Image]) -> list[Margins]:
        """One an image. Not rounded as in the published class, so never on the other side where that one flags."""
        embeds = self.embeddings(images)
        model = self._model
        care = excess(embeds, model.special_care_embeds, model.special_care_embeds_weights)  # (B, 3)
        concept = excess(embeds, model.concept_embeds, model.concept_embeds_weights)  # (B, 17)
        concept = concept + CARE_ADJUSTMENT * (care > 0).any(dim=1, keepdim=True)
        # amax carries a NaN on, where Python's max would lose it
        return [Margins(*pair) for pair in torch.stack([concept.amax(1), care.amax(1)], dim=1).tolist()]

    @torch.inference_mode()
    def embeddings(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, D), float32."""
        pixels = to_pixels(images, self._how).to(self._model.device)
        embeds: Tensor = self._model.visual_projection(self._model.vision_model(pixels).pooler_output).float()
        return embeds

    def looking_for(self, image: Image.Image, threshold: float = 0.99) -> ClipConcepts:
        """A copy whose first concept is this very image: it must flag this one, and only what looks like it."""
        other = copy.copy(self._model)
        other._parameters = dict(self._model._parameters)
        weights = self._model.concept_embeds_weights.clone()
        weights[0] = threshold
        concepts = self._model.concept_embeds.clone()
        concepts[0] = self.embeddings([image])[0]
        other.concept_embeds = torch.nn.Parameter(concepts, requires_grad=False)
        other.concept_embeds_weights = torch.nn.Parameter(weights, requires_grad=False)
        return ClipConcepts(other, self._how)


class ReferencePair:
    """Flags what both stages find unsafe; the second is asked only about what the first flags."""

    name = "reference"

    def __init__(self, concepts: Concepts, opinion: Opinion, threshold: float = OPINION_THRESHOLD) -> None:
        self.concepts = concepts
        self.opinion = opinion
        self._threshold = threshold

    def check(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Return one verdict an image."""
        margins = self.concepts.margins(images)
        suspects = [index for index, margin in enumerate(margins) if not margin.concept <= 0]
        asked = [images[index] for index in suspects]
        opinions = dict(zip(suspects, self.opinion.unsafe(asked) if asked else [], strict=True))
        return [judge(margin, opinions.get(index), self._threshold) for index, margin in enumerate(margins)]


def excess(embeds: Tensor, concepts: Tensor, thresholds: Tensor) -> Tensor:
    """(B, concepts): the cosine of each image with each concept, less the concept's threshold."""
    return normalize(embeds) @ normalize(concepts).T - thresholds


def judge(margins: Margins, opinion: float | None, threshold: float) -> Verdict:
    """The verdict of the pair; an image passes where the first stage is sure, or else the second.

    Args:
        margins: the first stage's.
        opinion: the second stage's probability of "not safe"; None where it was not asked, since the first is sure.
        threshold: the second stage's; anything that is not below it agrees with the first.
    """
    scores = (("concept", margins.concept), ("care", margins.care))
    if opinion is None:
        passes = margins.concept <= 0
        reason = "" if passes else "close to an unsafe concept, and there is no second opinion"
        return Verdict(flagged=not passes, scores=scores, reason=reason)
    passes = opinion < threshold
    return Verdict(
        flagged=not passes,
        scores=(*scores, ("second opinion", opinion)),
        reason="" if passes else "close to an unsafe concept, and the second opinion agrees",
    )


def load_reference(weights: Weights, device: torch.device) -> ReferencePair:
    """Return the pair, its weights verified and complete.

    Raises:
        SettingsError: weights are missing, altered or incomplete.
    """
    concepts, opinion = weights.obtain(CONCEPTS), weights.obtain(OPINION)
    return ReferencePair(
        ClipConcepts(load_concepts(CLIP, read_tensors(concepts), device)),
        VitClassifier(load_vit(VIT, read_tensors(opinion), OPINION.repository, device), NSFW_CLASS, VIT_PIXELS),
    )


def load_concepts(config: Mapping[str, Any], tensors: Tensors, device: torch.device) -> StableDiffusionSafetyChecker:
    """Return a `StableDiffusionSafetyChecker`, loaded strictly."""
    return load_strictly(StableDiffusionSafetyChecker, CLIPConfig(**config), tensors, CONCEPTS.repository, device)
