"""Sizes of models, as two rows of one table: FLUX.1 as it is, and the same in small for a CPU. Builds nothing.

The small one has the same classes, pipelines, rows and report; its times say nothing about the large one's. No number
of tokens is equal to a width in either: torch.compile would take such two for one, and compile again where they part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.plan import SIZES
from request import Size


@dataclass(frozen=True)
class Scale:
    """Sizes of the models, and how much is measured with them."""

    name: str
    transformer: Mapping[str, Any]
    """The config of both models' transformers; their guidance embedder apart."""
    vae: Mapping[str, Any]
    clip: Mapping[str, Any]
    t5: Mapping[str, Any]
    text_tokens: Mapping[str, int]
    """Length of the T5 prompt, for each model."""
    steps: Mapping[str, int]
    """Denoising steps of an image of the first size, for each model."""
    few_steps: int
    """Of other sizes."""
    sizes: tuple[Size, ...]
    runs: int
    """Timed images a row, and rounds of changes, after a first that is not timed."""
    tokens: int
    """Of text and image together, for which kernels are measured."""
    map_size: tuple[int, int]
    """Height and width of the VAE's maps for which a convolution is measured."""
    repeats: int
    """Of each measured kernel."""
    copied_bytes: int
    compiler: str
    """torch.compile's backend for the peers; the small one's only traces."""

    @property
    def width(self) -> int:
        """Of the transformer's states."""
        return int(self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"])


FULL = Scale(
    name="full",
    transformer={
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": (16, 56, 56),
    },
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    clip={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    t5={"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    text_tokens={"dev": 512, "schnell": 256},
    steps={"dev": 28, "schnell": 4},
    few_steps=4,
    sizes=SIZES,
    runs=2,
    tokens=4608,
    map_size=(512, 512),
    repeats=20,
    copied_bytes=2**31,
    compiler="inductor",
)
TINY = Scale(
    name="tiny",
    transformer={
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    vae={"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
    clip={
        "vocab_size": 1536,
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    t5={"vocab_size": 1536, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    text_tokens={"dev": 28, "schnell": 20},
    steps={"dev": 3, "schnell": 2},
    few_steps=2,
    sizes=(Size(96, 80), Size(64, 48)),
    runs=1,
    tokens=58,
    map_size=(12, 10),
    repeats=2,
    copied_bytes=2**22,
    compiler="eager",
)
