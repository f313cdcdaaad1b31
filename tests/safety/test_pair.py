"""The reference pair and the strict checker over small checkpoints of random weights in the published layouts.

The published weights are not at hand. What depends on them, the recorded scores, is not tested; that the architecture
in the code is theirs is held to the published files' sizes, to the byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, ViTConfig, ViTForImageClassification
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from errors import SettingsError
from fetching.hub import Hub
from fetching.hub_cache import HubCache
from safety.checker import FailClosed, Verdict
from safety.load import load_checker
from safety.manifest import WeightFile, Weights
from safety.pair import (
    CLIP,
    CLIP_PIXELS,
    CONCEPTS,
    OPINION,
    VIT,
    VIT_PIXELS,
    ClipConcepts,
    Margins,
    Pair,
    judge,
    load_concepts,
    prove_pair,
)
from safety.selftest import HARMLESS, prove
from safety.strict import MARQO, VIT_TINY, Strict, combine, from_timm, squares
from safety.vision import VitClassifier, load_vit, read_tensors, to_pixels
from tests.paths import DATA
from tests.photographs import photographs
from tests.services import HuggingFace, Repository, running_services

CPU = torch.device("cpu")
TINY_CLIP: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 224,
        "patch_size": 56,
    },
    "projection_dim": 24,
}
TINY_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 224,
    "patch_size": 56,
    "num_labels": 2,
    "layer_norm_eps": 1e-12,
}
CONCEPT_TENSORS = ("concept_embeds", "concept_embeds_weights", "special_care_embeds", "special_care_embeds_weights")
PHOTOGRAPHS = photographs()
SOME = [PHOTOGRAPHS[name] for name in ("astronaut.png", "coffee.png", "rocket.jpg", "china.jpg", "text.png")]
WHITE = Image.new("RGB", (8, 8), "white")

Tensors = dict[str, Tensor]


def shake(model: torch.nn.Module) -> None:
    """Larger weights than at the start of a training, so that different images get different results."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def published_names(tensors: Tensors) -> Tensors:
    """The names of the published concept checker, which is older than the library."""
    renamed = {f"vision_model.{name}" if name.startswith("vision_model.") else name: t for name, t in tensors.items()}
    positions = tensors["vision_model.embeddings.position_embedding.weight"].shape[0]
    ids = torch.arange(positions, device="cpu")[None]
    return {**renamed, "vision_model.vision_model.embeddings.position_ids": ids}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as FLUX_SAFETY_FOLDER names one, with small checkpoints in it."""
    folder = tmp_path_factory.mktemp("weights")
    concepts = StableDiffusionSafetyChecker(CLIPConfig(**TINY_CLIP))
    shake(concepts)
    concepts.concept_embeds_weights.data.fill_(0.9)
    concepts.special_care_embeds_weights.data.fill_(0.9)
    path = folder / CONCEPTS.repository
    concepts.save_pretrained(path)
    save_file(published_names(load_file(path / CONCEPTS.name)), path / CONCEPTS.name, metadata={"format": "pt"})
    opinion = ViTForImageClassification(ViTConfig(**TINY_VIT))
    shake(opinion)
    opinion.classifier.bias.data = torch.tensor([30.0, -30.0])
    opinion.save_pretrained(folder / OPINION.repository)
    return folder


@pytest.fixture
def tensors(weights: Path) -> Tensors:
    return load_file(weights / CONCEPTS.repository / CONCEPTS.name)


@pytest.fixture
def concepts(tensors: Tensors) -> ClipConcepts:
    return ClipConcepts(load_concepts(TINY_CLIP, tensors, CPU))


@pytest.fixture
def opinion(weights: Path) -> VitClassifier:
    tensors = read_tensors(weights / OPINION.repository / OPINION.name)
    return VitClassifier(load_vit(TINY_VIT, tensors, "opinion", CPU), 1, VIT_PIXELS)


class Stage:
    """Both stages, saying what they are told."""

    def __init__(self, concept: Any = -0.1, care: Any = -0.1, unsafe: Any = 0.1) -> None:
        self._margins = Margins(concept, care)
        self._unsafe = unsafe

    def margins(self, images: Sequence[Image.Image]) -> list[Margins]:
        return [self._margins] * len(images)

    def looking_for(self, image: Image.Image) -> Stage:
        return self

    def unsafe(self, images: Sequence[Image.Image]) -> list[float]:
        return [self._unsafe] * len(images)


# The manifest


@pytest.mark.parametrize("file", [CONCEPTS, OPINION, MARQO])
def test_the_manifest_pins_commits_and_digests_of_safetensors(file: WeightFile) -> None:
    assert len(file.revision) == 40 and len(file.sha256) == 64
    int(file.revision + file.sha256, 16)
    assert file.name.endswith(".safetensors")


def file_size(tensors: dict[str, Tensor], metadata: bool) -> int:
    """What a safetensors file of these takes: 8 bytes, the header padded to 8, the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        kind = "I64" if tensor.dtype == torch.int64 else "F32"
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    return 8 + (len(json.dumps(header, separators=(",", ":"))) + 7) // 8 * 8 + offset


