"""The layers of FLUX.1 and of the embedded models, by name and size, from their configurations alone. No torch.

With these a file can be judged without a model: `script/lora` needs no weights and no torch. The loaded models give the
same shapes; a test compares both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_loading.shapes import CLIP, T5, TRANSFORMER, LayerShape, ModelShapes

TINY = Path(__file__).resolve().parents[1] / "engine" / "tiny"
CONFIG_FOLDERS = {TRANSFORMER: "transformer", CLIP: "text_encoder", T5: "text_encoder_2"}
FLUX_1: Mapping[str, Mapping[str, Any]] = {
    TRANSFORMER: {
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    CLIP: {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    T5: {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24},
}
"""The configurations of black-forest-labs/FLUX.1-dev; [schnell]'s transformer has no guidance embedder."""
TIME_CHANNELS = 256
MLP_RATIO = 4


def flux_1(model: str = "dev") -> ModelShapes:
    """The shapes of FLUX.1 [dev] or [schnell]."""
    return _shapes({**FLUX_1, TRANSFORMER: {**FLUX_1[TRANSFORMER], "guidance_embeds": model == "dev"}})


@lru_cache(maxsize=2)
def tiny(model: str = "dev") -> ModelShapes:
    """The shapes of tiny-dev or tiny-schnell."""
    folders = {part: TINY / ("tiny-dev" if part != TRANSFORMER else f"tiny-{model}") for part in CONFIG_FOLDERS}
    return _shapes(
        {part: json.loads((folders[part] / CONFIG_FOLDERS[part] / "config.json").read_text()) for part in folders}
    )


def _shapes(configs: Mapping[str, Mapping[str, Any]]) -> ModelShapes:
    layers = (_transformer(configs[TRANSFORMER]), _clip(configs[CLIP]), _t5(configs[T5]))
    return ModelShapes(tuple(layer for part in layers for layer in part))


def _linear(component: str, name: str, out: int, columns: int, bias: bool = True) -> LayerShape:
    return LayerShape(component, name, (out, columns), bias)


def _transformer(config: Mapping[str, Any]) -> Iterator[LayerShape]:
    head = config["attention_head_dim"]
    width = head * config["num_attention_heads"]
    sizes = {
        "time_text_embed.timestep_embedder": TIME_CHANNELS,
        "time_text_embed.text_embedder": config["pooled_projection_dim"],
    }
    if config["guidance_embeds"]:
        sizes["time_text_embed.guidance_embedder"] = TIME_CHANNELS
    for name, columns in sizes.items():
        yield _linear(TRANSFORMER, f"{name}.linear_1", width, columns)
        yield _linear(TRANSFORMER, f"{name}.linear_2", width, width)
    yield _linear(TRANSFORMER, "context_embedder", width, config["joint_attention_dim"])
    yield _linear(TRANSFORMER, "x_embedder", width, config["in_channels"])
    for index in range(config["num_layers"]):
        yield from _double_block(f"transformer_blocks.{index}", width, head)
    for index in range(config["num_single_layers"]):
        yield from _single_block(f"single_transformer_blocks.{index}", width, head)
    yield _linear(TRANSFORMER, "norm_out.linear", 2 * width, width)
    yield _linear(TRANSFORMER, "proj_out", config["in_channels"], width)


def _double_block(block: str, width: int, head: int) -> Iterator[LayerShape]:
    for norm in ("norm1", "norm1_context"):
        yield _linear(TRANSFORMER, f"{block}.{norm}.linear", 6 * width, width)
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield LayerShape(TRANSFORMER, f"{block}.attn.{norm}", (head,), False)
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        yield _linear(TRANSFORMER, f"{block}.attn.{name}", width, width)
    for mlp in ("ff", "ff_context"):
        yield _linear(TRANSFORMER, f"{block}.{mlp}.net.0.proj", MLP_RATIO * width, width)
        yield _linear(TRANSFORMER, f"{block}.{mlp}.net.2", width, MLP_RATIO * width)


def _single_block(block: str, width: int, head: int) -> Iterator[LayerShape]:
    yield _linear(TRANSFORMER, f"{block}.norm.linear", 3 * width, width)
    yield _linear(TRANSFORMER, f"{block}.proj_mlp", MLP_RATIO * width, width)
    yield _linear(TRANSFORMER, f"{block}.proj_out", width, (1 + MLP_RATIO) * width)
    for norm in ("norm_q", "norm_k"):
        yield LayerShape(TRANSFORMER, f"{block}.attn.{norm}", (head,), False)
    for name in ("to_q", "to_k", "to_v"):
        yield _linear(TRANSFORMER, f"{block}.attn.{name}", width, width)


def _clip(config: Mapping[str, Any]) -> Iterator[LayerShape]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield _linear(CLIP, f"{layer}.self_attn.{name}", width, width)
        yield _linear(CLIP, f"{layer}.mlp.fc1", inner, width)
        yield _linear(CLIP, f"{layer}.mlp.fc2", width, inner)
        for norm in ("layer_norm1", "layer_norm2"):
            yield LayerShape(CLIP, f"{layer}.{norm}", (width,), True)
    yield LayerShape(CLIP, "final_layer_norm", (width,), True)


def _t5(config: Mapping[str, Any]) -> Iterator[LayerShape]:
    width, inner, heads = config["d_model"], config["d_ff"], config["d_kv"] * config["num_heads"]
    for index in range(config["num_layers"]):
        block = f"encoder.block.{index}.layer"
        for name in ("q", "k", "v"):
            yield _linear(T5, f"{block}.0.SelfAttention.{name}", heads, width, bias=False)
        yield _linear(T5, f"{block}.0.SelfAttention.o", width, heads, bias=False)
        for name in ("wi_0", "wi_1"):
            yield _linear(T5, f"{block}.1.DenseReluDense.{name}", inner, width, bias=False)
        yield _linear(T5, f"{block}.1.DenseReluDense.wo", width, inner, bias=False)
        for layer in (0, 1):
            yield LayerShape(T5, f"{block}.{layer}.layer_norm", (width,), False)
    yield LayerShape(T5, "encoder.final_layer_norm", (width,), False)
