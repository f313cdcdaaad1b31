"""Every format's file gives the same change of the model, and what is no FLUX LoRA is refused with its name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from torch import Tensor, nn

from errors import LoraFormatError
from lora_loading.reading.adapter import LoraAdapter, read_adapter
from lora_loading.reading.formats.bfl import bfl_targets
from lora_loading.shapes import CLIP, T5, ModelShapes, adaptable_layers, components_of, shapes_of
from tests import lora_files as files
from tests.lora_files import Change, Tensors, changes_of, expected, save
from tests.tiny_models import tiny_pipelines

Write = Callable[[list[Change]], Tensors]


@pytest.fixture(scope="module")
def components() -> dict[str, nn.Module]:
    return components_of(tiny_pipelines()["dev"])


@pytest.fixture(scope="module")
def shapes(components: dict[str, nn.Module]) -> ModelShapes:
    return shapes_of(components)


def deltas(adapter: LoraAdapter, components: dict[str, nn.Module], parameter: str = "weight") -> dict[str, Tensor]:
    """The change of each layer, in float64."""
    layers = {part: adaptable_layers(module) for part, module in components.items()}
    found: dict[str, Tensor] = {}
    for u in adapter.layers:
        if u.parameter == parameter:
            pristine = {name: layer.weight.double() for name, layer in layers[u.component].items()}
            target = getattr(layers[u.component][u.layer], u.parameter).double()
            found[u.layer] = found.get(u.layer, 0) + u.update.delta(target, pristine.__getitem__)
    return found


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert (found[name] - delta).norm() <= tolerance * delta.norm(), name


# Names


def test_bfl_names_mean_what_diffusers_conversion_of_checkpoints_says() -> None:
    """On FLUX's own sizes, which diffusers' converter has built in; each row is told by a number of its own."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    others = (".qkv.", "img_in.proj", "linear1_qkv")
    targets = bfl_targets(shapes_of({"transformer": model})).items()
    whole = {name: target for name, target in targets if not any(other in name for other in others)}
    checkpoint = {}
    for index, (name, target) in enumerate(n for n in whole.items() if not n[0].startswith("single_blocks.0.linear1.")):
        if not name.endswith("_norm"):
            rows = torch.arange(target.rows, dtype=torch.float64) + index * 1e6
            checkpoint[name if name.endswith(".scale") else f"{name}.weight"] = rows
            checkpoint |= {} if name.endswith(".scale") else {f"{name}.bias": rows}
    source = dict(checkpoint)
    wanted = convert_flux_transformer_checkpoint_to_diffusers(source)
    found = {}
    for name, target in whole.items():
        key = f"{name}.weight" if f"{name}.weight" in checkpoint else name
        for piece in target.pieces if key in checkpoint else ():
            found[piece.layer.name] = torch.cat([checkpoint[key][start:stop] for start, stop in piece.rows])
    assert found.keys() == {name.rpartition(".")[0] for name in wanted}
    for name, rows in found.items():
        assert torch.equal(rows, wanted[f"{name}.weight"]), name


# Low rank

EVERYTHING: dict[str, Write] = {
    "diffusers, ai-toolkit": files.peft_named(),
    "PEFT keys with .alpha": files.peft_with_alpha(),
    "PEFT names, lora_down, .alpha": files.peft_with_alpha("lora_down", "lora_up"),
    "DiffSynth": files.peft_named("", ".default"),
    "diffusers names without prefix": files.peft_named(""),
    "raw PEFT": files.peft_named("base_model.model."),
    "raw PEFT below transformer": files.peft_named("transformer.base_model.model."),
    "ComfyUI prefix, diffusers names": files.peft_named("diffusion_model."),
    "kohya, with embedders and final layer": files.kohya,
    "ComfyUI, lora_down": files.bfl_named("diffusion_model.", "lora_down", "lora_up"),
    "ComfyUI, lora_A": files.bfl_named("diffusion_model.", "lora_A", "lora_B", alpha=False),
    "BFL names without prefix": files.bfl_named("", "lora_A", "lora_B", alpha=False),
    "BFL names below model": files.bfl_named("model.diffusion_model.", "lora_A", "lora_B"),
    "fal Kontext": files.bfl_named("base_model.model.", "lora_A", "lora_B", alpha=False),
    "OneTrainer before it writes a file": files.peft_named("lora_transformer."),
    "OneTrainer legacy": files.flat_diffusers("lora_transformer_"),
    "OneTrainer, split BFL names": files.onetrainer_split,
    "LyCORIS LoCon": files.flat_diffusers("lycoris_"),
    "DiffSynth, own names": files.diffsynth(),
    "DiffSynth, with its pipeline's prefix": files.diffsynth("pipe.dit.", ""),
    "SimpleTuner, .lora_alpha": files.peft_with_alpha(alpha="lora_alpha"),
    "diffusers names below unet": files.peft_named("unet."),
    "mflux": files.mflux,
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_same_change_in_every_format(
    name: str, tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]
) -> None:
    changes = changes_of(shapes)
    adapter = read_adapter(save(tmp_path / "x.safetensors", EVERYTHING[name](changes)), shapes)
    assert_equal(deltas(adapter, components), expected(changes))
    assert adapter.ranks == (4, 4)
    assert not adapter.left_out