def test_the_concept_checker_of_the_code_is_the_published_one_to_the_byte() -> None:
    with torch.device("meta"):
        model = StableDiffusionSafetyChecker(CLIPConfig(**CLIP))
    assert file_size(published_names(model.state_dict()), metadata=True) == CONCEPTS.size_bytes


def timm_names(model: ViTForImageClassification) -> Tensors:
    """The reverse of `from_timm`, for sizes."""
    names = {
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "vit.layernorm.": "norm.",
        "classifier": "head",
        "vit.layers": "blocks",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "attention.q_proj": "attn.qkv",
    }
    renamed = {}
    for name, tensor in model.state_dict().items():
        if "k_proj" in name or "v_proj" in name:
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = torch.cat([tensor] * 3) if "qkv" in name else tensor
    return renamed


def test_the_strict_detector_of_the_code_is_the_published_one_to_the_byte() -> None:
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(**VIT_TINY))
    assert file_size(timm_names(model), metadata=False) == MARQO.size_bytes


def test_the_second_opinion_of_the_code_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(**VIT))
    header = OPINION.size_bytes - 4 * sum(parameter.numel() for parameter in model.parameters())
    assert 0 < header < 32_768


@pytest.fixture
def small(tmp_path: Path) -> WeightFile:
    """A file of a manifest, in `tmp_path`."""
    path = tmp_path / "owner" / "name" / "model.safetensors"
    path.parent.mkdir(parents=True)
    save_file({"weight": torch.arange(4.0)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return WeightFile("owner/name", "0" * 40, path.stat().st_size, digest)


def test_a_local_folder_gives_the_verified_file(small: WeightFile, tmp_path: Path) -> None:
    assert read_tensors(Weights(str(tmp_path), HubCache(Hub())).obtain(small))["weight"].tolist() == [0, 1, 2, 3]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (flip, "has the digest"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (lambda path: path.write_bytes(b""), "has 0 bytes"),
        (lambda path: path.unlink(), "there is no"),
    ],
)
def test_damaged_weights_stop_the_setup(
    damage: Callable[[Path], None], found: str, small: WeightFile, tmp_path: Path
) -> None:
    damage(tmp_path / small.repository / small.name)
    with pytest.raises(SettingsError, match=found) as caught:
        Weights(str(tmp_path), HubCache(Hub())).obtain(small)
    assert small.repository in str(caught.value) and small.revision in str(caught.value)


@pytest.fixture
def published(small: WeightFile, tmp_path: Path) -> Iterator[tuple[HuggingFace, Weights]]:
    """The file on a stand-in for the Hub, and the manifest's way to it."""
    with running_services() as services:
        hub = services.hugging_face
        content = (tmp_path / small.repository / small.name).read_bytes()
        hub.repositories[small.repository] = Repository({small.name: content, "x.bin": b"x"}, small.revision)
        yield hub, Weights(None, HubCache(Hub(hub.address, sleep=lambda seconds: None), tmp_path / "hub"))


def test_the_hub_gives_the_verified_file_and_no_other(
    small: WeightFile, published: tuple[HuggingFace, Weights]
) -> None:
    hub, weights = published
    assert read_tensors(weights.obtain(small))["weight"].tolist() == [0, 1, 2, 3]
    assert hub.count(f"/{small.repository}/resolve/{small.revision}/x.bin") == 0


def test_the_hub_is_not_asked_for_what_was_fetched(small: WeightFile, published: tuple[HuggingFace, Weights]) -> None:
    hub, weights = published
    path = weights.obtain(small)
    hub.requests.clear()
    assert weights.obtain(small) == path
    assert hub.requests == []


def test_a_hub_that_gives_another_file_stops_the_setup(
    small: WeightFile, published: tuple[HuggingFace, Weights]
) -> None:
    _, weights = published
    with pytest.raises(SettingsError, match="still differs from what is expected"):
        weights.obtain(replace(small, sha256="0" * 64))


def test_a_hub_that_gives_nothing_stops_the_setup(small: WeightFile, published: tuple[HuggingFace, Weights]) -> None:
    _, weights = published
    with pytest.raises(SettingsError, match=r"there is no such repository.* FLUX_SAFETY_FOLDER"):
        weights.obtain(replace(small, repository="no/such"))


@pytest.mark.parametrize("name", ["reference", "strict"])
def test_without_weights_there_is_no_other_checker_instead(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no"):
        load_checker(name, Weights(str(tmp_path), HubCache(Hub())), CPU)


def test_other_weights_than_the_published_are_refused(weights: Path) -> None:
    with pytest.raises(SettingsError, match="bytes instead of 1215981832"):
        load_checker("reference", Weights(str(weights), HubCache(Hub())), CPU)


# Strict loading


def test_the_published_layout_loads_whole(tensors: Tensors) -> None:
    model = load_concepts(TINY_CLIP, tensors, CPU)
    for name, tensor in model.state_dict().items():
        published = f"vision_model.{name}" if name.startswith("vision_model.") else name
        assert torch.equal(tensor, tensors[published])


DELETED = (*CONCEPT_TENSORS, "visual_projection.weight", "vision_model.vision_model.post_layernorm.bias")


@pytest.mark.parametrize("name", DELETED)
def test_one_missing_tensor_stops_the_setup(tensors: Tensors, name: str) -> None:
    del tensors[name]
    with pytest.raises(SettingsError, match="missing_keys"):
        load_concepts(TINY_CLIP, tensors, CPU)


def test_an_unknown_tensor_stops_the_setup(tensors: Tensors) -> None:
    with pytest.raises(SettingsError, match=r"unexpected_keys.*stowaway"):
        load_concepts(TINY_CLIP, {**tensors, "stowaway": torch.zeros(1)}, CPU)


def test_a_tensor_of_another_shape_stops_the_setup(tensors: Tensors) -> None:
    with pytest.raises(SettingsError, match="do not fit"):
        load_concepts(TINY_CLIP, {**tensors, "concept_embeds": torch.zeros(16, 24)}, CPU)


@pytest.mark.parametrize("name", CONCEPT_TENSORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_the_setup(tensors: Tensors, name: str, value: float, tmp_path: Path) -> None:
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SettingsError, match=f"not finite, in {name}"):
        read_tensors(tmp_path / "model.safetensors")


def test_a_file_that_is_no_safetensors_stops_the_setup(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_tensors(tmp_path / "model.safetensors")


def test_the_second_opinion_loads_as_the_library_loads_it(weights: Path, opinion: VitClassifier) -> None:
    model = ViTForImageClassification.from_pretrained(weights / OPINION.repository).eval()
    with torch.inference_mode():
        expected = model(to_pixels(SOME, VIT_PIXELS)).logits.softmax(-1)[:, 1]
    assert opinion.unsafe(SOME) == pytest.approx(expected.tolist(), abs=1e-6)


# Preprocessing


@pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "rocket.jpg", "chelsea.png", "page.png", "retina.jpg"])
def test_our_preprocessing_is_the_librarys(name: str) -> None:
    image = PHOTOGRAPHS[name]
    clip = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values
    vit = ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)(image, return_tensors="pt").pixel_values
    assert np.abs(to_pixels([image], CLIP_PIXELS) - clip).max() < 1e-6
    assert np.abs(to_pixels([image], VIT_PIXELS) - vit).max() < 1e-6


