"""diffusers' own names, as PEFT, diffusers' scripts, ai-toolkit, SimpleTuner, mflux and DiffSynth write them.

transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight       diffusers, ai-toolkit
transformer_blocks.0.attn.to_q.lora_A.default.weight                  DiffSynth
base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight         PEFT's save_pretrained
unet.transformer_blocks.0.attn.to_q.lora_A.weight                     the prefix of older scripts
diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight          ComfyUI's prefix before these names
transformer.transformer_blocks.0.ff.linear1.lora_A                    mflux: its own names of the layers of an MLP
"""

from __future__ import annotations

import re

from lora_loading.reading.formats.targets import Family, Target, whole
from lora_loading.shapes import TRANSFORMER, ModelShapes

PREFIX = re.compile(r"(?:base_model\.model\.|(?:lora_)?transformer\.|diffusion_model\.|unet\.|model\.|module\.)*")
MFLUX = {
    ".ff.linear1": ".ff.net.0.proj",
    ".ff.linear2": ".ff.net.2",
    ".ff_context.linear1": ".ff_context.net.0.proj",
    ".ff_context.linear2": ".ff_context.net.2",
}
"""How names end in mflux, and in diffusers."""


def _locate(path: str, shapes: ModelShapes) -> Target | None:
    name = PREFIX.sub("", path, count=1)
    end = next((end for end in MFLUX if name.endswith(end)), "")
    layer = shapes.by_component[TRANSFORMER].get(name.removesuffix(end) + MFLUX.get(end, ""))
    return None if layer is None else whole(layer)


FAMILY = Family("diffusers", _locate)
