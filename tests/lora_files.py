"""LoRA files as trainers and libraries write them: one change of the model, in each format's keys and layouts.

The change is drawn for layers as BFL names them, since those are the coarsest; formats that keep q, k and v apart get
the rows of B. Where a format has no alpha, the scale is in B. Key lists are those of:

    kohya           sd-scripts, networks/lora_flux.py: LoRANetwork and its saved `lora_unet_`, `lora_te1_`, `lora_te3_`
    ComfyUI         comfy/lora.py: model_lora_keys_unet, load_lora
    XLabs           x-flux, src/flux/modules/layers.py: the attention processors
    OneTrainer      modules/util/convert/lora/convert_flux_lora.py
    LyCORIS         lycoris/modules: locon, loha, lokr, full, norms
    DiffSynth       diffsynth/utils/state_dict_converters/flux_dit.py: FluxDiTStateDictConverter
    SimpleTuner     simpletuner/helpers/training/lora_format.py
    mflux           mflux/dreambooth/lora_layers/lora_layers.py: LoRALayers.save
    diffusers, PEFT written by the libraries themselves where they can (see test_formats)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_loading.reading.adapter import LoraAdapter
from lora_loading.reading.formats.bfl import bfl_targets
from lora_loading.reading.formats.targets import Target
from lora_loading.reading.layers import LayerUpdate
from lora_loading.shapes import TRANSFORMER, ModelShapes
from lora_loading.updates import Dora, Full, LowRank

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Change:
    """alpha / rank * B @ A of one layer in BFL's names."""

    name: str
    target: Target
    a: Tensor
    b: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.a.shape[0]

    @property
    def pieces(self) -> Iterable[tuple[str, Tensor]]:
        """Each layer of the model, and its rows of B."""
        for piece in self.target.pieces:
            yield piece.layer.name, torch.cat([self.b[start:stop] for start, stop in piece.rows])


def changes_of(shapes: ModelShapes, rank: int = 4, alpha: float = 8.0, seed: int = 0, only: str = "") -> list[Change]:
    """A change of each linear layer whose BFL name contains `only`."""
    generator = torch.Generator().manual_seed(seed)
    changes = []
    for name, target in bfl_targets(shapes).items():
        # parts of fused layers have names of their own, as in qkv.0; mlp.0, mlp.2 and Modulation.1 are whole
        part_of_fused = name.rpartition(".")[0].endswith(("qkv", "linear1")) or name.endswith("linear1_qkv")
        if only in name and len(target.weight) == 2 and not part_of_fused and name != "img_in.proj":
            a = torch.randn(rank, target.weight[1], generator=generator) * 0.1
            b = torch.randn(target.rows, rank, generator=generator) * 0.1
            changes.append(Change(name, target, a, b, alpha))
    return changes


def expected(changes: Iterable[Change]) -> dict[str, Tensor]:
    """The change of each layer of the model in float64: the oracle."""
    return {name: change.scale * (b.double() @ change.a.double()) for change in changes for name, b in change.pieces}


def adapter_of(shapes: ModelShapes, rank: int = 4, alpha: float = 8.0, seed: int = 0, only: str = "") -> LoraAdapter:
    """An adapter of random factors, without a file."""
    layers = [
        LayerUpdate(TRANSFORMER, name, "weight", LowRank(c.a, b, c.scale))
        for c in changes_of(shapes, rank, alpha, seed, only)
        for name, b in c.pieces
    ]
    return LoraAdapter(f"{rank} {alpha} {seed} {only}", "test", tuple(layers))


def kinds_of(shapes: ModelShapes) -> list[LoraAdapter]:
    """Adapters of every kind for the narrow transformer."""
    low = LowRank(torch.randn(3, 32) * 0.1, torch.randn(32, 3) * 0.1, 0.5)
    name = "transformer_blocks.0.attn.to_k"
    dora = LoraAdapter("dora", "test", (LayerUpdate(TRANSFORMER, name, "weight", Dora(low, torch.rand(32, 1))),))
    norm = Full(torch.randn(16))
    norms = LoraAdapter("norm", "test", (LayerUpdate(TRANSFORMER, "transformer_blocks.0.attn.norm_q", "weight", norm),))
    return [
        dora,
        norms,
        adapter_of(shapes, 2, seed=1, only="attn"),
        adapter_of(shapes, 9, seed=2),
        adapter_of(shapes, 30, seed=3, only="linear"),
    ]