# The first stage


def set_thresholds(concepts: ClipConcepts, concept: float, care: float = 2.0) -> ClipConcepts:
    concepts._model.concept_embeds_weights.fill_(concept)
    concepts._model.special_care_embeds_weights.fill_(care)
    return concepts


@pytest.mark.parametrize("care", [-2.0, 0.2, 2.0])
@pytest.mark.parametrize("threshold", [-0.2, 0.0, 0.1, 0.2, 0.3, 0.5])
def test_the_first_stage_flags_what_the_published_class_flags(
    concepts: ClipConcepts, threshold: float, care: float
) -> None:
    set_thresholds(concepts, threshold, care)
    pixels = to_pixels(SOME, CLIP_PIXELS)
    _, published = concepts._model(clip_input=pixels, images=[np.zeros(1) for _ in SOME])
    margins = concepts.margins(SOME)
    clear = [index for index, margin in enumerate(margins) if abs(margin.concept) > 0.001]  # it rounds to 0.001
    assert [margins[index].concept > 0 for index in clear] == [published[index] for index in clear]


@pytest.mark.parametrize("index", range(len(SOME)))
def test_a_concept_that_is_an_image_flags_that_image_and_no_other(concepts: ClipConcepts, index: int) -> None:
    looking = concepts.looking_for(SOME[index])
    assert [margin.concept > 0 for margin in looking.margins(SOME)] == [other == index for other in range(len(SOME))]


