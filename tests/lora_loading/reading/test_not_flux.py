"""Files of other models are refused by their names, and files of FLUX.1's kin are taken, with a word in the log.

The key lists are those of diffusers' own classes, on the meta device, with the blocks and widths of the real models.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from errors import LoraFormatError
from lora_loading.reading.adapter import read_adapter
from lora_loading.reading.formats.not_flux import MODELS, block_counts
from lora_loading.shapes import TRANSFORMER, ModelShapes, shapes_of
from tests.lora_files import Tensors, save


@pytest.fixture(scope="module")
def shapes() -> ModelShapes:
    """FLUX.1 [dev]'s."""
    with torch.device("meta"):
        return shapes_of({TRANSFORMER: FluxTransformer2DModel(guidance_embeds=True)})


def refusal(path: Path, shapes: ModelShapes) -> str:
    with pytest.raises(LoraFormatError) as error:
        read_adapter(path, shapes, label="a/b")
    return str(error.value)


def lora_over(model: nn.Module, only: str = "", prefix: str = "transformer.") -> Tensors:
    """A LoRA of rank 1 over a model's linear layers whose names match."""
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and re.search(only, name):
            tensors[f"{prefix}{name}.lora_A.weight"] = torch.ones(1, layer.in_features, dtype=torch.bfloat16)
            tensors[f"{prefix}{name}.lora_B.weight"] = torch.ones(layer.out_features, 1, dtype=torch.bfloat16)
    return tensors


