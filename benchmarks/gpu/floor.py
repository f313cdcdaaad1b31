"""How fast this machine's own kernels are at FLUX.1's shapes, and how long a step could take at that speed.

The floor of a step is what its matrix products and its attention take, each at the measured rate of its shape. Norms,
rotations, activations, quantisation, the modulations' one-row products and the launches come on top of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.scales import Scale
from engine.fp8 import FP8_COMPUTE

EXACT, FP8 = "exact", "fp8"
"""The arithmetic of the matrix products: bf16 (float32 on a CPU), or fp8 with a scale a row on both sides."""
MLP = 4
"""How many times wider than the states a FLUX block's inner layer is."""
BATCHES = 5
WARMING = 20
"""Measurements thrown away, a second of them on an H100: a cold GPU's clock is another one."""
UNCACHED_BYTES = 2**28
"""Products take turns with weights of together so many bytes: in a model, no weight is in the cache when it is used."""
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)


@dataclass(frozen=True)
class Shape:
    """A matrix product's sizes, (m, k) @ (k, n), and how many of it a step has."""

    m: int
    k: int
    n: int
    count: int = 1

    @property
    def flop(self) -> int:
        """Of all of them."""
        return 2 * self.count * self.m * self.k * self.n


@dataclass(frozen=True)
class ProductRate:
    """A measured matrix product."""

    m: int
    k: int
    n: int
    arithmetic: str
    milliseconds: float
    tflops: float


@dataclass(frozen=True)
class AttentionRate:
    """A measured attention of all tokens with all."""

    heads: int
    tokens: int
    head_size: int
    backend: str
    milliseconds: float
    tflops: float


@dataclass(frozen=True)
class Floor:
    """What the kernels reach."""

    products: tuple[ProductRate, ...]
    attention: tuple[AttentionRate, ...]
    copy_gb_per_second: float
    """Bytes read and written."""

    def step_seconds(self, scale: Scale, tokens: tuple[int, int], arithmetic: str) -> float:
        """The least that a step can take, with all its products in this arithmetic (in exact where it has no rates)."""
        has = {product.arithmetic for product in self.products}
        products = step_products(scale, *tokens)
        at_rate = (shape.flop / self._rate(shape, arithmetic if arithmetic in has else EXACT) for shape in products)
        fastest = max(rate.tflops for rate in self.attention) * 1e12
        return sum(at_rate) + attention_flop(scale, sum(tokens)) / fastest

    def _rate(self, shape: Shape, arithmetic: str) -> float:
        """Of the measured product that is the same but for the number of rows, where the nearest is taken."""
        alike = [p for p in self.products if (p.k, p.n, p.arithmetic) == (shape.k, shape.n, arithmetic)]
        return min(alike, key=lambda product: abs(math.log(product.m / shape.m))).tflops * 1e12