@pytest.mark.parametrize("name", ["kohya", "ComfyUI", "diffusers"])
def test_float8_files(name: str, tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]) -> None:
    writers = {"kohya": files.kohya, "ComfyUI": EVERYTHING["ComfyUI, lora_A"], "diffusers": files.peft_named()}
    changes = files.rounded(changes_of(shapes))
    adapter = read_adapter(save(tmp_path / "x.safetensors", files.fp8(writers[name])(changes)), shapes)
    assert_equal(deltas(adapter, components), expected(changes))


def test_xlabs(tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]) -> None:
    changes = [c for c in changes_of(shapes) if c.name.endswith(("qkv", "attn.proj", "linear2"))]
    adapter = read_adapter(save(tmp_path / "x.safetensors", files.xlabs(changes)), shapes)
    assert_equal(deltas(adapter, components), expected(changes))


def test_xlabs_single_qkv_leaves_the_mlp_alone(
    tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]
) -> None:
    a, b = torch.randn(2, 128), torch.randn(3 * 128, 2)
    tensors = {f"single_blocks.1.processor.qkv_lora.{n}.weight": t for n, t in (("down", a), ("up", b))}
    found = deltas(read_adapter(save(tmp_path / "x.safetensors", tensors), shapes), components)
    parts = zip("qkv", (b.double() @ a.double()).chunk(3), strict=True)
    assert_equal(found, {f"single_transformer_blocks.1.attn.to_{part}": delta for part, delta in parts})


def test_alpha_from_the_metadata_of_diffusers(
    tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]
) -> None:
    changes = changes_of(shapes)
    changes[0] = replace(changes[0], alpha=3.0)
    unscaled = [replace(change, alpha=4.0) for change in changes]
    metadata = files.peft_metadata(changes)
    path = save(tmp_path / "x.safetensors", files.peft_named()(unscaled), metadata)
    assert_equal(deltas(read_adapter(path, shapes), components), expected(changes))


def test_mixed_ranks_and_alphas(tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]) -> None:
    changes = changes_of(shapes, 2, 1.0, only="double") + changes_of(shapes, 7, 3.0, only="single")
    adapter = read_adapter(save(tmp_path / "x.safetensors", files.kohya(changes)), shapes)
    assert_equal(deltas(adapter, components), expected(changes))
    assert adapter.ranks == (2, 7)


