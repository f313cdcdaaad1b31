"""Files that are no FLUX LoRA, told by their keys, and keys of FLUX LoRAs that may be left out.

lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight         Stable Diffusion 1.5, SDXL (kohya)
unet.down_blocks.0.attentions.0....lora_A.weight                      the same (diffusers)
lora_te2_text_model_encoder_layers_0_....lora_down.weight             SDXL's second CLIP
lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight      Stable Diffusion 3
diffusion_model.blocks.0.self_attn.q.lora_A.weight                    Wan
transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight                 Qwen-Image
double_blocks.0.img_attn.qkv.weight                                   a checkpoint of FLUX, whole
controlnet_blocks.0.weight                                            a ControlNet
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from lora_loading.shapes import TRANSFORMER, ModelShapes

OTHERS: tuple[tuple[str, str], ...] = (
    (
        r"(?:lora_unet_|unet\.|lycoris_)?(?:down|up|mid)_block|lora_unet_(?:input|output|middle)_block"
        r"|lora_te2_text_model_|lora_te_text_model_encoder_layers_(?:1[2-9]|2\d)_",
        "a LoRA for Stable Diffusion 1.5 or SDXL",
    ),
    (r"(?:.*[._])?joint_blocks[._]", "a LoRA for Stable Diffusion 3"),
    (r"(?:diffusion_model\.|lora_unet_|transformer\.)?blocks[._]\d+[._]", "a LoRA for another model (Wan or Cosmos)"),
    (r"(?:.*\.)?transformer_blocks\.\d+\.(?:img|txt)_(?:mlp|mod)\.", "a LoRA for Qwen-Image"),
    (r"controlnet_|(?:.*\.)?controlnet_(?:blocks|mode|x_embedder|single_blocks)", "a ControlNet"),
    (r"(?:.*\.)?ip_adapter|image_proj\.|ip_adapter_proj", "an IP-Adapter"),
    (r"emb_params$|string_to_param", "a textual inversion embedding"),
)
CHECKPOINT = re.compile(
    r"(?:.*\.)?(?:qkv|linear1|linear2|to_q|to_k|to_v|proj_out|proj_mlp|SelfAttention\.q|self_attn\.q_proj|conv_in)\.weight"
)


def other_kind(keys: Collection[str]) -> str | None:
    """What a file is instead of a FLUX LoRA, as far as its keys tell."""
    for pattern, kind in OTHERS:
        if any(re.match(pattern, key) for key in keys):
            return kind
    if any(map(CHECKPOINT.fullmatch, keys)):
        return "a full checkpoint"
    return None


def left_out(paths: Iterable[str], shapes: ModelShapes) -> frozenset[str]:
    """Those of the paths that mean nothing in this model and can be left out without a change of its images."""
    harmless = [r"(?:lora_te\d?[_.]|text_encoder\.|clip_l\.)(?:text_projection|logit_scale)"]
    if not any("guidance_embedder" in name for name in shapes.by_component[TRANSFORMER]):
        harmless.append(r".*guidance_(?:in|embedder)[._].*")
    pattern = re.compile("|".join(harmless))
    return frozenset(path for path in paths if pattern.fullmatch(path))
