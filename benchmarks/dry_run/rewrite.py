"""The kernel that rewrites fp8 weights, assembled for the device at the widths of FLUX.1's layers."""

from __future__ import annotations

import tempfile
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.dry_run.graphs import resources, triton_target
from benchmarks.tables import Table
from engine.requantise import STAGES, TILE, WARPS, requantise_kernel

WIDTHS = (3072, 12288, 15360)
FACTORS = ("bf16", "fp16", "fp32")
SIGNATURE = {
    "weight": "*bf16", "data": "*fp8e4nv", "scale": "*fp32", "table": "*i64", "strengths": "*fp32",
    "count": "i32", "height": "i32", "width": "constexpr", **dict.fromkeys(TILE, "constexpr"),
}  # fmt: skip


def rewrite_table(widths: tuple[int, ...] = WIDTHS, factors: tuple[str, ...] = FACTORS) -> Table:
    """Registers and spills of each variant."""
    columns = ("width of the layer", "factors in", "registers", "bytes spilled")
    table = Table("The kernel that rewrites fp8 weights, for compute capability 9.0", columns)
    for width in widths:
        for kind in factors:
            registers, spilled = resources(_assembled(width, kind))
            table.rows.append((width, kind, registers, spilled))
            table.require(not spilled, f"width {width}, factors in {kind}: {spilled} bytes spilled")
    return table


def _assembled(width: int, factors: str) -> bytes:
    signature = {**SIGNATURE, "factors": f"*{factors}"}
    ordered = {name: signature[name] for name in requantise_kernel.arg_names}
    whole = [index for index, name in enumerate(ordered) if name in ("weight", "data", "factors")]
    aligned = {(index,): [["tt.divisibility", 16]] for index in whole}
    source = ASTSource(requantise_kernel, ordered, constexprs={"width": width, **TILE}, attrs=aligned)
    with triton_target((9, 0)), tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict("os.environ", {"TRITON_CACHE_DIR": folder}):
            options = {"num_warps": WARPS, "num_stages": STAGES}
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        cubin: bytes = compiled.asm["cubin"]
        return cubin