ATTENTION = r"\.(?:to_q|to_k|to_v|to_out\.0|add_\w_proj|to_add_out)$"
FLUX_2: dict[str, Any] = {"num_attention_heads": 48, "num_layers": 8, "num_single_layers": 48}
CLASSES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "FLUX.2 dev": ("Flux2Transformer2DModel", FLUX_2, "", "FLUX.2 [dev]"),
    "FLUX.2 dev, attention": ("Flux2Transformer2DModel", FLUX_2, ATTENTION, "FLUX.2 [dev]"),
    "FLUX.2 klein 4B": ("Flux2Transformer2DModel", {"num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20, "joint_attention_dim": 7680}, "", "FLUX.2 [klein] 4B"),  # noqa: E501
    "FLUX.2 klein 4B, attention": ("Flux2Transformer2DModel", {"num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20}, ATTENTION, "FLUX.2 [klein] 4B"),  # noqa: E501
    "FLUX.2 klein 9B, attention": ("Flux2Transformer2DModel", {"num_attention_heads": 32, "num_layers": 8, "num_single_layers": 24}, ATTENTION, "FLUX.2 [klein] 9B"),  # noqa: E501
    "FLUX.3": ("Flux3Transformer2DModel", {}, "", "FLUX.3"),
    "Chroma": ("ChromaTransformer2DModel", {}, "", "Chroma"),
    "Flex.1": ("FluxTransformer2DModel", {"num_layers": 8}, "", "Flex.1, flux-lite or FIBO"),
    "Flex.1, attention": ("FluxTransformer2DModel", {"num_layers": 8}, ATTENTION, "Flex.1, flux-lite or FIBO"),
    "FIBO": ("BriaFiboTransformer2DModel", {"num_layers": 8}, "", "FIBO"),
    "Bria 3.2, attention": ("BriaTransformer2DModel", {"num_layers": 8, "num_single_layers": 28}, ATTENTION, "Bria"),
    "LongCat": ("LongCatImageTransformer2DModel", {"num_layers": 10, "num_single_layers": 20}, ATTENTION, "LongCat"),
    "Ovis": ("OvisImageTransformer2DModel", {}, ATTENTION, "Ovis"),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}, "", "Qwen-Image"),
    "Qwen-Image, attention": ("QwenImageTransformer2DModel", {}, ATTENTION, "Qwen-Image"),
    "SD3 medium": ("SD3Transformer2DModel", {"num_layers": 24, "num_attention_heads": 24}, ATTENTION, "Stable Diffusion 3"),  # noqa: E501
    "SD3.5 large": ("SD3Transformer2DModel", {"num_layers": 38, "num_attention_heads": 38}, ATTENTION, "Stable Diffusion 3.5 Large"),  # noqa: E501
    "Z-Image": ("ZImageTransformer2DModel", {}, "", "Z-Image"),
    "Z-Image, attention": ("ZImageTransformer2DModel", {}, ATTENTION, "Z-Image"),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}, "", "HunyuanVideo"),
    "HunyuanVideo, attention": ("HunyuanVideoTransformer3DModel", {}, r"transformer_blocks\.\d+\.attn", "HunyuanVideo"),
    "HunyuanImage": ("HunyuanImageTransformer2DModel", {}, r"transformer_blocks\.\d+\.attn", "HunyuanImage"),
    "Wan": ("WanTransformer3DModel", {}, ATTENTION, "Wan"),
    "LTX": ("LTXVideoTransformer3DModel", {}, ATTENTION, "LTX-Video"),
    "Lumina 2": ("Lumina2Transformer2DModel", {}, ATTENTION, "Lumina-Image 2"),
    "AuraFlow": ("AuraFlowTransformer2DModel", {}, ATTENTION, "AuraFlow"),
    "Cosmos": ("CosmosTransformer3DModel", {}, "", "Cosmos"),
    "Krea-2": ("Krea2Transformer2DModel", {}, "", "Krea-2"),
    "Krea-2, attention": ("Krea2Transformer2DModel", {}, ATTENTION, "Krea-2"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_a_lora_of_another_model_is_refused_by_its_name(name: str, tmp_path: Path, shapes: ModelShapes) -> None:
    cls, config, only, wanted = CLASSES[name]
    with torch.device("meta"):
        model = getattr(diffusers, cls)(**config)
    path = save(tmp_path / "x.safetensors", lora_over(model, only))
    assert f'Cannot use LoRA "a/b": it is a LoRA for {wanted}' in refusal(path, shapes)


KEYS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "SD 1.5": (
        {
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320, 1, 1),
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": (320, 4, 1, 1),
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 128),
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": (128, 4),
        },
        "Stable Diffusion 1.5 or SDXL",
    ),
    "SDXL": (
        {
            "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (4, 640),
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 1280),
        },
        "Stable Diffusion 1.5 or SDXL",
    ),
    "SDXL, diffusers": ({"unet.down_blocks.1.attentions.0.proj_in.lora_A.weight": (4, 640)}, "SDXL"),
    "SD3, kohya": ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": (4, 64)}, "Stable Diffusion 3"),
    "FLUX.2, BFL names": (
        {
            f"diffusion_model.{blocks}_blocks.{index}.{layer}.lora_{side}.weight": size
            for blocks, count, layer, rows in (("double", 5, "img_attn.qkv", 9216), ("single", 20, "linear1", 27648))
            for index in range(count)
            for side, size in (("A", (1, 3072)), ("B", (rows, 1)))
        },
        r"FLUX.2 \[klein\] 4B, by its 5 double and 20 single blocks",
    ),
    "Wan": ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (4, 64)}, "Wan"),
    "Wan, kohya": ({"lora_unet_blocks_0_cross_attn_k.lora_down.weight": (4, 64)}, "Wan"),
    "Anima": (
        {"lora_unet_llm_adapter_blocks_0_self_attn_q_proj.lora_down.weight": (4, 64)},
        "Anima",
    ),
    "Cosmos, ComfyUI": ({"diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight": (4, 64)}, "Cosmos or Anima"),
    "Krea-2, ComfyUI": ({"diffusion_model.blocks.0.attn.wq.lora_A.weight": (4, 64)}, "Krea-2"),
    "HunyuanVideo": ({"transformer.double_blocks.0.img_attn_qkv.lora_A.weight": (4, 3072)}, "HunyuanVideo"),
    "HiDream": ({"transformer.double_stream_blocks.0.block.attn1.to_q.lora_A.weight": (4, 2560)}, "HiDream"),
    "AuraFlow, ComfyUI": ({"diffusion_model.double_layers.0.attn.w1q.lora_A.weight": (4, 3072)}, "AuraFlow"),
    "Nunchaku": (
        {"single_transformer_blocks.0.mlp_fc1.lora_down": (16, 8), "transformer_blocks.0.norm1.linear.lora_up": (3, 4)},
        "Nunchaku",
    ),
    "Redux": ({"redux_down.weight": (4, 4), "redux_up.weight": (4, 4)}, "Redux"),
    "pivotal embeddings": ({"clip_l": (2, 768), "t5": (2, 4096)}, "embeddings alone"),
    "textual inversion": ({"emb_params": (2, 768)}, "embeddings alone"),
    "ControlNet": ({"controlnet_blocks.0.weight": (4, 4)}, "a ControlNet"),
    "IP-Adapter": ({"ip_adapter_proj_model.proj.weight": (4, 4)}, "an IP-Adapter"),
    "another one": ({"diffusion_model.blocks.0.strange.lora_A.weight": (4, 4)}, "another model"),
    "checkpoint, BFL": (
        {"double_blocks.0.img_attn.qkv.weight": (384, 128), "double_blocks.0.img_attn.qkv.bias": (384,)},
        "a full checkpoint",
    ),
    "checkpoint, diffusers": ({"transformer_blocks.0.attn.to_q.weight": (128, 128)}, "a full checkpoint"),
    "checkpoint, all in one": (
        {"model.diffusion_model.single_blocks.0.linear1.weight": (896, 128), "vae.decoder.conv_in.bias": (4,)},
        "a full checkpoint",
    ),
    "control LoRA, Canny": (
        {
            "img_in.lora_A.weight": (4, 128),
            "img_in.lora_B.weight": (3072, 4),
            "double_blocks.0.img_attn.norm.query_norm.scale": (128,),
        },
        "control LoRA .Canny or Depth.*from 64 to 128",
    ),
    "control LoRA, Fill": (
        {"transformer.x_embedder.lora_A.weight": (4, 384), "transformer.x_embedder.lora_B.weight": (3072, 4)},
        "control LoRA .Fill",
    ),
    "control LoRA, whole input": (
        {
            "transformer.x_embedder.weight": (3072, 128),
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (1, 3072),
            "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": (3072, 1),
        },
        "a control LoRA .it holds the whole weight of the input layer",
    ),
    "an unsupported kind": ({"lora_unet_double_blocks_0_img_attn_proj.lokr_t2": (4, 4, 1, 1)}, "not supported"),
    "something else": ({"weights": (3,)}, "none of its 1 tensors"),
    "nothing": ({}, "empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_a_file_that_is_no_flux_lora_is_refused_by_its_name(name: str, tmp_path: Path, shapes: ModelShapes) -> None:
    keys, kind = KEYS[name]
    tensors = {key: torch.ones(size, dtype=torch.bfloat16) for key, size in keys.items()}
    assert re.search(kind, refusal(save(tmp_path / "x.safetensors", tensors), shapes))


DECLARED = {
    "flux-2-klein-4b/lora": r"FLUX.2 [klein] 4B",
    "flux2": "FLUX.2 [dev]",
    "Flux.2/lora": "FLUX.2 [dev]",
    "chroma": "Chroma",
    "Chroma1/lora": "Chroma",
    "zimage": "Z-Image",
    "krea2": "Krea-2",
    "qwen_image": "Qwen-Image",
    "sdxl_1.0": "Stable Diffusion XL",
    "stable-diffusion-v1/lora": "Stable Diffusion 1.5 or 2",
    "Flex.1-alpha": "Flex",
    "wan_2.2_14b": "Wan",
    "hunyuan-video/lora": "HunyuanVideo",
}


def attention(blocks: int = 1) -> Tensors:
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=blocks, num_single_layers=1)
    return lora_over(model, ATTENTION)