TEXT = {
    "kohya": ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"),  # noqa: E501
    "OneTrainer": ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_te2_encoder_block_0_layer_0_SelfAttention_q"),  # noqa: E501
    "OneTrainer, BFL names": ("clip_l.text_model.encoder.layers.0.self_attn.q_proj", "t5.encoder.block.0.layer.0.SelfAttention.q"),  # noqa: E501
    "diffusers": ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"),  # noqa: E501
    "T5 with dots": ("clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj", "lora_te3.encoder.block.0.layer.0.SelfAttention.q"),  # noqa: E501
    "t5xxl": ("lora_te1.text_model.encoder.layers.0.self_attn.q_proj", "t5xxl.encoder.block.0.layer.0.SelfAttention.q"),
    "ComfyUI": ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("name", TEXT)
def test_text_encoders(name: str, tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]) -> None:
    """Only one layer of each: diffusers wants CLIP's out_proj too, and knows no T5."""
    tensors: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    layers = ("encoder.layers.0.self_attn.q_proj", 128), ("encoder.block.0.layer.0.SelfAttention.q", 256)
    for path, (layer, outputs) in zip(TEXT[name], layers, strict=True):
        a, b = torch.randn(2, 128), torch.randn(outputs, 2)
        tensors |= {f"{path}.lora_down.weight": a, f"{path}.lora_up.weight": b, f"{path}.alpha": torch.tensor(1.0)}
        wanted[layer] = 0.5 * b.double() @ a.double()
    adapter = read_adapter(save(tmp_path / "x.safetensors", tensors), shapes)
    assert {u.component for u in adapter.layers} == {CLIP, T5}
    assert_equal(deltas(adapter, components), wanted)


# Other kinds of change


def peft_file(config: Any, components: dict[str, nn.Module]) -> tuple[Tensors, dict[str, Tensor]]:
    """PEFT's own random adapter over the tiny transformer: its file's tensors, and each layer's change."""
    from peft import get_peft_model_state_dict, inject_adapter_in_model

    torch.manual_seed(0)
    plain = components["transformer"]
    model = inject_adapter_in_model(config, copy.deepcopy(plain)).double()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_")):
            parameter.data.normal_(1.0 if "magnitude" in name else 0.0, 0.1)
    tensors = {f"base_model.model.{name}": t.detach() for name, t in get_peft_model_state_dict(model).items()}
    wanted = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "merge") and hasattr(layer, "base_layer"):
            before = adaptable_layers(plain)[name].weight.double()
            layer.merge()
            wanted[name] = layer.get_base_layer().weight.detach().double() - before
    return tensors, wanted


TARGETS = ["attn.to_q", "attn.to_out.0", "ff.net.0.proj", "proj_mlp", "single_transformer_blocks.1.proj_out"]


@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "LoKr", "LoKr factored"])
def test_peft_writes_it_and_merges_it_alike(
    kind: str, tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]
) -> None:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    configs = {
        "DoRA": LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=TARGETS),
        "LoHa": LoHaConfig(r=4, alpha=4, target_modules=TARGETS),
        "LoKr": LoKrConfig(r=4, alpha=4, target_modules=TARGETS),
        "LoKr factored": LoKrConfig(r=2, alpha=2, decompose_both=True, decompose_factor=8, target_modules=TARGETS),
    }
    tensors, wanted = peft_file(configs[kind], components)
    adapter = read_adapter(save(tmp_path / "x.safetensors", tensors), shapes)
    assert len(wanted) >= 10
    assert_equal(deltas(adapter, components), wanted, 1e-5)
    assert kind.split()[0] in adapter.format


LYCORIS = {
    "kohya": ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"),
    "ComfyUI": ("diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.0.linear1"),
}


def fused_weight(components: dict[str, nn.Module], names: list[str]) -> Tensor:
    layers = adaptable_layers(components["transformer"])
    return torch.cat([layers[name].weight for name in names]).double()


