"""fp8 weights with one scale per row: how a weight is quantised, and which scheme works on a device.

Knows single matrices only: no models, no adapters.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8Tensor,
    Float8WeightOnlyConfig,
    PerRow,
    quantize_,
)

logger = logging.getLogger(__name__)

FP8_MULTIPLE = 16
"""The fp8 kernels need both sides of a matrix to be multiples of this."""
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
FP8_COMPUTE = (8, 9)
"""The lowest CUDA compute capability that multiplies matrices in fp8."""


@dataclass(frozen=True)
class Scheme:
    """A way to store weights in fp8, one scale per row, and to multiply with them."""

    name: str
    config: Float8DynamicActivationFloat8WeightConfig | Float8WeightOnlyConfig
    dynamic: bool
    """Whether activations are quantised too, and products are in fp8."""

    def quantise(self, weight: Tensor) -> Float8Tensor:
        """(out, in) in any float type -> a new fp8 tensor that multiplies by this scheme."""
        target = self.allocate(weight)
        write_fp8(target, weight)
        return target

    def allocate(self, weight: Tensor) -> Float8Tensor:
        """An fp8 tensor like `weight`, (out, in), with any numbers in it."""
        rows, columns = weight.shape
        sample = self._sample(weight.dtype, weight.device)
        return nn.Parameter(
            Float8Tensor(
                torch.empty(rows, columns, dtype=sample.qdata.dtype, device=weight.device),
                torch.empty(rows, 1, dtype=torch.float32, device=weight.device),
                block_size=[1, columns],
                mm_config=sample.mm_config,
                act_quant_kwargs=sample.act_quant_kwargs,
                kernel_preference=sample.kernel_preference,
                dtype=weight.dtype,
            ),
            requires_grad=False,
        )

    def _sample(self, dtype: torch.dtype, device: torch.device) -> Float8Tensor:
        """The smallest weight, quantised by torchao: it says how this scheme multiplies."""
        holder = nn.Linear(FP8_MULTIPLE, FP8_MULTIPLE, bias=False, dtype=dtype, device=device)
        quantize_(holder, self.config)
        return holder.weight


def write_fp8(target: Float8Tensor, weight: Tensor) -> None:
    """Quantise `weight`, (out, in), into an existing fp8 tensor: the same bits as torchao, in a fifth of its host time.

    Pass the sum of a weight and its LoRAs in float32: rounding it to bf16 first loses a part of a small change (of a
    change of 0.3% of the weight, 0.92 is kept; without the rounding 1.00).
    """
    weight = weight.float()
    scale = torch.linalg.vector_norm(weight, ord=math.inf, dim=1, keepdim=True) / FP8_MAX
    target.scale.copy_(scale)
    target.qdata.copy_(weight / scale.clamp(min=torch.finfo(torch.float32).tiny))  # a row of zeros: 0 / tiny


DYNAMIC = Scheme(
    "fp8 weights and activations, one scale per row",
    Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
    dynamic=True,
)
WEIGHT_ONLY = Scheme(
    "fp8 weights only, one scale per row: less memory, not faster",
    Float8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False),
    dynamic=False,
)


Rewrite = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""Quantises a weight with low-rank changes in one pass, see `engine.requantise.requantise`."""


def choose_rewrite(device: torch.device) -> Rewrite | None:
    """The Triton kernel that writes fp8 weights in one pass, tried on a small weight; None where it does not work."""
    if device.type != "cuda":
        return None
    try:
        from engine.requantise import requantise

        _try_out_rewrite(requantise, device)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("fp8 weights are written in several passes, since the kernel for one does not work: %s", reason)
        return None
    return requantise


def _try_out_rewrite(rewrite: Rewrite, device: torch.device) -> None:
    """Compare with `write_fp8`, with one change and with none."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((96, 512), (16, 512), (96, 16)))
    weight, factors = (
        weight.to(device, torch.bfloat16),
        torch.cat([a.flatten(), b.flatten()]).to(device, torch.bfloat16),
    )
    a, b = (factors[: a.numel()].view_as(a), factors[a.numel() :].view_as(b))
    table = torch.tensor([[0, a.numel(), len(a)]], device=device)
    wanted, found = (WEIGHT_ONLY.allocate(weight) for _ in range(2))
    for changes in (0, 1):
        write_fp8(wanted, weight.float() + 0.5 * changes * (b.float() @ a.float()))
        rewrite(found.qdata, found.scale, weight, factors, table[:changes], torch.full((changes,), 0.5, device=device))
        difference = (found.dequantize() - wanted.dequantize()).float().norm()
        if not difference < 0.005 * wanted.dequantize().float().norm():
            raise ArithmeticError("its numbers differ from those of the several passes")


def choose_scheme(device: torch.device) -> Scheme | None:
    """The best scheme that works on the device, tried on a small layer; None if none works."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_COMPUTE
    for scheme in (DYNAMIC, WEIGHT_ONLY) if able else (WEIGHT_ONLY,):
        try:
            _try_out(scheme, device)
        except Exception as error:
            logger.warning("%s: does not work on %s: %s", scheme.name, device, error)
        else:
            return scheme
    return None


def _try_out(scheme: Scheme, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    weight, states = (torch.randn(rows, 128, generator=generator).to(device, dtype) for rows in (64, 48))
    quantised = scheme.quantise(weight)
    for given in (states, states[:1]):
        exact, found = given @ weight.T, nn.functional.linear(given, quantised)
        if not (exact - found).norm() < 0.1 * exact.norm():
            raise ArithmeticError("a product in fp8 differs from the exact one by more than 10%")
