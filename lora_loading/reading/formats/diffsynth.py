"""DiffSynth-Studio's own names of FLUX.1's layers, in its LoRAs of before and after its second version.

    blocks.0.attn.a_to_qkv.lora_A.default.weight          a is the image's stream, b the text's
    single_blocks.0.to_qkv_mlp.lora_A.weight              q, k, v and the MLP
    single_blocks.0.a_to_q.lora_A.weight                  the same apart, in newer files
    pipe.dit.blocks.0.ff_a.0.lora_A.default.weight        with the prefix of a training that did not remove it

Each is another name of one of Black Forest Labs' layers, or of a part of one. Source: DiffSynth-Studio,
`FluxDiTStateDictConverter`.
"""

from __future__ import annotations

import re

from lora_loading.reading.formats.bfl import bfl_targets
from lora_loading.reading.formats.targets import Family, Target
from lora_loading.shapes import ModelShapes

PREFIX = re.compile(r"(?:base_model\.model\.|pipe\.|dit\.|diffusion_model\.)*")
DOUBLE = {
    "attn.a_to_qkv": "img_attn.qkv",
    "attn.b_to_qkv": "txt_attn.qkv",
    **{f"attn.a_to_{part}": f"img_attn.qkv.{index}" for index, part in enumerate("qkv")},
    **{f"attn.b_to_{part}": f"txt_attn.qkv.{index}" for index, part in enumerate("qkv")},
    "attn.a_to_out": "img_attn.proj",
    "attn.b_to_out": "txt_attn.proj",
    "ff_a.0": "img_mlp.0",
    "ff_a.2": "img_mlp.2",
    "ff_b.0": "txt_mlp.0",
    "ff_b.2": "txt_mlp.2",
    "norm1_a.linear": "img_mod.lin",
    "norm1_b.linear": "txt_mod.lin",
    "attn.norm_q_a": "img_attn.norm.query_norm",
    "attn.norm_k_a": "img_attn.norm.key_norm",
    "attn.norm_q_b": "txt_attn.norm.query_norm",
    "attn.norm_k_b": "txt_attn.norm.key_norm",
}
SINGLE = {
    "to_qkv_mlp": "linear1",
    **{f"a_to_{part}": f"linear1.{index}" for index, part in enumerate("qkv")},
    "proj_in_besides_attn": "linear1.3",
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
    "norm_q_a": "norm.query_norm",
    "norm_k_a": "norm.key_norm",
}
OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_embedder.timestep_embedder.0": "time_in.in_layer",
    "time_embedder.timestep_embedder.2": "time_in.out_layer",
    "guidance_embedder.timestep_embedder.0": "guidance_in.in_layer",
    "guidance_embedder.timestep_embedder.2": "guidance_in.out_layer",
    "pooled_text_embedder.0": "vector_in.in_layer",
    "pooled_text_embedder.2": "vector_in.out_layer",
    "final_norm_out.linear": "final_layer.adaLN_modulation.1",
    "final_proj_out": "final_layer.linear",
}
_BLOCK = re.compile(r"(blocks|single_blocks)\.(\d+)\.(.+)")
_BLOCKS = {"blocks": ("double_blocks", DOUBLE), "single_blocks": ("single_blocks", SINGLE)}


def _bfl_name(path: str) -> str | None:
    match = _BLOCK.fullmatch(path)
    if match is None:
        return OUTSIDE.get(path)
    bfl, names = _BLOCKS[match[1]]
    name = names.get(match[3])
    return None if name is None else f"{bfl}.{match[2]}.{name}"


def _locate(path: str, shapes: ModelShapes) -> Target | None:
    name = _bfl_name(PREFIX.sub("", path, count=1))
    return None if name is None else bfl_targets(shapes).get(name)


FAMILY = Family("DiffSynth", _locate)