def lycoris_parts(kind: str, rows: int, columns: int) -> tuple[Tensors, Tensor]:
    """A fused layer's tensors, and their product in float64."""
    torch.manual_seed(1)
    if kind == "LoHa":
        parts = {f"hada_{w}_{s}": torch.randn(*((rows, 3) if s == "a" else (3, columns))) for w in ("w1", "w2") for s in "ab"}  # noqa: E501 # fmt: skip
        d = {name: tensor.double() for name, tensor in parts.items()}
        product = (d["hada_w1_a"] @ d["hada_w1_b"]) * (d["hada_w2_a"] @ d["hada_w2_b"])
        return parts | {"alpha": torch.tensor(1.5)}, product * 0.5
    w1, left, right = torch.randn(4, 8), torch.randn(rows // 4, 3), torch.randn(3, columns // 8)
    product = torch.kron(w1.double(), left.double() @ right.double())
    if kind == "LoKr whole":
        whole = left.double() @ right.double()
        return {"lokr_w1": w1.double(), "lokr_w2": whole, "alpha": torch.tensor(7.0)}, product
    return {"lokr_w1": w1, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(1.5)}, product * 0.5


@pytest.mark.parametrize("spelling", LYCORIS)
@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr whole"])
def test_lycoris_of_fused_layers(
    spelling: str, kind: str, tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]
) -> None:
    targets = bfl_targets(shapes)
    tensors: Tensors = {}
    wanted: dict[str, Tensor] = {}
    for path, name in zip(LYCORIS[spelling], ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"), strict=True):
        parts, product = lycoris_parts(kind, targets[name].rows, 128)
        tensors |= {f"{path}.{part}": tensor for part, tensor in parts.items()}
        wanted |= {p.layer.name: product[p.rows[0][0] : p.rows[0][1]] for p in targets[name].pieces}
    found = deltas(read_adapter(save(tmp_path / "x.safetensors", tensors), shapes), components)
    assert_equal(found, wanted)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("fused", [False, True])
def test_dora_scale_is_measured_over_the_layer_of_the_file(
    axis: str, fused: bool, tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]
) -> None:
    """The oracle is LyCORIS' formula over the fused weight: magnitude * V / |V|."""
    torch.manual_seed(2)
    name = "double_blocks.0.txt_attn.qkv" if fused else "double_blocks.0.img_attn.proj"
    target = bfl_targets(shapes)[name]
    old = fused_weight(components, [piece.layer.name for piece in target.pieces])
    a, b = torch.randn(4, 128) * 0.1, torch.randn(target.rows, 4) * 0.1
    magnitude = torch.rand(target.rows, 1) + 0.5 if axis == "row" else torch.rand(1, 128) + 0.5
    path = f"lora_unet_{name.replace('.', '_')}"
    tensors = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(2.0), "dora_scale": magnitude}
    new = old + 0.5 * b.double() @ a.double()
    whole = magnitude.double() * new / new.norm(dim=1 if axis == "row" else 0, keepdim=True) - old
    saved = save(tmp_path / "x.safetensors", {f"{path}.{part}": tensor for part, tensor in tensors.items()})
    adapter = read_adapter(saved, shapes)
    assert "DoRA" in adapter.format
    wanted = {piece.layer.name: whole[piece.rows[0][0] : piece.rows[0][1]] for piece in target.pieces}
    assert_equal(deltas(adapter, components), wanted)


def test_full_differences_of_weights_biases_and_norms(
    tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]
) -> None:
    torch.manual_seed(3)
    mod, final = torch.randn(768, 128), torch.randn(256)
    query, key, value = torch.randn(32), torch.randn(32), torch.randn(32)
    tensors = {
        "diffusion_model.double_blocks.0.img_mod.lin.diff": mod,
        "diffusion_model.final_layer.adaLN_modulation.1.diff_b": final,
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.diff": query,
        "lora_unet_single_blocks_1_norm_key_norm.w_norm": key,
        "transformer.transformer_blocks.2.attn.norm_added_k.weight": value,
    }
    adapter = read_adapter(save(tmp_path / "x.safetensors", tensors), shapes)
    old = adaptable_layers(components["transformer"])["transformer_blocks.2.attn.norm_added_k"].weight
    wanted = {
        "transformer_blocks.0.norm1.linear": mod,
        "transformer_blocks.0.attn.norm_q": query,
        "single_transformer_blocks.1.attn.norm_k": key,
        "transformer_blocks.2.attn.norm_added_k": value - old,
    }
    assert_equal(deltas(adapter, components), {name: delta.double() for name, delta in wanted.items()})
    swapped = torch.cat([final[128:], final[:128]]).double()
    assert_equal(deltas(adapter, components, "bias"), {"norm_out.linear": swapped})


def test_comfyuis_linear1_without_its_mlp(
    tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]
) -> None:
    a, b = torch.randn(2, 128), torch.randn(3 * 128, 2)
    name = "diffusion_model.single_blocks.1.linear1_qkv"
    tensors = {f"{name}.lora_{n}.weight": t for n, t in (("down", a), ("up", b))}
    found = deltas(read_adapter(save(tmp_path / "x.safetensors", tensors), shapes), components)
    parts = zip("qkv", (b.double() @ a.double()).chunk(3), strict=True)
    assert_equal(found, {f"single_transformer_blocks.1.attn.to_{part}": delta for part, delta in parts})