def test_looking_for_an_image_leaves_the_checker_as_it_was(concepts: ClipConcepts) -> None:
    before = concepts.margins(SOME)
    concepts.looking_for(SOME[0])
    assert concepts.margins(SOME) == before


def test_a_lower_threshold_never_flags_less(concepts: ClipConcepts) -> None:
    flagged: set[int] = set(range(len(SOME)))
    counts = []
    for threshold in np.linspace(-1, 1, 41):
        margins = set_thresholds(concepts, float(threshold)).margins(SOME)
        now = {index for index, margin in enumerate(margins) if margin.concept > 0}
        assert now <= flagged
        flagged = now
        counts.append(len(now))
    assert counts[0] == len(SOME) and counts[-1] == 0


def test_special_care_lowers_the_thresholds_by_a_hundredth(concepts: ClipConcepts) -> None:
    without = set_thresholds(concepts, 0.5, care=2.0).margins(SOME)
    with_care = set_thresholds(concepts, 0.5, care=-2.0).margins(SOME)
    raised = [after.concept - before.concept for before, after in zip(without, with_care, strict=True)]
    assert raised == pytest.approx([0.01] * len(SOME), abs=1e-6)


def test_images_checked_together_score_as_alone(concepts: ClipConcepts, opinion: VitClassifier) -> None:
    alone = [concepts.margins([image])[0].concept for image in SOME]
    assert [margin.concept for margin in concepts.margins(SOME)] == pytest.approx(alone, abs=1e-5)


# The pair

TRUTH = [
    # first stage's margin, second stage's probability, withheld
    (-0.1, 0.1, False),
    (-0.1, 0.9, False),
    (0.1, 0.1, False),
    (0.1, 0.9, True),
    (0.0, 0.9, False),
    (1e-9, 0.9, True),
    (0.1, 0.5, True),
    (0.1, 0.4999, False),
]


