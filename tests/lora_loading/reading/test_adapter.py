"""What a file must be before anything of it touches a model, and what is known of it afterwards."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from errors import LoraFormatError
from lora_loading.reading.adapter import LoraAdapter, read_adapter
from lora_loading.reading.adapter_cache import AdapterCache
from lora_loading.reading.metadata import peft_settings, trigger_words
from lora_loading.shapes import TRANSFORMER, ModelShapes, shapes_of
from tests import lora_files as files
from tests.lora_files import Tensors, changes_of, save
from tests.tiny_models import narrow_transformer

KEY = "transformer.transformer_blocks.0.attn.to_q"
FLAT = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.fixture(scope="module")
def shapes() -> ModelShapes:
    return shapes_of({TRANSFORMER: narrow_transformer()})


def good() -> Tensors:
    return {f"{KEY}.lora_A.weight": torch.randn(4, 32), f"{KEY}.lora_B.weight": torch.randn(32, 4)}


def with_nan(tensor: Tensor, value: float = float("nan")) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


BAD: dict[str, tuple[Tensors, str]] = {
    "no B": ({f"{KEY}.lora_A.weight": torch.randn(4, 32)}, "only A of the two"),
    "no A": ({f"{KEY}.lora_B.weight": torch.randn(32, 4)}, "only B of the two"),
    "an alpha alone": ({f"{KEY}.alpha": torch.tensor(1.0)}, "no whole change"),
    "a magnitude alone": ({f"{KEY}.dora_scale": torch.ones(32, 1)}, "no whole change"),
    "wide A": (good() | {f"{KEY}.lora_A.weight": torch.randn(4, 64)}, "A is 4x64, .* takes anyx32"),
    "tall B": (good() | {f"{KEY}.lora_B.weight": torch.randn(64, 4)}, "B is 64x4, .* takes 32x4"),
    "unequal ranks": (good() | {f"{KEY}.lora_B.weight": torch.randn(32, 5)}, "B is 32x5"),
    "rank 0": ({f"{KEY}.lora_A.weight": torch.ones(0, 32), f"{KEY}.lora_B.weight": torch.ones(32, 0)}, "A is 0x32"),
    "rank 2049": (
        {f"{KEY}.lora_A.weight": torch.ones(2049, 32), f"{KEY}.lora_B.weight": torch.ones(32, 2049)},
        "rank is 2049",
    ),
    "infinite alpha": (good() | {f"{KEY}.alpha": torch.tensor(float("inf"), dtype=torch.float16)}, "alpha is inf"),
    "three dimensions": (good() | {f"{KEY}.lora_A.weight": torch.randn(4, 32, 1)}, "A is 4x32x1"),
    "NaN": (good() | {f"{KEY}.lora_A.weight": with_nan(torch.randn(4, 32))}, "not finite"),
    "infinity": (good() | {f"{KEY}.lora_B.weight": with_nan(torch.randn(32, 4), float("-inf"))}, "not finite"),
    "NaN in float8": (
        good() | {f"{KEY}.lora_A.weight": with_nan(torch.randn(4, 32)).to(torch.float8_e4m3fn)},
        "not finite",
    ),
    "NaN in alpha": (good() | {f"{KEY}.alpha": torch.tensor(float("nan"))}, "not finite"),
    "alpha of two": (good() | {f"{KEY}.alpha": torch.ones(2)}, "alpha is 2 numbers"),
    "integers": (good() | {f"{KEY}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}, "of type int8"),
    "complex numbers": (good() | {f"{KEY}.lora_A.weight": torch.ones(4, 32, dtype=torch.complex64)}, "complex64"),
    "a layer beyond the last": (
        good() | {k.replace("blocks.0", "blocks.7"): v for k, v in good().items()},
        '2 of its 4 tensors are not understood, as "transformer.transformer_blocks.7',
    ),
    "a strange tensor": (good() | {"optimizer.step": torch.ones(1)}, 'understood, as "optimizer.step"'),
    "one layer in two spellings": (
        good() | {f"{KEY}.lora_down.weight": torch.randn(4, 32)},
        "the same thing twice",
    ),
    "one layer in two formats": (
        {f"{FLAT}.lora_down.weight": torch.randn(4, 32), f"{FLAT}.lora_up.weight": torch.randn(32, 4)}
        | {"transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": torch.randn(4, 32)}
        | {"transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight": torch.randn(32, 4)},
        "changes the layer .* twice",
    ),
    "LoRA and LoHa at once": (
        good() | {f"{KEY}.hada_w{i}_{s}": torch.randn(*((32, 4), (4, 32))[s == "b"]) for i in (1, 2) for s in "ab"},
        "more than one change",
    ),
    "LoHa without a factor": ({f"{KEY}.hada_w1_a": torch.randn(32, 4)}, "hada_w1_b, hada_w2_a, hada_w2_b is missing"),
    "LoKr of another size": ({f"{KEY}.lokr_w1": torch.ones(4, 4), f"{KEY}.lokr_w2": torch.ones(9, 8)}, "36x32"),
    "LoKr with half a side": ({f"{KEY}.lokr_w1": torch.ones(4, 4), f"{KEY}.lokr_w2_a": torch.ones(8, 2)}, "lokr_w2"),
    "LoKr with a core": (
        {f"{KEY}.lokr_w1": torch.ones(4, 4), f"{KEY}.lokr_t2": torch.ones(2, 2, 1, 1)},
        "lokr_t2\" is of a kind that is not supported",
    ),
    "a magnitude that fits nothing": (good() | {f"{KEY}.dora_scale": torch.ones(7, 1)}, "magnitude is 7x1"),
    "factors of a norm": (
        {k.replace("to_q", "norm_q"): v for k, v in good().items()},
        "the layer of this model is a norm",
    ),
    "a difference of another size": ({f"{KEY}.diff": torch.ones(32, 31)}, "diff is 32x31"),
    "a bias of another size": ({f"{KEY}.diff_b": torch.ones(31)}, "diff_b is 31"),
    "a wider input": (
        {"transformer.x_embedder.lora_A.weight": torch.ones(4, 32), "transformer.x_embedder.lora_B.weight": torch.ones(32, 4)},  # noqa: E501
        "control LoRA .* from 16 to 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_refused(name: str, tmp_path: Path, shapes: ModelShapes) -> None:
    tensors, message = BAD[name]
    path = save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(LoraFormatError, match=message) as refusal:
        read_adapter(path, shapes, label="some/one")
    assert 'Cannot use LoRA "some/one": ' in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


def test_a_damaged_file_is_refused_or_means_something(tmp_path: Path, shapes: ModelShapes) -> None:
    """500 files with a byte changed, or cut short: an adapter or a LoraFormatError, never anything else."""
    path = save(tmp_path / "x.safetensors", files.kohya(changes_of(shapes)))
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(500):
        damaged = bytearray(content[: rng.choice((len(content), rng.randrange(len(content))))])
        if damaged:
            damaged[rng.randrange(min(len(damaged), 12000))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert isinstance(read_adapter(path, shapes), LoraAdapter)
        except LoraFormatError:
            continue


def test_an_empty_file_is_refused(tmp_path: Path, shapes: ModelShapes) -> None:
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(LoraFormatError, match="not a safetensors file"):
        read_adapter(tmp_path / "x.safetensors", shapes)


def test_large_numbers_are_finite(tmp_path: Path, shapes: ModelShapes) -> None:
    largest = torch.finfo(torch.float32).max
    large = {name: torch.full_like(tensor, largest, dtype=torch.float64) for name, tensor in good().items()}
    assert read_adapter(save(tmp_path / "x.safetensors", large), shapes).ranks == (4, 4)
    with pytest.raises(LoraFormatError, match="not finite"):
        read_adapter(save(tmp_path / "x.safetensors", {n: t * 2 for n, t in large.items()}), shapes)


def test_what_is_known_of_an_adapter(tmp_path: Path, shapes: ModelShapes) -> None:
    metadata = {"ss_tag_frequency": json.dumps({"10_x": {"ohwx man": 12, "smiling": 3}})}
    changes = changes_of(shapes, 4, only="attn") + changes_of(shapes, 6, only="img_mlp.0")
    adapter = read_adapter(save(tmp_path / "x.safetensors", files.kohya(changes), metadata), shapes)
    assert adapter.format == "kohya: LoRA"
    assert adapter.ranks == (4, 6)
    assert adapter.count(TRANSFORMER) == 9
    held = sum(4 * (change.a.numel() + change.b.numel()) for change in changes)
    assert held <= adapter.bytes <= 2.2 * held  # the file's one buffer, and copies of what is not aligned in it
    assert adapter.trigger_words == ("ohwx man",)
    assert "kohya: LoRA, rank 4 to 6, layers: 9 of the transformer" in adapter.summary
    assert len(adapter.digest) == 64


def test_an_adapter_outlives_its_file(tmp_path: Path, shapes: ModelShapes) -> None:
    path = save(tmp_path / "x.safetensors", good())
    adapter = read_adapter(path, shapes)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert all(torch.isfinite(t).all() for u in adapter.layers for t in u.update.tensors())


def test_a_models_missing_guidance_embedder_is_named_and_left_out(tmp_path: Path) -> None:
    """schnell has none, and LoRAs of dev are used with it."""
    shapes = shapes_of({TRANSFORMER: narrow_transformer()})
    schnell = ModelShapes(tuple(layer for layer in shapes.layers if "guidance" not in layer.name))
    path = save(tmp_path / "x.safetensors", files.kohya(changes_of(shapes)))
    adapter = read_adapter(path, schnell)
    assert len(adapter.left_out) == 6
    assert all("guidance_in" in key for key in adapter.left_out)
    assert "left out 6 tensors" in adapter.summary
    assert not read_adapter(path, shapes).left_out


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, ()),
        ({"modelspec.trigger_phrase": " TOK \n style"}, ("TOK style",)),
        ({"trained_words": '["a", "b", "a"]'}, ("a", "b")),
        ({"ss_tag_frequency": '{"5_a": {"x": 5, "y": 2}, "2_b": {"x": 1, "z": 6}}'}, ("x", "z")),
        ({"ss_tag_frequency": "{"}, ()),
        ({"ss_tag_frequency": '{"a": 1, "b": {"x": "many"}}'}, ("x",)),
        ({"ss_tag_frequency": f'{{"a": {{"x": 1, "y": {10**400}}}}}'}, ("x",)),
    ],
)
def test_trigger_words(metadata: dict[str, str], words: tuple[str, ...]) -> None:
    assert trigger_words(metadata) == words


def test_scales_of_pefts_settings() -> None:
    notes = {
        "transformer.lora_alpha": 8,
        "transformer.r": 4,
        "transformer.alpha_pattern": {r"^transformer_blocks\.0\.attn\.to_q$": 2, "attn.to_k": 6},
        "text_encoder.use_rslora": True,
        "text_encoder.lora_alpha": 8,
    }
    metadata = {"lora_adapter_metadata": json.dumps(notes)}
    settings = peft_settings(metadata, TRANSFORMER)
    # PEFT matches (.*\.)?(pattern)$, so that a pattern with ^ is never found behind a prefix
    assert settings.scale(("transformer_blocks.0.attn.to_q",), 4) == 0.5
    assert settings.scale(("single_transformer_blocks.3.attn.to_k",), 4) == 1.5
    assert settings.scale(("proj_out",), 4) == 2.0
    assert peft_settings(metadata, "text_encoder").scale(("x",), 4) == 4.0
    assert peft_settings({}, TRANSFORMER).scale(("x",), 4) is None


@pytest.mark.parametrize("number", ["1" + 400 * "0", "1e400", "NaN", "true", '"8"', "null"])
def test_a_setting_that_is_no_finite_number_counts_as_absent(number: str, tmp_path: Path, shapes: ModelShapes) -> None:
    path = save(tmp_path / "x.safetensors", good())
    adapter = read_adapter(path, shapes, config=f'{{"lora_alpha": {number}, "alpha_pattern": {{"to_q": {number}}}}}')
    assert adapter.notes == ("the file has no alpha: alpha / rank = 1 is assumed",)


def test_the_cache_reads_a_file_again_only_when_it_was_forgotten(tmp_path: Path, shapes: ModelShapes) -> None:
    paths = [save(tmp_path / f"{name}.safetensors", good()) for name in "abc"]
    cache = AdapterCache(max_bytes=2 * 4 * 32 * 4 * 2)
    a, b = (cache.get(path, shapes, path.stem) for path in paths[:2])
    assert cache.get(paths[0], shapes, "a") is a
    cache.get(paths[2], shapes, "c")
    assert cache.get(paths[0], shapes, "a") is a
    paths[1].unlink()
    with pytest.raises(FileNotFoundError):
        cache.get(paths[1], shapes, "b")
    assert b.digest == "b"
    assert cache.bytes <= 2 * 4 * 32 * 4 * 2
