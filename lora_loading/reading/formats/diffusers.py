"""diffusers' own names, as PEFT, diffusers' scripts, ai-toolkit, SimpleTuner and DiffSynth write them.

transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight       diffusers, ai-toolkit
transformer_blocks.0.attn.to_q.lora_A.default.weight                  DiffSynth
base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight         PEFT's save_pretrained
unet.transformer_blocks.0.attn.to_q.lora_A.weight                     the prefix of older scripts
diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight          ComfyUI's prefix before these names
"""

from __future__ import annotations

import re

from lora_loading.reading.formats.targets import Family, Target, whole
from lora_loading.shapes import TRANSFORMER, ModelShapes

PREFIX = re.compile(r"(?:base_model\.model\.|(?:lora_)?transformer\.|diffusion_model\.|unet\.|model\.|module\.)*")


def _locate(path: str, shapes: ModelShapes) -> Target | None:
    layer = shapes.by_component[TRANSFORMER].get(PREFIX.sub("", path, count=1))
    return None if layer is None else whole(layer)


FAMILY = Family("diffusers", _locate)