def tokens_of(scale: Scale, model: str, width: int, height: int) -> tuple[int, int]:
    """The tokens of an image and of its prompt: one for 16x16 pixels, and the prompt's padded length."""
    return (width // 16) * (height // 16), scale.text_tokens[model]


def step_products(scale: Scale, image_tokens: int, text_tokens: int) -> list[Shape]:
    """The matrix products of the blocks in one step, but for the modulations, which have one row each.

    A double block has q, k, v, out and two MLP layers for each of both streams, a single block q, k, v and the MLP's
    first layer over all tokens, and one that takes attention and MLP together.
    """
    d, double, single = scale.width, scale.transformer["num_layers"], scale.transformer["num_single_layers"]
    both = image_tokens + text_tokens
    streams = [
        shape
        for m in (image_tokens, text_tokens)
        for shape in (Shape(m, d, d, 4 * double), Shape(m, d, MLP * d, double), Shape(m, MLP * d, d, double))
    ]
    joined = [Shape(both, d, d, 3 * single), Shape(both, d, MLP * d, single), Shape(both, (MLP + 1) * d, d, single)]
    return streams + joined


def attention_flop(scale: Scale, tokens: int) -> int:
    """Of all blocks in one step: two products of all tokens with all a block."""
    blocks: int = scale.transformer["num_layers"] + scale.transformer["num_single_layers"]
    return 4 * tokens**2 * scale.width * blocks


def step_flop(scale: Scale, tokens: tuple[int, int]) -> int:
    """Of one step. Embedders and modulations, 0.03% of it in the full scale, are left out."""
    return sum(shape.flop for shape in step_products(scale, *tokens)) + attention_flop(scale, sum(tokens))


def measure_floor(scale: Scale, clock: Clock) -> Floor:
    """Measure all kernels; takes seconds."""
    arithmetics = (EXACT, FP8) if _has_fp8(clock.device) else (EXACT,)
    d = scale.width
    sides = ((d, d), (d, MLP * d), (MLP * d, d), ((MLP + 1) * d, d))
    for _ in range(WARMING):
        _product(Shape(scale.gemm_rows[0], *sides[-1]), EXACT, scale.gemm_repeats, clock)
    products = tuple(
        _product(Shape(m, k, n), arithmetic, scale.gemm_repeats, clock)
        for arithmetic in arithmetics
        for k, n in sides
        for m in scale.gemm_rows
    )
    return Floor(products, tuple(_attentions(scale, clock)), _copy_rate(scale, clock))


def _has_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_COMPUTE


def _product(shape: Shape, arithmetic: str, repeats: int, clock: Clock) -> ProductRate:
    dtype = torch.bfloat16 if clock.device.type == "cuda" else torch.float32
    copies = min(repeats, 1 + UNCACHED_BYTES // (shape.k * shape.n * dtype.itemsize))
    states = torch.randn(shape.m, shape.k, device=clock.device, dtype=dtype)
    weights = [torch.randn(shape.n, shape.k, device=clock.device, dtype=dtype) for _ in range(copies)]
    if arithmetic == FP8:
        calls = _fp8_calls(states, weights)
    else:
        calls = [lambda weight=weight: linear(states, weight) for weight in weights]  # type: ignore[misc]
    seconds = _seconds(calls, repeats, clock)
    return ProductRate(shape.m, shape.k, shape.n, arithmetic, seconds * 1e3, shape.flop / seconds / 1e12)


def _fp8_calls(states: Tensor, weights: list[Tensor]) -> list[Callable[[], Tensor]]:
    """Products with a scale a row, as torchao makes them; the numbers fill fp8's range of 448."""
    left = _to_fp8(states)
    left_scale = torch.ones(states.shape[0], 1, device=states.device)

    def call(right: Tensor, right_scale: Tensor) -> Tensor:
        return torch._scaled_mm(
            left, right, left_scale, right_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )  # (m, k) row-major @ (k, n) column-major

    quantised = [_to_fp8(weight).t() for weight in weights]
    ones = torch.ones(1, weights[0].shape[0], device=states.device)
    return [lambda right=right: call(right, ones) for right in quantised]  # type: ignore[misc]


def _to_fp8(tensor: Tensor) -> Tensor:
    return (tensor * 64).clamp(-448, 448).to(torch.float8_e4m3fn)


def _attentions(scale: Scale, clock: Clock) -> Iterator[AttentionRate]:
    heads, size = scale.transformer["num_attention_heads"], scale.transformer["attention_head_dim"]
    tokens = scale.gemm_rows[0]
    dtype = torch.bfloat16 if clock.device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, heads, tokens, size, device=clock.device, dtype=dtype) for _ in range(3))
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                seconds = _seconds([lambda: scaled_dot_product_attention(q, k, v)], scale.gemm_repeats, clock)
        except RuntimeError:  # torch has no such kernel for this device
            continue
        flop = 4 * heads * tokens**2 * size
        yield AttentionRate(heads, tokens, size, backend.name, seconds * 1e3, flop / seconds / 1e12)


def _copy_rate(scale: Scale, clock: Clock) -> float:
    source = torch.randint(256, (scale.copied_bytes,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    seconds = _seconds([lambda: target.copy_(source)], 2, clock)
    return 2 * scale.copied_bytes / seconds / 1e9


def _seconds(calls: list[Callable[[], Tensor]], repeats: int, clock: Clock) -> float:
    """Of one call: the median of a few batches of `repeats`, the calls taking turns, after one batch as a warm-up."""
    times = []
    for _ in range(BATCHES + 1):
        start = clock.mark()
        for index in range(repeats):
            calls[index % len(calls)]()
        times.append(clock.seconds(start, clock.mark()) / repeats)
    return statistics.median(times[1:])
