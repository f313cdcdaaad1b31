"""XLabs-AI's attention processors.

double_blocks.0.processor.qkv_lora1.down.weight       1 is the image's stream, 2 the text's
double_blocks.0.processor.proj_lora2.up.weight
single_blocks.0.processor.qkv_lora.down.weight        q, k and v of linear1, without its mlp
single_blocks.0.processor.proj_lora.up.weight         linear2
"""

from __future__ import annotations

import re

from lora_loading.reading.formats.bfl import bfl_targets
from lora_loading.reading.formats.diffusers import PREFIX
from lora_loading.reading.formats.targets import Family, Target, fused
from lora_loading.shapes import ModelShapes

PATTERN = re.compile(r"((?:double|single)_blocks\.\d+)\.processor\.(qkv|proj)_lora([12]?)")
NAMES = {
    ("qkv", "1"): "img_attn.qkv",
    ("qkv", "2"): "txt_attn.qkv",
    ("proj", "1"): "img_attn.proj",
    ("proj", "2"): "txt_attn.proj",
    ("qkv", ""): "linear1",
    ("proj", ""): "linear2",
}


def _locate(path: str, shapes: ModelShapes) -> Target | None:
    match = PATTERN.fullmatch(PREFIX.sub("", path, count=1))
    if match is None:
        return None
    name = NAMES[match[2], match[3]]
    target = bfl_targets(shapes).get(f"{match[1]}.{name}")
    if target is None or name != "linear1":
        return target
    return fused(f"{target.name} (q, k, v)", tuple(piece.layer for piece in target.pieces[:3]))


FAMILY = Family("XLabs", _locate)
