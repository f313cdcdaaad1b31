"""OFT and BOFT files act as at their writers: PEFT itself is asked, LyCORIS' and kohya's formulas are written out.

LyCORIS itself is the oracle in test_writers, which needs an environment of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import BOFTConfig, OFTConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.boft.layer import BOFTLayer
from torch import Tensor, nn

from errors import LoraFormatError
from lora_loading.applying.manager import AdapterManager, ComponentAdapters
from lora_loading.reading.adapter import LoraAdapter, read_adapter
from lora_loading.reading.formats.bfl import bfl_targets
from lora_loading.rotations import ColumnRotation
from lora_loading.shapes import TRANSFORMER, ModelShapes, adaptable_layers, shapes_of
from tests.lora_files import Tensors, save
from tests.tiny_models import narrow_transformer

NAME = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def model() -> FluxTransformer2DModel:
    return narrow_transformer()


@pytest.fixture(scope="module")
def shapes(model: nn.Module) -> ModelShapes:
    return shapes_of({TRANSFORMER: model})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.double() for name, layer in adaptable_layers(model).items()}


def deltas(adapter: LoraAdapter, model: nn.Module) -> dict[str, Tensor]:
    old = weights(model)
    return {u.layer: u.update.delta(old[u.layer], old.__getitem__) for u in adapter.layers}


def rotation(skew: Tensor) -> Tensor:
    """(I + Q) (I - Q)^-1."""
    identity = torch.eye(skew.shape[-1], dtype=torch.float64)
    inverse: Tensor = torch.linalg.inv(identity - skew)
    return (identity + skew) @ inverse


def oft(blocks: Tensor, weight: Tensor, limit: float | None, scale: float = 1.0) -> Tensor:
    """LyCORIS, diag_oft.py, and kohya, oft_flux.py: the new weight, with a dense block-diagonal matrix."""
    skew = blocks.double() - blocks.double().mT
    if limit is not None:
        skew = skew * min(1.0, limit / float(skew.norm()))
    dense = torch.block_diag(*(rotation(block).T for block in skew))  # type: ignore[no-untyped-call]
    identity = torch.eye(len(dense), dtype=torch.float64)
    new: Tensor = (identity + scale * (dense - identity)) @ weight.double()
    return new


def saved(tmp_path: Path, tensors: Tensors, shapes: ModelShapes, metadata: dict[str, str] | None = None) -> LoraAdapter:
    return read_adapter(save(tmp_path / "x.safetensors", tensors, metadata), shapes)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 10.0])
def test_oft_of_lycoris(alpha: float, tmp_path: Path, model: nn.Module, shapes: ModelShapes) -> None:
    """alpha is the limit of the blocks' norm for each row; 0 is none."""
    torch.manual_seed(0)
    blocks = torch.randn(8, 4, 4) * 0.3
    path = f"lycoris_{NAME.replace('.', '_')}"
    adapter = saved(tmp_path, {f"{path}.oft_blocks": blocks, f"{path}.alpha": torch.tensor(alpha)}, shapes)
    old = weights(model)[NAME]
    torch.testing.assert_close(deltas(adapter, model)[NAME], oft(blocks, old, alpha * 32 or None) - old)
    assert adapter.format == "LyCORIS: OFT"


