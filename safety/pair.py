"""The checker of the full profile: a pair, of which the second may clear what the first flags.

First, CompVis/stable-diffusion-safety-checker compares CLIP's embedding of an image with 17 concepts, each with a
threshold of its own, which are lowered a little for images close to one of 3 further concepts ("special care").
Second, Falconsai/nsfw_image_detection is asked about the images that the first flagged. It is there to reduce false
positives: the pair withholds what both find unsafe, so it is more permissive than its first stage alone.

Preprocessing is as published: the first stage sees the middle square of an image, the second the whole, squeezed.
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
from safety.manifest import WeightFile, Weights
from safety.selftest import HARMLESS, Known, bundled_image, prove
from safety.vision import Preprocessing, Tensors, VitClassifier, load_strictly, load_vit, read_tensors, to_pixels

CONCEPTS = WeightFile(
    repository="CompVis/stable-diffusion-safety-checker",
    revision="f37dfba70d35a43a32de8e67c52e68925175eeee",
    size_bytes=1_215_981_832,
    sha256="11cfe53105625af8c00faac32a430626641cce686454f3c39d837f14397d858b",
)
"""At the head of the repository's pull request 39, since its main branch holds pickles alone."""
OPINION = WeightFile(
    repository="Falconsai/nsfw_image_detection",
    revision="63e0a066bb08d2ae47324b540fba3adfd4536569",
    size_bytes=343_223_968,
    sha256="97b2ce64ec146884b37f98ee7944ca4891aa72f6827dc0cb10684a1cbecd5830",
)
"""Sizes and digests are those that the Hub publishes for these commits."""
CARE_ADJUSTMENT = 0.01
"""Added to every concept's margin for an image close to a special-care concept; as in the published class."""
OPINION_THRESHOLD = 0.5
"""The more likely of the two classes, as in the published use."""
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
    """By how much an image's cosine exceeds the nearest threshold; at most 0 for an image that is not flagged."""

    concept: float
    care: float


class Concepts(Protocol):
    """The first stage."""

    def margins(self, images: Sequence[Image.Image]) -> list[Margins]:
        """One an image."""
        ...

    def looking_for(self, image: Image.Image) -> Concepts:
        """A copy whose first concept is this image, for the self-test."""
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
        """One an image. Unlike the published class it does not round, so it flags whatever that class flags."""
        embeds = self.embeddings(images)
        model = self._model
        care = excess(embeds, model.special_care_embeds, model.special_care_embeds_weights)  # (B, 3)
        concept = excess(embeds, model.concept_embeds, model.concept_embeds_weights)  # (B, 17)
        concept = concept + CARE_ADJUSTMENT * (care > 0).any(dim=1, keepdim=True)
        # amax propagates a NaN, where Python's max would drop it
        return [Margins(*pair) for pair in torch.stack([concept.amax(1), care.amax(1)], dim=1).tolist()]

    @torch.inference_mode()
    def embeddings(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, D), float32."""
        pixels = to_pixels(images, self._how).to(self._model.device)
        embeds: Tensor = self._model.visual_projection(self._model.vision_model(pixels).pooler_output).float()
        return embeds

    def looking_for(self, image: Image.Image, threshold: float = 0.99) -> ClipConcepts:
        """A copy whose first concept is this image: it must flag the image, and only what looks like it."""
        other = copy.copy(self._model)
        other._parameters = dict(self._model._parameters)
        weights = self._model.concept_embeds_weights.clone()
        weights[0] = threshold
        concepts = self._model.concept_embeds.clone()
        concepts[0] = self.embeddings([image])[0]
        other.concept_embeds = torch.nn.Parameter(concepts, requires_grad=False)
        other.concept_embeds_weights = torch.nn.Parameter(weights, requires_grad=False)
        return ClipConcepts(other, self._how)


class Pair:
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
    """The verdict of the pair: an image passes if the first stage does not flag it, or the second clears it.

    Args:
        margins: the first stage's.
        opinion: the second stage's probability of "not safe"; None if it was not asked.
        threshold: the second stage's; a probability that is not below it confirms the first stage.
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


def load(weights: Weights, device: torch.device) -> Pair:
    """Return the pair, its weights verified and complete, self-tested.

    Raises:
        SettingsError: weights are missing, altered or incomplete, or the self-test fails.
    """
    concepts, opinion = weights.obtain(CONCEPTS), weights.obtain(OPINION)
    pair = Pair(
        ClipConcepts(load_concepts(CLIP, read_tensors(concepts), device)),
        VitClassifier(load_vit(VIT, read_tensors(opinion), OPINION.repository, device), NSFW_CLASS, VIT_PIXELS),
    )
    prove_pair(pair)
    return pair


def prove_pair(pair: Pair) -> None:
    """Harmless images pass, and a copy that looks for the first of them flags that one and no other.

    The copy's second stage confirms everything, so both stages run on the positive.

    Raises:
        SettingsError: otherwise.
    """
    prove(pair, HARMLESS)
    looking = Pair(pair.concepts.looking_for(bundled_image(HARMLESS[0].image)), pair.opinion, threshold=0.0)
    prove(looking, (Known(HARMLESS[0].image, flagged=True), *HARMLESS[1:]))


def load_concepts(config: Mapping[str, Any], tensors: Tensors, device: torch.device) -> StableDiffusionSafetyChecker:
    """Return a `StableDiffusionSafetyChecker`, loaded strictly."""
    return load_strictly(StableDiffusionSafetyChecker, CLIPConfig(**config), tensors, CONCEPTS.repository, device)