@pytest.mark.parametrize("said", DECLARED)
@pytest.mark.parametrize("key", ["modelspec.architecture", "ss_base_model_version"])
def test_a_lora_of_the_same_layers_is_told_by_its_metadata(
    said: str, key: str, tmp_path: Path, shapes: ModelShapes
) -> None:
    path = save(tmp_path / "x.safetensors", attention(), {key: said})
    assert f"it is a LoRA for {DECLARED[said]}. " in refusal(path, shapes)


@pytest.mark.parametrize(
    ("said", "note"),
    [
        ("flux-1-dev/lora", None), ("flux1", None), ("Flux.1-dev/lora", None), ("flux-1-schnell", None), ("flux", None),
        ("my own thing", None), ("flux.1_kontext", "FLUX.1 Kontext"), ("Flux.1-fill-dev/lora", "FLUX.1 Fill"),
        ("flux-krea/lora", "FLUX.1 Krea"), ("flux-1-kontext/lora", "FLUX.1 Kontext"),
    ],
)  # fmt: skip
def test_loras_of_flux_1_and_its_kin_load_and_say_so(
    said: str, note: str | None, tmp_path: Path, shapes: ModelShapes
) -> None:
    notes = read_adapter(save(tmp_path / "x.safetensors", attention(), {"modelspec.architecture": said}), shapes).notes
    assert [text for text in notes if "made for" in text] == ([f"made for {note}, used on this model"] if note else [])


@pytest.mark.parametrize("said", ["", "flux1"])
def test_a_lora_of_the_first_five_blocks_loads_where_its_metadata_says_flux_1(
    said: str, tmp_path: Path, shapes: ModelShapes
) -> None:
    """Without a word it is one of FLUX.2 [klein] 4B, whose attention layers have the same names and sizes."""
    five = {key: tensor for key, tensor in attention(5).items() if "single" not in key}
    path = save(tmp_path / "x.safetensors", five, {"ss_base_model_version": said})
    if said:
        assert read_adapter(path, shapes).count(TRANSFORMER) == 5 * 8
    else:
        assert "FLUX.2 [klein] 4B, by its 5 double and 0 single blocks" in refusal(path, shapes)


def test_every_model_is_named_once() -> None:
    names = [model.name for model in MODELS]
    assert len(set(names)) == len(names)


def test_blocks_are_counted_from_zero_without_gaps() -> None:
    keys = ["lora_unet_double_blocks_0_img_attn_qkv.alpha", "transformer.transformer_blocks.1.attn.to_q.alpha"]
    assert block_counts(keys) == (2, 0)
    assert block_counts(keys[1:]) is None
    assert block_counts(["single_blocks.0.linear1.alpha", "lora_te1_x.alpha"]) == (0, 1)
    assert block_counts(["lora_te1_x.alpha"]) is None