@pytest.mark.parametrize("fused", ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"])
def test_oft_of_a_fused_layer_mixes_rows_of_all_its_layers(
    fused: str, tmp_path: Path, model: nn.Module, shapes: ModelShapes
) -> None:
    """Blocks of 12 rows do not end where q, k and v of 32 rows do."""
    torch.manual_seed(1)
    target = bfl_targets(shapes)[fused]
    size = 12 if fused.endswith("qkv") else 28
    blocks = torch.randn(target.rows // size, size, size) * 0.1
    path = f"lora_unet_{fused.replace('.', '_')}"
    rescale = torch.rand(target.rows, 1) + 0.5
    adapter = saved(tmp_path, {f"{path}.oft_blocks": blocks, f"{path}.rescale": rescale}, shapes)
    old = torch.cat([weights(model)[piece.layer.name] for piece in target.pieces])
    wanted = rescale.double() * oft(blocks, old, None) - old
    found = deltas(adapter, model)
    torch.testing.assert_close(torch.cat([found[piece.layer.name] for piece in target.pieces]), wanted)


@pytest.mark.parametrize("split", [False, True])
def test_oft_of_kohya(split: bool, tmp_path: Path, model: nn.Module, shapes: ModelShapes) -> None:
    """oft_flux.py: blocks for the layer, or for q, k, v and the MLP; the limit is alpha for each row, even if 0."""
    torch.manual_seed(2)
    target = bfl_targets(shapes)["single_blocks.0.linear1"]
    rows = [piece.layer.rows for piece in target.pieces] if split else [target.rows]
    blocks = [torch.randn(4, count // 4, count // 4) for count in rows]
    path = "oft_unet_single_blocks_0_linear1"
    tensors = {f"{path}.oft_blocks.{index}": tensor for index, tensor in enumerate(blocks)}
    adapter = saved(tmp_path, {**tensors, f"{path}.alpha": torch.tensor(1e-2)}, shapes)
    old = torch.cat([weights(model)[piece.layer.name] for piece in target.pieces])
    parts = zip(blocks, torch.split(old, rows), strict=True)
    wanted = torch.cat([oft(own, piece, 1e-2 * len(piece)) for own, piece in parts]) - old
    found = deltas(adapter, model)
    torch.testing.assert_close(torch.cat([found[p.layer.name] for p in target.pieces]), wanted, rtol=1e-5, atol=1e-7)


def butterfly(blocks: Tensor, weight: Tensor, scale: float) -> Tensor:
    """LyCORIS, functional/boft.py: each stage as a dense matrix between two permutations."""
    size, new = blocks.shape[-1], weight.double()
    for stage, own in enumerate(blocks.double() - blocks.double().mT):
        apart = 2**stage * size // 2
        order = torch.arange(len(new)).reshape(-1, 2, apart).transpose(1, 2).reshape(-1)
        identity = torch.eye(size, dtype=torch.float64)
        turned = [scale * rotation(block) + (1 - scale) * identity for block in own]
        dense = torch.block_diag(*turned)  # type: ignore[no-untyped-call]
        mixed = torch.empty_like(new)
        mixed[order] = dense @ new[order]
        new = mixed
    return new


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0, 2.0])
def test_boft_of_lycoris_blends_each_stage_with_the_identity(scale: float, tmp_path: Path, shapes: ModelShapes) -> None:
    torch.manual_seed(3)
    model = narrow_transformer()
    old, blocks = weights(model)[NAME], torch.randn(3, 8, 4, 4) * 0.2
    adapter = saved(tmp_path, {f"lycoris_{NAME.replace('.', '_')}.oft_blocks": blocks}, shapes)
    assert adapter.format == "LyCORIS: BOFT"
    manager = AdapterManager([ComponentAdapters(TRANSFORMER, model)])
    manager.apply([(adapter, scale)])
    found = adaptable_layers(model)[NAME].weight.double()
    torch.testing.assert_close(found, butterfly(blocks, old, scale), rtol=1e-5, atol=1e-6)
    manager.apply([])
    assert torch.equal(adaptable_layers(model)[NAME].weight.double(), old)


TARGETS = ["to_q", "ff.net.2", "proj_mlp"]
CONFIGS = {
    "OFT": OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "OFT, exact": OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=TARGETS),
    "OFT, seven terms": OFTConfig(oft_block_size=8, num_cayley_neumann_terms=7, target_modules=TARGETS),
    "OFT, three terms": OFTConfig(oft_block_size=8, num_cayley_neumann_terms=3, target_modules=TARGETS),
    "OFT, shared block": OFTConfig(oft_block_size=4, block_share=True, target_modules=TARGETS),
    "BOFT": BOFTConfig(boft_block_size=8, target_modules=TARGETS),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_writes_it_and_merges_it_alike(name: str, tmp_path: Path, shapes: ModelShapes) -> None:
    torch.manual_seed(4)
    plain = narrow_transformer()
    adapted = inject_adapter_in_model(CONFIGS[name], narrow_transformer()).double()
    for key, parameter in adapted.named_parameters():
        if "oft_" in key:
            parameter.data.normal_(1.0 if "boft_s" in key else 0.0, 0.05)
    tensors = {f"base_model.model.{k}": t.detach().float() for k, t in get_peft_model_state_dict(adapted).items()}
    settings = {f"transformer.{k}": v for k, v in CONFIGS[name].to_dict().items() if isinstance(v, int | float)}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    adapter = saved(tmp_path, tensors, shapes, None if name == "OFT" else metadata)
    assert ("its default series of 5 terms is assumed" in adapter.summary) == (name == "OFT")
    found, old = deltas(adapter, plain), weights(plain)
    assert len(found) == 4
    for layer, module in adapted.named_modules():
        if layer in found:
            module.merge()
            new = module.get_base_layer().weight.detach()
            torch.testing.assert_close(found[layer], new - old[layer], rtol=1e-5, atol=1e-6)


MARKERS = {
    "as trained": torch.tensor(True),
    "saved in bf16": torch.tensor(1.0, dtype=torch.bfloat16),
    "of one element": torch.ones(1),
    "that says no": torch.tensor(False),
    "not there": None,
}


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("size", [2, 8])
def test_onetrainers_scaled_oft(
    marker: str, size: int, tmp_path: Path, model: FluxTransformer2DModel, shapes: ModelShapes
) -> None:
    """OneTrainer, oft_utils.py: PEFT's rotation of weights that are divided by 2 sqrt(size - 1)."""
    torch.manual_seed(7)
    value = MARKERS[marker]
    divisor = 1.0 if value is None or not value.any() else 2 * (size - 1) ** 0.5
    config = OFTConfig(oft_block_size=size, target_modules=[NAME])
    adapted = inject_adapter_in_model(config, narrow_transformer()).double()
    triangles = torch.randn(32 // size, size * (size - 1) // 2) * 0.2
    layer = adapted.get_submodule(NAME)
    layer.oft_R["default"].weight.data = triangles.double() / divisor
    layer.merge()
    path = f"lora_transformer_{NAME.replace('.', '_')}"
    tensors = {f"{path}.oft_R.weight": triangles} | ({} if value is None else {f"{path}.oft_R.scaled_oft": value})
    adapter = saved(tmp_path, tensors, shapes)
    assert adapter.format == "OneTrainer: OFT"
    wanted = layer.get_base_layer().weight.detach() - weights(model)[NAME]
    torch.testing.assert_close(deltas(adapter, model)[NAME], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_pefts_butterfly_in_several_stages(stages: int) -> None:
    """PEFT builds several stages with a CUDA extension alone; its permutations and transform run anywhere."""
    torch.manual_seed(5)
    size, count, columns = 4, 8, 32
    raw, row_scale, weight = torch.randn(stages, count, size, size) * 0.3, torch.rand(16, 1), torch.randn(16, columns)
    layer = BOFTLayer(nn.Linear(columns, 16))
    whole = torch.eye(columns)
    for stage in range(stages):
        order = layer.block_butterfly_perm(columns, count // 2**stage, size // 2, stages - 1)
        permutation = layer.perm2mat(order)
        dense = torch.block_diag(*layer.cayley_batch(raw[stage]))  # type: ignore[no-untyped-call]
        whole = permutation @ dense @ permutation.T @ whole
    update = ColumnRotation((raw - raw.mT) / 2, None, row_scale)
    torch.testing.assert_close(update.delta(weight, lambda _: weight), row_scale * (weight @ whole.T) - weight)


@pytest.mark.parametrize(
    ("part", "size"),
    [
        ("oft_blocks", (8, 5, 5)), ("oft_blocks", (4, 4, 4)), ("oft_blocks", (5, 8, 4, 4)), ("oft_blocks", (32,)),
        ("oft_R.weight", (3, 6)), ("oft_R.weight", (8, 7)), ("boft_R", (1, 8, 4, 4)), ("rescale", (32, 1)),
    ],
)  # fmt: skip
def test_rotations_that_do_not_fit_are_refused(
    part: str, size: tuple[int, ...], tmp_path: Path, shapes: ModelShapes
) -> None:
    with pytest.raises(LoraFormatError, match=r"whole LoRA for FLUX\.1"):
        saved(tmp_path, {f"transformer.{NAME}.{part}": torch.ones(size)}, shapes)


@pytest.mark.parametrize(
    ("part", "size", "number"),
    [
        ("oft_blocks", (8, 4, 4), "alpha"), ("oft_blocks", (2, 8, 4, 4), "alpha"), ("oft_blocks.0", (8, 4, 4), "alpha"),
        ("oft_R.weight", (8, 6), "oft_R.scaled_oft"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("count", [0, 2])
def test_a_rotation_has_one_alpha_or_marker(
    part: str, size: tuple[int, ...], number: str, count: int, tmp_path: Path, shapes: ModelShapes
) -> None:
    tensors = {f"transformer.{NAME}.{part}": torch.ones(size), f"transformer.{NAME}.{number}": torch.ones(count)}
    with pytest.raises(LoraFormatError, match=rf"{number.rpartition('.')[2]} is {count} numbers instead of one"):
        saved(tmp_path, tensors, shapes)


def test_a_rotation_and_a_lora_add_up(tmp_path: Path, shapes: ModelShapes) -> None:
    """Two adapters on one layer: both changes are of the original weight."""
    torch.manual_seed(6)
    model = narrow_transformer()
    old, blocks = weights(model)[NAME], torch.randn(8, 4, 4) * 0.3
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    turned = saved(tmp_path, {f"transformer.{NAME}.oft_blocks": blocks}, shapes)
    added = saved(tmp_path, {f"transformer.{NAME}.lora_A.weight": a, f"transformer.{NAME}.lora_B.weight": b}, shapes)
    AdapterManager([ComponentAdapters(TRANSFORMER, model)]).apply([(turned, 0.5), (added, 1.0)])
    layer = adaptable_layers(model)[NAME]
    found = (layer(torch.eye(32)) - layer.bias).T.double()
    wanted = oft(blocks, old, None, 0.5) + b.double() @ a.double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
