"""Reading and applying LoRAs at FLUX.1's sizes: `script/bench loras`, which writes benchmarks/loras.md.

Reading: LoRAs of rank 16 and 128 over the 494 linear layers of the blocks, in bf16, beside reading their bytes into
memory, beside safetensors with every page touched, and beside diffusers' `lora_state_dict`, which reads no data: its
tensors are views of the file. The ways take turns in one process, the file is in the page cache, and CPU times are the
process's own, since other work shares the machine. That ours needs less than the bytes alone is presumably the price
of NumPy's buffer beside torch's. The peak is what a process of its own needs more than before the call.

Applying: a transformer of two double and four single blocks at full width, bf16, and a LoRA of every kind over their 52
linear layers; beside diffusers' `load_lora_weights` of the same LoRA.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.swap import bare_pipeline, block_layers, their_state_dict
from lora_loading.applying.manager import AdapterManager, ComponentAdapters
from lora_loading.known_models import flux_1
from lora_loading.reading.adapter import LoraAdapter, Stack, read_adapter
from lora_loading.reading.layers import LayerUpdate
from lora_loading.rotations import ColumnRotation, RowRotation
from lora_loading.shapes import TRANSFORMER
from lora_loading.updates import Dora, Full, LoHa, LoKr, LowRank, Update

REPORT = Path(__file__).parent / "loras.md"
ROUNDS = 4
RANKS = (16, 128)
BLOCK = 32
"""Of OFT and BOFT."""


# Reading


def write_lora(path: Path, rank: int) -> int:
    """A LoRA of random factors over all blocks of FLUX.1, in diffusers' names; its size in bytes."""
    shapes = flux_1().by_component[TRANSFORMER]
    tensors = {}
    for name, layer in shapes.items():
        if "blocks." in name and len(layer.weight) == 2:
            rows, columns = layer.weight
            tensors[f"transformer.{name}.lora_A.weight"] = _random(rank, columns)
            tensors[f"transformer.{name}.lora_B.weight"] = _random(rows, rank)
    save_file(tensors, path)
    return path.stat().st_size


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape).mul_(0.02).bfloat16()


def read_bytes(path: Path) -> object:
    """The file's bytes in one buffer."""
    buffer = np.empty(path.stat().st_size, np.uint8)  # not zeroed before, as in ours
    with path.open("rb", buffering=0) as file:
        view, at = memoryview(buffer.data), 0
        while at < len(view):
            at += file.readinto(view[at:])
    return buffer


def read_safetensors(path: Path) -> object:
    """safetensors' own loading, with a byte of every page read."""
    tensors = load_file(path)
    return sum(int(t.view(torch.uint8).reshape(-1)[::4096].sum()) for t in tensors.values())


def read_ours(path: Path) -> object:
    """Our adapter, checked; the digest is known, as from the cache."""
    return read_adapter(path, flux_1(), digest="0" * 64)


def read_diffusers(path: Path) -> object:
    """diffusers' parsing alone; its tensors are views of the file."""
    return FluxPipeline.lora_state_dict(str(path))


WAYS: dict[str, Callable[[Path], object]] = {
    "the bytes alone": read_bytes,
    "ours: read and checked": read_ours,
    "safetensors, every page touched": read_safetensors,
    "diffusers lora_state_dict": read_diffusers,
}


def timed_in_turns(path: Path) -> dict[str, tuple[float, float]]:
    """Median CPU and wall seconds of each way, the ways taking turns in this process."""
    read_bytes(path)  # into the page cache
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for index in range(ROUNDS):
        for way in _rotated(index):
            cpu, wall = time.process_time(), time.perf_counter()
            kept = WAYS[way](path)
            times[way].append((time.process_time() - cpu, time.perf_counter() - wall))
            del kept
    medians = {way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in times.items()}
    return {way: (cpu, wall) for way, (cpu, wall) in medians.items()}


def peak_of(way: str, path: Path) -> int:
    """The bytes that a way of reading needs at most, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loras", "--read", way, str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak_here(way: str, path: Path) -> int:
    """The same in this process."""
    before, _ = _memory()
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    kept = WAYS[way](path)
    _, peak = _memory()
    del kept
    return peak - before


def _memory() -> tuple[int, int]:
    """Resident bytes now and at the peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def reading_table(folder: Path) -> Iterator[str]:
    """A row for each rank and way: medians, and ratios to the bytes alone."""
    yield "| file | way | CPU s | times the bytes | wall s | peak, times the file |"
    yield "|---|---|---|---|---|---|"
    for rank in RANKS:
        path = folder / f"rank-{rank}.safetensors"
        size = write_lora(path, rank)
        times = timed_in_turns(path)
        least, _ = times["the bytes alone"]
        for way, (cpu, wall) in times.items():
            peak = peak_of(way, path) / size
            file = f"rank {rank}, {size / 1e6:.0f} MB"
            yield f"| {file} | {way} | {cpu:.3f} | {cpu / least:.2f} | {wall:.3f} | {peak:.2f} |"
        path.unlink()


