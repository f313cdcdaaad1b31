"""Black Forest Labs' names of the layers, with dots, behind any prefix.

    diffusion_model.double_blocks.0.img_attn.proj.lora_down.weight        ComfyUI
    double_blocks.0.img_attn.qkv.lora_A.weight                            without a prefix
    base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight           fal, Kontext
    transformer.double_blocks.0.img_attn.qkv.0.lora_down.weight           OneTrainer: q, k, v apart, and linear1.0 to 3
    diffusion_model.single_blocks.0.linear1_qkv.lora_down.weight          ComfyUI, USO: linear1 without its MLP

A fused layer, such as qkv, holds the rows of several layers of diffusers; their sizes come from the model's shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache

from lora_loading.reading.formats.diffusers import PREFIX
from lora_loading.reading.formats.targets import Family, Target, fused, swapped, whole
from lora_loading.shapes import TRANSFORMER, LayerShape, ModelShapes

DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear1_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
OUTSIDE = {
    "img_in": ("x_embedder",),
    "img_in.proj": ("x_embedder",),  # OneTrainer
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SWAPPED = "final_layer.adaLN_modulation.1"
"""In BFL's layer the shift comes before the scale, in diffusers' the scale before the shift."""


@lru_cache(maxsize=8)
def bfl_targets(shapes: ModelShapes) -> Mapping[str, Target]:
    """All targets of a model by their BFL names, and the parts of fused layers by name and number."""
    layers = shapes.by_component[TRANSFORMER]
    table: dict[str, Target] = {}
    for name, parts in _names(layers):
        if not all(part in layers for part in parts):
            continue
        found = tuple(layers[part] for part in parts)
        table[name] = swapped(name, found[0]) if name == SWAPPED else _target(name, found)
        if name.endswith("_norm"):
            table[f"{name}.scale"] = table[name]
        if len(found) > 1 and name[-4:] != "_qkv":
            table |= {f"{name}.{index}": whole(layer) for index, layer in enumerate(found)}
    return table


def _target(name: str, layers: tuple[LayerShape, ...]) -> Target:
    return whole(layers[0]) if len(layers) == 1 else fused(name, layers)


def _names(layers: Mapping[str, LayerShape]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each BFL name with diffusers' names of the layers that it holds."""
    for bfl, diffusers, block in (
        ("double_blocks", "transformer_blocks", DOUBLE),
        ("single_blocks", "single_transformer_blocks", SINGLE),
    ):
        for index in range(_count(layers, diffusers)):
            for name, parts in block.items():
                yield f"{bfl}.{index}.{name}", tuple(f"{diffusers}.{index}.{part}" for part in parts)
    yield from OUTSIDE.items()


def _count(layers: Mapping[str, LayerShape], blocks: str) -> int:
    found = (re.match(rf"{blocks}\.(\d+)\.", name) for name in layers)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _locate(path: str, shapes: ModelShapes) -> Target | None:
    return bfl_targets(shapes).get(PREFIX.sub("", path, count=1))


FAMILY = Family("BFL names", _locate)