@pytest.mark.parametrize(("concept", "unsafe", "flagged"), TRUTH)
def test_the_pair_withholds_what_both_find_unsafe(concept: float, unsafe: float, flagged: bool) -> None:
    (verdict,) = FailClosed(Pair(Stage(concept=concept), Stage(unsafe=unsafe))).check([WHITE])
    assert (verdict.flagged, verdict.failed) == (flagged, False)


def test_the_second_opinion_is_asked_about_flagged_images_only() -> None:
    class Asked(Stage):
        def __init__(self) -> None:
            super().__init__()
            self.images: list[Image.Image] = []

        def margins(self, images: Sequence[Image.Image]) -> list[Margins]:
            return [Margins(0.1 if image.getpixel((0, 0)) == (255, 0, 0) else -0.1, -0.1) for image in images]

        def unsafe(self, images: Sequence[Image.Image]) -> list[float]:
            self.images += images
            return [0.9] * len(images)

    stages = Asked()
    red = Image.new("RGB", (8, 8), "red")
    verdicts = Pair(stages, stages).check([WHITE, red, WHITE])
    assert stages.images == [red]
    assert [verdict.flagged for verdict in verdicts] == [False, True, False]


def test_a_verdict_names_the_scores_of_both_stages() -> None:
    (verdict,) = Pair(Stage(concept=0.1), Stage(unsafe=0.9)).check([WHITE])
    assert [name for name, _ in verdict.scores] == ["concept", "care", "second opinion"]


NAN = float("nan")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Stage(concept=NAN), Stage()),
        (Stage(care=NAN), Stage()),
        (Stage(concept=0.1), Stage(unsafe=NAN)),
        (Stage(concept=None), Stage()),
        (Stage(concept=float("-inf")), Stage()),
    ],
)
def test_a_stage_without_a_number_withholds(first: Stage, second: Stage) -> None:
    (verdict,) = FailClosed(Pair(first, second)).check([WHITE])
    assert (verdict.flagged, verdict.failed) == (True, True)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("stage", ["margins", "unsafe"])
def test_a_stage_that_answers_for_another_number_of_images_withholds(stage: str, count: int) -> None:
    broken = Stage(concept=0.1)
    answer = {"margins": Margins(-0.1, -0.1), "unsafe": 0.1}[stage]
    setattr(broken, stage, lambda images: [answer] * count)
    verdicts = FailClosed(Pair(broken, broken)).check([WHITE, WHITE])
    assert [verdict.failed for verdict in verdicts] == [True, True]


@pytest.mark.parametrize("stage", ["margins", "unsafe"])
def test_a_stage_that_raises_withholds(stage: str) -> None:
    broken = Stage(concept=0.1)
    setattr(broken, stage, lambda images: 1 / 0)
    assert FailClosed(Pair(broken, broken)).check([WHITE])[0].failed


@pytest.mark.parametrize("name", CONCEPT_TENSORS)
def test_one_number_that_is_not_finite_in_memory_withholds_everything(
    concepts: ClipConcepts, opinion: VitClassifier, name: str
) -> None:
    getattr(concepts._model, name).view(-1)[0] = NAN
    verdicts = FailClosed(Pair(concepts, opinion)).check(SOME)
    assert [verdict.failed for verdict in verdicts] == [True] * len(SOME)


def test_a_broken_second_opinion_withholds_what_the_first_flags(concepts: ClipConcepts, opinion: VitClassifier) -> None:
    opinion._model.classifier.weight[0, 0] = NAN
    pair = Pair(concepts.looking_for(SOME[0]), opinion)
    assert [verdict.failed for verdict in FailClosed(pair).check(SOME)] == [True] + [False] * (len(SOME) - 1)


def test_judge_without_an_opinion_needs_a_sure_first_stage() -> None:
    assert judge(Margins(0.1, -0.1), None, 0.5).reason == "close to an unsafe concept, and there is no second opinion"
    assert not judge(Margins(-0.1, -0.1), None, 0.5).flagged


# The self-test


def test_the_self_test_passes_over_both_stages(concepts: ClipConcepts, opinion: VitClassifier) -> None:
    prove_pair(Pair(concepts, opinion))


