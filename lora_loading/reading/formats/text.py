"""The text encoders' layers, in the names of transformers, with dots or underscores.

    lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight       kohya, OneTrainer: CLIP
    lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight            kohya: T5; OneTrainer says lora_te2_
    text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight      diffusers
    text_encoders.clip_l.transformer.text_model.encoder.layers.0....             ComfyUI
    clip_l.text_model.encoder.layers.0....  t5.encoder.block.0.layer.0....       OneTrainer, beside split BFL names
    t5xxl.encoder.block.0....  lora_te3.encoder.block.0....                      the same names, other prefixes

Files keep CLIP's layers below `text_model`; the transformers library does so in older versions only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from lora_loading.reading.formats.targets import Family, Target, whole
from lora_loading.shapes import CLIP, T5, ModelShapes

DOTTED = {
    CLIP: ("text_encoder.", "text_encoders.clip_l.transformer.", "clip_l.transformer.", "clip_l.", "lora_te1."),
    T5: (
        "text_encoder_2.",
        "text_encoders.t5xxl.transformer.",
        "t5xxl.transformer.",
        "t5xxl.",
        "t5.",
        "lora_te2.",
        "lora_te3.",
    ),
}
FLAT = {CLIP: ("lora_te1_", "lora_te_"), T5: ("lora_te3_", "lora_te2_")}


@lru_cache(maxsize=8)
def _targets(shapes: ModelShapes) -> Mapping[str, Target]:
    """All targets by all names with their prefixes."""
    table: dict[str, Target] = {}
    for component in (CLIP, T5):
        for name, layer in shapes.by_component[component].items():
            target = whole(layer)
            for spelling in {name, f"text_model.{name}", name.removeprefix("text_model.")}:
                table |= {f"{prefix}{spelling}": target for prefix in DOTTED[component]}
                table |= {f"{prefix}{spelling.replace('.', '_')}": target for prefix in FLAT[component]}
    return table


def _locate(path: str, shapes: ModelShapes) -> Target | None:
    return _targets(shapes).get(path.removeprefix("base_model.model."))


FAMILY = Family("text encoders", _locate)
