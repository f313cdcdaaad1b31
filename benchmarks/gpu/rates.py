"""How fast this machine's own kernels are at FLUX.1's shapes, as the dry run's model of time takes it.

The floor of a step is what its matrix products and its attention take at these rates, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear, scaled_dot_product_attention

from benchmarks.dry_run.times import Rates
from benchmarks.gpu.clock import Clock
from benchmarks.scales import Scale
from engine.fp8 import FP8_COMPUTE

MLP = 4
"""How many times wider than the states a block's inner layer is."""
COPIES = 4
"""Of weights, which take turns: in a model no weight is in the cache when it is used."""


def step_flop(scale: Scale, tokens: int) -> tuple[int, int]:
    """Of the linear layers and of the attention, in one step; embedders and modulations, 0.03 % of it, are left out.

    A token passes 12 matrices of width x width in a block of either kind: q, k, v, out and 2 x 4 of the MLP.
    """
    blocks: int = scale.transformer["num_layers"] + scale.transformer["num_single_layers"]
    return 24 * scale.width**2 * tokens * blocks, 4 * tokens**2 * scale.width * blocks


def floor_seconds(scale: Scale, tokens: int, rates: Rates, precision: str) -> float:
    """The least that a step can take."""
    products, attention = step_flop(scale, tokens)
    return products / (rates.fp8 if precision == "fast" else rates.bf16) + attention / rates.attention


def measure_rates(scale: Scale, clock: Clock) -> Rates:
    """Measure all kernels; takes seconds. Without products in fp8 their rate is the others'."""
    device, width, tokens, repeats = clock.device, scale.width, scale.tokens, scale.repeats
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, head = scale.transformer["num_attention_heads"], scale.transformer["attention_head_dim"]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def rate(amount: float, *calls: Callable[[], object]) -> float:
        return amount / clock.of_one(list(calls), repeats)

    states, weights = random(tokens, width), [random(MLP * width, width) for _ in range(COPIES)]
    flop = 2 * tokens * MLP * width**2
    for _ in range(COPIES):  # a cold GPU's clock is another one
        bf16 = rate(flop, *(partial(linear, states, weight) for weight in weights))
    able = device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_COMPUTE
    fp8 = rate(flop, *_fp8_calls(states, weights)) if able else bf16
    query = random(1, heads, tokens, head)
    attention = rate(4 * heads * head * tokens**2, lambda: scaled_dot_product_attention(query, query, query))
    channels = scale.vae["block_out_channels"][1]
    maps = random(1, channels, *scale.map_size).to(memory_format=torch.channels_last)
    kernels = random(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    convolution = rate(18 * channels * maps.numel(), lambda: conv2d(maps, kernels, padding=1))
    source = torch.randint(256, (scale.copied_bytes,), dtype=torch.uint8, device=device)
    target, host = torch.empty_like(source), source.cpu()
    host = host.pin_memory() if device.type == "cuda" else host
    moved = rate(2 * scale.copied_bytes, lambda: target.copy_(source))
    upload = rate(scale.copied_bytes, lambda: target.copy_(host, non_blocking=True))
    number = torch.zeros(1, device=device)
    return Rates(fp8, bf16, attention, convolution, moved, clock.of_one([lambda: number.add_(1)], 50), upload)


def _fp8_calls(states: Tensor, weights: list[Tensor]) -> list[Callable[[], Tensor]]:
    """Products with a scale a row on both sides; the numbers fill fp8's range."""
    left, rows = _to_fp8(states), torch.ones(len(states), 1, device=states.device)
    columns = torch.ones(1, len(weights[0]), device=states.device)

    def call(right: Tensor) -> Tensor:
        return torch._scaled_mm(left, right, rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)

    return [partial(call, _to_fp8(weight).t()) for weight in weights]


def _to_fp8(tensor: Tensor) -> Tensor:
    return (tensor * 64).clamp(-448, 448).to(torch.float8_e4m3fn)