def test_a_pair_that_sees_nothing_fails_the_self_test() -> None:
    with pytest.raises(SettingsError, match=r"failed its self-test on astronaut.jpg: it is not flagged"):
        prove_pair(Pair(Stage(), Stage()))


def test_a_pair_that_flags_everything_fails_the_self_test() -> None:
    with pytest.raises(SettingsError, match=r"failed its self-test on astronaut.jpg: it is flagged"):
        prove_pair(Pair(Stage(concept=0.1), Stage(unsafe=0.9)))


def test_a_pair_whose_stage_fails_fails_the_self_test() -> None:
    with pytest.raises(SettingsError, match="the score concept is not finite"):
        prove(Pair(Stage(concept=NAN), Stage()), HARMLESS)


# Strict


def test_timm_weights_give_timms_logits() -> None:
    """Recorded with timm 1.0.31: a vision transformer of random weights, an input, and what it made of it."""
    golden = load_file(DATA / "timm-vit.safetensors")
    tensors = {name[8:]: tensor.float() for name, tensor in golden.items() if name.startswith("weights.")}
    config = {
        "hidden_size": 12,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 8,
        "patch_size": 4,
        "num_labels": 2,
        "layer_norm_eps": VIT_TINY["layer_norm_eps"],
    }
    model = load_vit(config, from_timm(tensors), "timm", CPU)
    with torch.inference_mode():
        logits = model(golden["input"].float()).logits
    assert torch.allclose(logits, golden["logits"], atol=1e-5)


def test_an_unknown_timm_tensor_is_refused() -> None:
    with pytest.raises(SettingsError, match=r'unknown tensor "fc_norm.weight"'):
        from_timm({"fc_norm.weight": torch.zeros(1)})


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("unsafe", [0.1, 0.9])
def test_strict_withholds_what_either_finds_unsafe(first: bool, unsafe: float) -> None:
    pair = Pair(Stage(concept=0.1 if first else -0.1), Stage(unsafe=0.9))
    (verdict,) = FailClosed(Strict(pair, Stage(unsafe=unsafe))).check([WHITE])
    assert verdict.flagged == (first or unsafe == 0.9)


@pytest.mark.parametrize("answer", [NAN, None])
def test_a_strict_detector_without_a_number_withholds(answer: Any) -> None:
    pair = Pair(Stage(), Stage())
    assert FailClosed(Strict(pair, Stage(unsafe=answer))).check([WHITE])[0].failed


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_strict_detector_that_answers_for_another_number_of_parts_withholds(count: int) -> None:
    detector = Stage()
    setattr(detector, "unsafe", lambda images: [0.1] * count)  # noqa: B010
    checker = FailClosed(Strict(Pair(Stage(), Stage()), detector))
    assert checker.check([Image.new("RGB", (16, 8))])[0].failed


def test_one_unsafe_part_withholds_the_image() -> None:
    safe = Verdict(flagged=False, scores=(("concept", -0.1),))
    assert combine(safe, [0.1, 0.9, 0.1]).flagged
    assert not combine(safe, [0.1, 0.2]).flagged


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64), (64, 96), (1536, 640), (640, 1536), (16, 1440)])
def test_the_squares_cover_the_whole_image(width: int, height: int) -> None:
    pixels = np.arange(width * height).reshape(height, width).astype(np.int32)
    parts = squares(Image.fromarray(pixels, mode="I"))
    assert {part.size for part in parts} == {(min(width, height),) * 2}
    assert set(np.concatenate([np.asarray(part).ravel() for part in parts])) == set(pixels.ravel())


def test_the_strict_self_test_covers_the_detector(concepts: ClipConcepts, opinion: VitClassifier) -> None:
    prove(Strict(Pair(concepts, opinion), Stage()), HARMLESS)
    with pytest.raises(SettingsError, match="strict failed its self-test"):
        prove(Strict(Pair(concepts, opinion), Stage(unsafe=0.9)), HARMLESS)