def test_comfyuis_set_weight_is_a_norms_new_weight(
    tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]
) -> None:
    value = torch.randn(32)
    tensors = {"diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.set_weight": value}
    found = deltas(read_adapter(save(tmp_path / "x.safetensors", tensors), shapes), components)
    old = adaptable_layers(components["transformer"])["transformer_blocks.0.attn.norm_q"].weight
    assert_equal(found, {"transformer_blocks.0.attn.norm_q": (value - old).double()})


def test_ai_toolkits_magnitude_is_doras(tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]) -> None:
    """ai-toolkit, toolkit/models/DoRA.py: magnitude * V / |V| over rows, without alpha in PEFT's names."""
    name = "transformer_blocks.0.attn.to_q"
    old = adaptable_layers(components["transformer"])[name].weight.double()
    a, b, magnitude = torch.randn(4, 128) * 0.1, torch.randn(128, 4) * 0.1, torch.rand(128) + 0.5
    tensors = {"lora_A.weight": a, "lora_B.weight": b, "magnitude": magnitude}
    path = save(tmp_path / "x.safetensors", {f"transformer.{name}.{part}": t for part, t in tensors.items()})
    new = old + b.double() @ a.double()
    wanted = magnitude.double()[:, None] * new / new.norm(dim=1, keepdim=True) - old
    assert_equal(deltas(read_adapter(path, shapes), components), {name: wanted})


def test_ai_toolkits_lokr_at_its_defaults_has_an_infinite_alpha_that_means_nothing(
    tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]
) -> None:
    """Its rank of 1e10 keeps both sides whole; alpha = rank is infinite in float16."""
    name = "transformer_blocks.0.attn.to_q"
    w1, w2 = torch.randn(8, 8).half(), torch.randn(16, 16).half()
    tensors = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1e10).half()}
    for prefix in (f"transformer.{name}", f"lycoris_{name.replace('.', '_')}"):
        path = save(tmp_path / "x.safetensors", {f"{prefix}.{part}": t for part, t in tensors.items()})
        wanted = torch.kron(w1.double(), w2.double())
        assert_equal(deltas(read_adapter(path, shapes), components), {name: wanted})


def test_pefts_patterns_of_alphas_mean_what_they_mean_in_peft(
    tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]
) -> None:
    from peft import LoraConfig

    pattern = {r"transformer_blocks\.[01]\.attn\.to_q": 1, "attn.to_q": 6, "ff.net.0.proj": 3}
    config = LoraConfig(r=4, lora_alpha=8, alpha_pattern=pattern, target_modules=TARGETS)
    tensors, wanted = peft_file(config, components)
    settings = {f"transformer.{k}": v for k, v in (("lora_alpha", 8), ("r", 4), ("alpha_pattern", pattern))}
    path = save(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": json.dumps(settings)})
    assert_equal(deltas(read_adapter(path, shapes), components), wanted, 1e-5)


def test_pefts_configuration_beside_the_file_is_followed(
    tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]
) -> None:
    """save_pretrained keeps alpha there alone; each configuration makes another adapter of the file."""
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=14, use_rslora=True, target_modules=TARGETS)
    tensors, wanted = peft_file(config, components)
    path = save(tmp_path / "x.safetensors", tensors)
    text = json.dumps({"lora_alpha": 14, "use_rslora": True, "peft_type": "LORA"})
    adapter = read_adapter(path, shapes, config=text)
    assert_equal(deltas(adapter, components), wanted, 1e-5)
    assert not adapter.notes
    assert adapter.digest != read_adapter(path, shapes).digest


def test_a_scale_that_the_file_leaves_open_is_said(tmp_path: Path, shapes: ModelShapes) -> None:
    changes = changes_of(shapes, only="attn")
    open_scale = read_adapter(save(tmp_path / "x.safetensors", files.peft_named("base_model.model.")(changes)), shapes)
    assert "the file has no alpha: alpha / rank = 1 is assumed" in open_scale.summary
    assert not read_adapter(save(tmp_path / "x.safetensors", files.kohya(changes)), shapes).notes
    named = read_adapter(save(tmp_path / "x.safetensors", files.peft_named()(changes), files.peft_metadata(changes)), shapes)  # noqa: E501 # fmt: skip
    assert not named.notes