def save(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file."""
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, path, dict(metadata) if metadata else None)
    return path


# Low rank


def peft_named(prefix: str = "transformer.", adapter: str = "") -> Callable[[list[Change]], Tensors]:
    """transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight, the scale in B."""

    def write(changes: list[Change]) -> Tensors:
        tensors = {}
        for change in changes:
            for name, b in change.pieces:
                tensors[f"{prefix}{name}.lora_A{adapter}.weight"] = change.a
                tensors[f"{prefix}{name}.lora_B{adapter}.weight"] = b * change.scale
        return tensors

    return write


def peft_with_alpha(
    down: str = "lora_A", up: str = "lora_B", alpha: str = "alpha"
) -> Callable[[list[Change]], Tensors]:
    """...to_q.lora_A.weight with ...to_q.alpha, an integer where it is whole."""

    def write(changes: list[Change]) -> Tensors:
        tensors = {}
        for change in changes:
            for name, b in change.pieces:
                tensors[f"transformer.{name}.{down}.weight"] = change.a
                tensors[f"transformer.{name}.{up}.weight"] = b
                tensors[f"transformer.{name}.{alpha}"] = torch.tensor(int(change.alpha))
        return tensors

    return write


def bfl_named(prefix: str, down: str, up: str, alpha: bool = True) -> Callable[[list[Change]], Tensors]:
    """diffusion_model.double_blocks.0.img_attn.proj.lora_down.weight."""

    def write(changes: list[Change]) -> Tensors:
        tensors = {}
        for change in changes:
            tensors[f"{prefix}{change.name}.{down}.weight"] = change.a
            tensors[f"{prefix}{change.name}.{up}.weight"] = change.b * (1 if alpha else change.scale)
            if alpha:
                tensors[f"{prefix}{change.name}.alpha"] = torch.tensor(change.alpha)
        return tensors

    return write


def kohya(changes: list[Change]) -> Tensors:
    """lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight."""
    flat = [replace(change, name=f"lora_unet_{change.name.replace('.', '_')}") for change in changes]
    return bfl_named("", "lora_down", "lora_up")(flat)


def flat_diffusers(prefix: str) -> Callable[[list[Change]], Tensors]:
    """lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight."""

    def write(changes: list[Change]) -> Tensors:
        tensors = {}
        for change in changes:
            for name, b in change.pieces:
                flat = f"{prefix}{name.replace('.', '_')}"
                tensors[f"{flat}.lora_down.weight"] = change.a
                tensors[f"{flat}.lora_up.weight"] = b
                tensors[f"{flat}.alpha"] = torch.tensor(change.alpha)
        return tensors

    return write


def onetrainer_split(changes: list[Change]) -> Tensors:
    """transformer.double_blocks.0.img_attn.qkv.0.lora_down.weight: the parts of fused layers by number."""
    tensors = {}
    for change in changes:
        parts = list(change.pieces)
        for index, (_, b) in enumerate(parts):
            name = f"transformer.{change.name}" + (f".{index}" if len(parts) > 1 else "")
            name += ".proj" if change.name == "img_in" else ""
            # the one whole layer whose rows stand in another order is not cut, so it keeps the file's order
            tensors[f"{name}.lora_down.weight"] = change.a
            tensors[f"{name}.lora_up.weight"] = b if len(parts) > 1 else change.b
            tensors[f"{name}.alpha"] = torch.tensor(change.alpha)
    return tensors


MFLUX = {
    "ff.net.0.proj": "ff.linear1", "ff.net.2": "ff.linear2",
    "ff_context.net.0.proj": "ff_context.linear1", "ff_context.net.2": "ff_context.linear2",
}  # fmt: skip


def mflux(changes: list[Change]) -> Tensors:
    """transformer.transformer_blocks.0.ff.linear1.lora_A; diffusers' names but for an MLP's, the scale in B."""
    tensors = {}
    for change in changes:
        for name, b in change.pieces:
            block, _, layer = name.partition(".ff")
            name = f"{block}.{MFLUX[f'ff{layer}']}" if layer else name
            tensors[f"transformer.{name}.lora_A"] = change.a
            tensors[f"transformer.{name}.lora_B"] = b * change.scale
    return tensors


DIFFSYNTH = {
    "img_attn.qkv": "attn.a_to_qkv", "txt_attn.qkv": "attn.b_to_qkv",
    "img_attn.proj": "attn.a_to_out", "txt_attn.proj": "attn.b_to_out", "img_mlp.0": "ff_a.0", "img_mlp.2": "ff_a.2",
    "txt_mlp.0": "ff_b.0", "txt_mlp.2": "ff_b.2", "img_mod.lin": "norm1_a.linear", "txt_mod.lin": "norm1_b.linear",
    "linear1": "to_qkv_mlp", "linear2": "proj_out", "modulation.lin": "norm.linear",
    "img_in": "x_embedder", "txt_in": "context_embedder", "time_in.in_layer": "time_embedder.timestep_embedder.0",
    "time_in.out_layer": "time_embedder.timestep_embedder.2",
    "guidance_in.in_layer": "guidance_embedder.timestep_embedder.0",
    "guidance_in.out_layer": "guidance_embedder.timestep_embedder.2", "vector_in.in_layer": "pooled_text_embedder.0",
    "vector_in.out_layer": "pooled_text_embedder.2", "final_layer.linear": "final_proj_out",
    "final_layer.adaLN_modulation.1": "final_norm_out.linear",
}  # fmt: skip


def diffsynth(prefix: str = "", adapter: str = ".default") -> Callable[[list[Change]], Tensors]:
    """blocks.0.attn.a_to_qkv.lora_A.default.weight: PEFT over DiffSynth's own model, alpha = rank."""

    def write(changes: list[Change]) -> Tensors:
        tensors = {}
        for change in changes:
            block, _, rest = change.name.partition("_blocks.")
            index, _, layer = rest.partition(".")
            blocks = {"double": "blocks", "single": "single_blocks"}
            name = f"{blocks[block]}.{index}.{DIFFSYNTH[layer]}" if rest else DIFFSYNTH[change.name]
            tensors[f"{prefix}{name}.lora_A{adapter}.weight"] = change.a
            tensors[f"{prefix}{name}.lora_B{adapter}.weight"] = change.b * change.scale
        return tensors

    return write


XLABS = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2", "img_attn.proj": "proj_lora1", "txt_attn.proj": "proj_lora2"}  # noqa: E501 # fmt: skip


def xlabs(changes: list[Change]) -> Tensors:
    """double_blocks.0.processor.qkv_lora1.down.weight; without an alpha."""
    tensors = {}
    for change in changes:
        block, index, layer = change.name.split(".", 2)
        name = f"{block}.{index}.processor.{XLABS.get(layer, 'proj_lora')}"
        tensors[f"{name}.down.weight"] = change.a
        tensors[f"{name}.up.weight"] = change.b * change.scale
    return tensors


def fp8(write: Callable[[list[Change]], Tensors]) -> Callable[[list[Change]], Tensors]:
    """The same file stored in float8; `rounded` gives changes that survive it."""
    return lambda changes: {
        name: tensor if name.endswith("alpha") else tensor.to(torch.float8_e4m3fn)
        for name, tensor in write(changes).items()
    }


def rounded(changes: list[Change]) -> list[Change]:
    """The changes with factors that float8 holds exactly."""
    return [
        replace(c, a=c.a.to(torch.float8_e4m3fn).float(), b=c.b.to(torch.float8_e4m3fn).float(), alpha=c.a.shape[0])
        for c in changes
    ]


def peft_metadata(changes: list[Change]) -> dict[str, str]:
    """What diffusers saves beside factors whose scale is not in B: lora_adapter_metadata."""
    first, *others = changes
    odd = {name: first.alpha for name, _ in first.pieces}
    notes = {"r": first.a.shape[0], "lora_alpha": others[0].alpha, "alpha_pattern": odd}
    notes = {f"transformer.{name}": value for name, value in notes.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(notes)}