def _rotated(index: int) -> list[str]:
    """The ways, each round another one first: what comes first after a pause reads more slowly."""
    ways = list(WAYS)
    return ways[index % len(ways) :] + ways[: index % len(ways)]


# Applying


def wide_transformer() -> FluxTransformer2DModel:
    """Two double and four single blocks of FLUX.1's width, random, bf16, frozen."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=4, guidance_embeds=True)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    values = torch.randn(2**20).mul_(0.02).bfloat16()
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), values.numel()):
            part = flat[start : start + values.numel()]
            part.copy_(values[: part.numel()])
    return model.eval().requires_grad_(False)


def _lora(rows: int, columns: int) -> LowRank:
    return LowRank(_random(16, columns), _random(rows, 16), 1.0)


KINDS: dict[str, Callable[[int, int], Update]] = {
    "LoRA, rank 16": _lora,
    "DoRA, rank 16": lambda rows, columns: Dora(_lora(rows, columns), torch.rand(rows, 1) + 0.5),
    "LoHa, rank 16": lambda rows, columns: LoHa(
        _random(rows, 16), _random(16, columns), _random(rows, 16), _random(16, columns), 1.0
    ),
    "LoKr": lambda rows, columns: LoKr((_random(16, 16),), (_random(rows // 16, columns // 16),), 1.0),
    "OFT of LyCORIS": lambda rows, columns: RowRotation(_random(1, rows // BLOCK, BLOCK, BLOCK), None, False),
    "BOFT of LyCORIS, 3 stages": lambda rows, columns: RowRotation(
        _random(3, rows // BLOCK, BLOCK, BLOCK), None, butterfly=True
    ),
    "OFT of PEFT": lambda rows, columns: ColumnRotation(_skew(columns), 5, None),
    "full difference": lambda rows, columns: Full(_random(rows, columns)),
}


def _skew(columns: int) -> Tensor:
    blocks = _random(1, columns // BLOCK, BLOCK, BLOCK)
    return blocks - blocks.mT


def adapter_of(kind: str, model: nn.Module) -> LoraAdapter:
    """A random adapter of one kind over all linear layers of the blocks."""
    build = KINDS[kind]
    layers = [
        LayerUpdate(TRANSFORMER, name, "weight", build(layer.out_features, layer.in_features))
        for name, layer in block_layers(model).items()
    ]
    return LoraAdapter(kind, "benchmark", tuple(layers))


def applying_table() -> Iterator[str]:
    """A row for each kind: the first time, another scale, and gone again; then diffusers."""
    model = wide_transformer()
    manager = AdapterManager([ComponentAdapters(TRANSFORMER, model)])
    yield "| kind | applied, CPU s | another scale | times the first | removed |"
    yield "|---|---|---|---|---|"
    for kind in KINDS:
        adapter = adapter_of(kind, model)
        stacks: list[Stack] = [[(adapter, 1.0)], [(adapter, 0.5)], []]
        first, other, gone = (_timed(partial(manager.apply, stack)) for stack in stacks)
        yield f"| {kind} | {first:.3f} | {other:.3f} | {other / first:.2f} | {gone:.4f} |"
    yield f"| diffusers `load_lora_weights`, LoRA, rank 16 | {_diffusers(model):.3f} | | | |"


def _diffusers(model: FluxTransformer2DModel) -> float:
    factors = {n: (_random(16, layer.in_features), _random(layer.out_features, 16)) for n, layer in block_layers(model).items()}  # noqa: E501 # fmt: skip
    pipeline, state = bare_pipeline(model), their_state_dict(factors)
    return _timed(lambda: pipeline.load_lora_weights(dict(state), adapter_name="x"))


def _timed(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def report() -> str:
    """The whole page."""
    with tempfile.TemporaryDirectory() as folder:
        reading = "\n".join(reading_table(Path(folder)))
    applying = "\n".join(applying_table())
    _, reading_text, applying_text = (__doc__ or "").split("\n\n")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    return (
        f"# LoRAs at real sizes\n\nMade by `script/bench loras` on {machine}; medians of {ROUNDS}.\n\n{reading}\n\n"
        f"{reading_text}\n\n{applying}\n\n{applying_text.strip()}\n"
    )


def main() -> None:
    """Measure and write the report; with `--read WAY FILE`, print the peak of one way of reading."""
    if sys.argv[1:2] == ["--read"]:
        print(peak_here(sys.argv[2], Path(sys.argv[3])))
    else:
        REPORT.write_text(report())
        print(REPORT.read_text())


if __name__ == "__main__":
    main()
