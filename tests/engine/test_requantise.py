"""fp8 weights with their LoRAs in one pass: the kernel in Triton's interpreter, and the working copy that uses it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from engine.fp8 import WEIGHT_ONLY, choose_rewrite, write_fp8
from engine.working_copy import WorkingCopy, WorkingCopyAdapters
from lora_loading.shapes import TRANSFORMER, shapes_of
from tests.lora_files import adapter_of, kinds_of
from tests.paths import PROJECT
from tests.tiny_models import inputs_of, narrow_transformer

CPU = torch.device("cpu")
KERNEL = """
import sys, torch
from engine.fp8 import WEIGHT_ONLY, write_fp8
from engine.requantise import TILE, requantise_kernel
torch.manual_seed(0)
for height, width, changes, dtype in (
    (40, 768, (), torch.float16), (40, 768, ((16, 1.0),), torch.float16),
    (33, 640, ((32, 0.7), (4, -1.5)), torch.float16), (40, 768, ((20, 1.0),), torch.float32),
):
    weight = (torch.randn(height, width) * 0.02).bfloat16()
    weight[1] = 0
    weight[2, 5] = 300.0
    shapes = [((rank, width), (height, rank)) for rank, _ in changes]
    pairs = [[(torch.randn(shape) * 0.05).to(dtype) for shape in pair] for pair in shapes]
    for _, b in pairs:
        b[1] = 0
    factors = torch.cat([torch.zeros(3, dtype=dtype), *(part.flatten() for pair in pairs for part in pair)])
    table, at, total = [], 3, weight.float()
    for (a, b), (rank, strength) in zip(pairs, changes):
        table.append((at, at + a.numel(), rank))
        at += a.numel() + b.numel()
        total.addmm_(b.float(), a.float(), alpha=strength)
    # Triton's interpreter rounds to fp8 wrongly near zero, so the kernel's numbers are rounded here.
    data, scale = torch.zeros(height, width), torch.zeros(height, 1)
    rows = torch.tensor(table, dtype=torch.int64).reshape(-1, 3)
    strengths = torch.tensor([strength for _, strength in changes])
    requantise_kernel[(-(-height // TILE["ROWS"]),)](
        weight, data, scale, factors, rows, strengths, len(changes), height, width=width, **TILE
    )
    wanted = WEIGHT_ONLY.allocate(weight)
    write_fp8(wanted, total)
    assert torch.equal(data.to(torch.float8_e4m3fn).view(torch.uint8), wanted.qdata.view(torch.uint8))
    torch.testing.assert_close(scale, wanted.scale, rtol=2e-7, atol=0)
print("equal")
"""


def in_one_pass(data: Tensor, scale: Tensor, weight: Tensor, factors: Tensor, table: Tensor, strengths: Tensor) -> None:
    """What the kernel does, in PyTorch's operators, from the same arguments."""
    height, width = weight.shape
    total = weight.float()
    for (a, b, rank), strength in zip(table.tolist(), strengths.tolist(), strict=True):
        left = factors[b : b + height * rank].view(height, rank).float()
        total.addmm_(left, factors[a : a + rank * width].view(rank, width).float(), alpha=strength)
    target = WEIGHT_ONLY.allocate(weight)
    write_fp8(target, total)
    data.copy_(target.qdata)
    scale.copy_(target.scale)


def test_the_kernel_writes_the_bits_of_write_fp8() -> None:
    """In Triton's interpreter, which has to be chosen before the kernel is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_a_cpu_writes_in_several_passes() -> None:
    assert choose_rewrite(CPU) is None


def test_a_copy_that_is_written_in_one_pass_holds_the_same_bits() -> None:
    """For two models, LoRAs of every kind, several at once, and none again."""
    pristine = {"dev": narrow_transformer(1, 2, seed=1), "schnell": narrow_transformer(1, 2, seed=2, guidance=False)}
    plain, quick = WorkingCopy(pristine, WEIGHT_ONLY, CPU), WorkingCopy(pristine, WEIGHT_ONLY, CPU, in_one_pass)
    for name in ("dev", "schnell", "dev"):
        shapes = shapes_of({TRANSFORMER: pristine[name]})
        low_rank = [(adapter_of(shapes, seed=1), 0.7), (adapter_of(shapes, seed=2, only="attn"), -1.5)]
        for stack in (low_rank, low_rank[:1], [(adapter, 1.0) for adapter in kinds_of(shapes)], []):
            outputs = []
            for copy in (plain, quick):
                WorkingCopyAdapters(name, copy).apply(stack)
                with torch.inference_mode():
                    outputs.append(copy.transformers[name](**inputs_of(pristine[name]))[0])
            assert torch.equal(*outputs)