def test_one_lora_in_two_spellings_acts_once(
    tmp_path: Path, shapes: ModelShapes, components: dict[str, nn.Module]
) -> None:
    changes = changes_of(shapes)
    both = files.kohya(changes) | files.peft_named()(changes)
    adapter = read_adapter(save(tmp_path / "x.safetensors", both), shapes)
    assert_equal(deltas(adapter, components), expected(changes))
    assert f"{len(expected(changes))} layers are in the file under two names" in adapter.summary


def test_two_changes_of_one_layer_are_refused(tmp_path: Path, shapes: ModelShapes) -> None:
    both = files.kohya(changes_of(shapes)) | files.peft_named()(changes_of(shapes, seed=1, only="qkv"))
    with pytest.raises(LoraFormatError, match=r"changes the layer .* twice, as .*, and differently"):
        read_adapter(save(tmp_path / "x.safetensors", both), shapes)


def test_what_a_comfyui_extract_holds_besides_is_left_out_where_it_changes_nothing(
    tmp_path: Path, shapes: ModelShapes
) -> None:
    """Extracts of whole models keep what FLUX.1 never reads, and differences that are zero."""
    changes = changes_of(shapes, only="img_mlp")
    extra = {
        "clip_l.transformer.text_projection.lora_up.weight": torch.randn(128, 2),
        "clip_l.transformer.text_projection.lora_down.weight": torch.randn(2, 128),
        "clip_l.transformer.text_model.embeddings.position_embedding.diff": torch.zeros(77, 128),
        "t5xxl.transformer.shared.lora_up.weight": torch.zeros(100, 2),
        "t5xxl.transformer.shared.lora_down.weight": torch.randn(2, 128),
    }
    adapter = read_adapter(save(tmp_path / "x.safetensors", files.kohya(changes) | extra), shapes)
    assert sorted(adapter.left_out) == sorted(extra)
    changed = extra | {"clip_l.transformer.text_model.embeddings.position_embedding.diff": torch.ones(77, 128)}
    with pytest.raises(LoraFormatError, match=r"1 of its .* not understood, as .*position_embedding"):
        read_adapter(save(tmp_path / "x.safetensors", files.kohya(changes) | changed), shapes)


def test_a_joined_and_split_linear1_may_have_four_times_the_rank(tmp_path: Path, shapes: ModelShapes) -> None:
    a, b = torch.randn(2048, 128), torch.randn(128, 2048)
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    path = save(tmp_path / "x.safetensors", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
    assert read_adapter(path, shapes).ranks == (2048, 2048)


def test_onetrainers_output_embeddings_are_named_and_left_out(tmp_path: Path, shapes: ModelShapes) -> None:
    words = {"bundle_emb.ohwx.clip_l_out": torch.randn(1, 128), "bundle_emb.ohwx.t5_out": torch.randn(1, 128)}
    tensors = files.flat_diffusers("lora_transformer_")(changes_of(shapes, only="img_mlp"))
    adapter = read_adapter(save(tmp_path / "x.safetensors", tensors | words), shapes)
    assert set(adapter.left_out) == set(words)
    assert "not applied: bundle_emb.ohwx.clip_l_out, bundle_emb.ohwx.t5_out" in adapter.summary


def test_bundled_embeddings_are_kept_by_their_words(tmp_path: Path, shapes: ModelShapes) -> None:
    tensors = {
        "bundle_emb.ohwx man.clip_l": torch.randn(2, 128),
        "bundle_emb.ohwx man.t5": torch.randn(3, 128),
        **files.flat_diffusers("lora_transformer_")(changes_of(shapes, only="img_mlp")),
    }
    adapter = read_adapter(save(tmp_path / "x.safetensors", tensors), shapes)
    found = {(e.word, e.component): tuple(e.vectors.shape) for e in adapter.embeddings}
    assert found == {("ohwx man", CLIP): (2, 128), ("ohwx man", T5): (3, 128)}


def test_a_text_file_is_refused(tmp_path: Path, shapes: ModelShapes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(LoraFormatError, match="not a safetensors file"):
        read_adapter(path, shapes)
