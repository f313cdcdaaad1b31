"""Words that an adapter brings along work in prompts, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import LoraFormatError
from lora_loading.applying.manager import AdapterManager, adapter_managers
from lora_loading.reading.adapter import LoraAdapter, read_adapter
from lora_loading.shapes import CLIP, T5, components_of
from tests.lora_files import Tensors, save
from tests.tiny_models import tiny_pipelines, weights_hash

PLAIN = "a large red circle on a white background"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_pipelines()["dev"]


@pytest.fixture(scope="module")
def manager(pipeline: Any) -> AdapterManager:
    return adapter_managers({"dev": pipeline})["dev"]


def encoded(pipeline: Any, manager: AdapterManager, prompt: str) -> tuple[Tensor, Tensor]:
    """As the engine does it: each encoder reads a prompt of its own."""
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(
            manager.prompt(CLIP, prompt), manager.prompt(T5, prompt), max_sequence_length=32
        )
    return embeds, pooled


def vectors_of(pipeline: Any, text: str) -> Tensors:
    """The vectors of a text's tokens in both encoders, as a file would bundle them."""
    clip = pipeline.tokenizer(text, add_special_tokens=False).input_ids
    t5 = pipeline.tokenizer_2(text, add_special_tokens=False).input_ids
    return {
        "clip_l": pipeline.text_encoder.get_input_embeddings().weight[clip],
        "t5": pipeline.text_encoder_2.get_input_embeddings().weight[t5],
    }


def bundle(tmp_path: Path, manager: AdapterManager, words: dict[str, Tensors]) -> LoraAdapter:
    tensors = {f"bundle_emb.{word}.{part}": t for word, parts in words.items() for part, t in parts.items()}
    return read_adapter(save(tmp_path / "x.safetensors", tensors), manager.shapes)


@pytest.mark.parametrize(("word", "means"), [("ohwx", "red"), ("Ohwx Thing", "red circle"), ("<s0>", "large red")])
def test_a_word_means_its_vectors(
    word: str, means: str, pipeline: Any, manager: AdapterManager, tmp_path: Path
) -> None:
    """A word with the vectors of known words gives what the known words give, to the bit."""
    wanted = encoded(pipeline, manager, PLAIN)
    manager.apply([(bundle(tmp_path, manager, {word: vectors_of(pipeline, means)}), 1.0)])
    found = encoded(pipeline, manager, PLAIN.replace(means, word))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    manager.apply([])


def test_nothing_is_left_behind(pipeline: Any, manager: AdapterManager, tmp_path: Path) -> None:
    before, plain = weights_hash(components_of(pipeline)), encoded(pipeline, manager, "a ohwx circle")
    manager.apply([(bundle(tmp_path, manager, {"ohwx": vectors_of(pipeline, "red")}), 1.0)])
    assert not torch.equal(encoded(pipeline, manager, "a ohwx circle")[0], plain[0])
    manager.apply([])
    assert weights_hash(components_of(pipeline)) == before
    assert all(torch.equal(a, b) for a, b in zip(encoded(pipeline, manager, "a ohwx circle"), plain, strict=True))


def test_words_are_whole_and_the_longest_counts(pipeline: Any, manager: AdapterManager, tmp_path: Path) -> None:
    red, blue = vectors_of(pipeline, "red"), vectors_of(pipeline, "blue circle")
    manager.apply([(bundle(tmp_path, manager, {"tok": red, "tok man": blue}), 1.0)])
    long = "<lora-word-0> <lora-word-1>"  # a file's words are read in the order of the alphabet
    assert manager.prompt(CLIP, "tok, TOK man, token") == f"<lora-word-2>, {long}, token"
    manager.apply([])


@pytest.mark.parametrize("carried", [False, True])
def test_our_tokens_written_by_a_user_are_nothing(
    carried: bool, pipeline: Any, manager: AdapterManager, tmp_path: Path
) -> None:
    adapter = bundle(tmp_path, manager, {"ohwx": vectors_of(pipeline, "red")})
    manager.apply([(adapter, 1.0)] if carried else [])
    assert manager.prompt(T5, "a <lora-word-0><lora-word-127> circle") == "a  circle"
    manager.apply([])


def test_other_prompts_keep_their_tokens(pipeline: Any, manager: AdapterManager) -> None:
    fresh = tiny_pipelines()["dev"]
    for prompt in (PLAIN, "<lora>", "word-0", "A photo, of lora-word-1!"):
        for name in ("tokenizer", "tokenizer_2"):
            assert getattr(pipeline, name)(prompt).input_ids == getattr(fresh, name)(prompt).input_ids


def test_clip_finds_its_end_with_the_configs_of_openai(tmp_path: Path) -> None:
    """There `eos_token_id` is 2, and the code looks for the greatest id, which a word of ours would have."""
    pipeline = tiny_pipelines()["dev"]
    pipeline.text_encoder.eos_token_id = 2
    manager = adapter_managers({"dev": pipeline})["dev"]
    wanted = encoded(pipeline, manager, PLAIN)
    manager.apply([(bundle(tmp_path, manager, {"ohwx": vectors_of(pipeline, "red")}), 1.0)])
    found = encoded(pipeline, manager, PLAIN.replace("red", "ohwx"))
    assert torch.equal(found[1], wanted[1])


def test_too_many_vectors_are_refused(pipeline: Any, manager: AdapterManager, tmp_path: Path) -> None:
    many = {f"w{i}": {"t5": torch.randn(13, 128)} for i in range(5)}
    with pytest.raises(LoraFormatError, match="65 vectors"):
        bundle(tmp_path, manager, many)


def test_vectors_of_another_model_are_refused(manager: AdapterManager, tmp_path: Path) -> None:
    with pytest.raises(LoraFormatError, match="1x768, and this model takes any number x 128"):
        bundle(tmp_path, manager, {"w": {"clip_l": torch.randn(1, 768)}})
