"""The host's cost of a LoRA swap: ours beside diffusers' two ways, in one process, in turn; medians and ratios.

A transformer with FLUX's real number of layers, 19 + 38 blocks, but narrow, so that what is measured is the work per
layer and not the copying of numbers. All LoRAs are in host memory: ours parsed, diffusers' as state dicts. A swap goes
from one LoRA of rank 16 over all 494 layers of the blocks to another.
"""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, PerRow, quantize_

from engine.fp8 import WEIGHT_ONLY
from engine.working_copy import BLOCKS, WorkingCopy, WorkingCopyAdapters
from lora_loading.applying.manager import AdapterManager, ComponentAdapters
from lora_loading.reading.adapter import LoraAdapter
from lora_loading.reading.layers import LayerUpdate
from lora_loading.shapes import TRANSFORMER, adaptable_layers
from lora_loading.updates import LowRank

ROUNDS = 7
REPORT = Path(__file__).parent / "swap.md"
RANK = 16


@dataclass(frozen=True)
class SwapTimes:
    """Median seconds of a swap by each way, and of two of our calls that change nothing."""

    ours: float
    diffusers: float
    hotswap: float
    same_again: float
    other_scale: float

    @property
    def ratios(self) -> tuple[float, float]:
        """How many times faster than diffusers' load + set + unload, and than its hotswap."""
        return self.diffusers / self.ours, self.hotswap / self.ours


def real_depth_transformer(seed: int = 0) -> FluxTransformer2DModel:
    """19 + 38 blocks of width 32, random, frozen."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        num_layers=19, num_single_layers=38, attention_head_dim=16, num_attention_heads=2, in_channels=16,
        joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def block_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks: 14 a double one, 6 a single one."""
    layers = adaptable_layers(model).items()
    return {name: layer for name, layer in layers if "blocks." in name and isinstance(layer, nn.Linear)}


def random_factors(model: nn.Module, seed: int, rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B for each linear layer of the blocks."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, layer.in_features, generator=generator) * 0.1,
            torch.randn(layer.out_features, rank, generator=generator) * 0.1,
        )
        for name, layer in block_layers(model).items()
    }


def our_adapter(factors: Mapping[str, tuple[Tensor, Tensor]], digest: str) -> LoraAdapter:
    """The factors as our adapter."""
    layers = (LayerUpdate(TRANSFORMER, name, "weight", LowRank(a, b, 1.0)) for name, (a, b) in factors.items())
    return LoraAdapter(digest, "benchmark", tuple(layers))


def their_state_dict(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The factors as diffusers' state dict."""
    pairs = ((f"transformer.{name}.lora_{s}.weight", t) for name, ab in factors.items() for s, t in zip("AB", ab, strict=True))  # noqa: E501 # fmt: skip
    return dict(pairs)


def bare_pipeline(transformer: FluxTransformer2DModel) -> FluxPipeline:
    """A pipeline of a transformer alone."""
    return FluxPipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=transformer,
    )  # fmt: skip


def measure(rounds: int = ROUNDS) -> SwapTimes:
    """The medians of `rounds` swaps of each way, taking turns after one of each as a warm-up."""
    plain, loading, hot = (real_depth_transformer() for _ in range(3))
    pairs = [random_factors(plain, seed) for seed in (1, 2)]
    adapters = [our_adapter(factors, str(index)) for index, factors in enumerate(pairs)]
    manager = AdapterManager([ComponentAdapters(TRANSFORMER, plain)])
    loader, swapper = bare_pipeline(loading), bare_pipeline(hot)
    swapper.enable_lora_hotswap(target_rank=RANK)
    swapper.load_lora_weights(their_state_dict(pairs[0]), adapter_name="swapped")

    def theirs(turn: int) -> None:
        loader.load_lora_weights(their_state_dict(pairs[turn % 2]), adapter_name="x")
        loader.set_adapters(["x"], [1.0])
        loader.unload_lora_weights()

    def hotswap(turn: int) -> None:
        swapper.load_lora_weights(their_state_dict(pairs[turn % 2]), adapter_name="swapped", hotswap=True)

    calls: tuple[Callable[[int], Any], ...] = (
        lambda turn: manager.apply([(adapters[turn % 2], 1.0)]),
        theirs,
        hotswap,
        lambda turn: manager.apply([(adapters[turn % 2], 1.0)]),
        lambda turn: manager.apply([(adapters[turn % 2], 0.5)]),
    )
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, times in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call(turn)
            times.append(time.perf_counter() - started)
    return SwapTimes(*(statistics.median(times[1:]) for times in seconds))


def measure_fast(rounds: int = ROUNDS) -> dict[str, float]:
    """The median seconds of each change of go_fast's working copy, and of making the fp8 model anew for a LoRA."""
    models = {name: real_depth_transformer().to(torch.bfloat16) for name in ("dev", "schnell")}
    factors = random_factors(models["dev"], 1)
    attention = {name: pair for name, pair in factors.items() if ".attn.to_" in name}
    all_layers, some_layers = ([our_adapter(f, f"{len(f)} {i}") for i in range(2)] for f in (factors, attention))
    working_copy = WorkingCopy(models, WEIGHT_ONLY, torch.device("cpu"))
    dev, schnell = (WorkingCopyAdapters(name, working_copy) for name in models)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], None]) -> None:
        started = time.perf_counter()
        call()
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    for _ in range(rounds + 1):
        for first, second in (all_layers, some_layers):
            dev.apply([(first, 1.0)])
            timed(f"ours, another LoRA over {len(first.layers)} layers", partial(dev.apply, [(second, 1.0)]))
        timed("ours, the other model", partial(schnell.apply, []))
        timed("diffusers load + fuse + unload in a copy, then torchao", partial(_made_anew, models["dev"], factors))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def _made_anew(model: FluxTransformer2DModel, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    model = copy.deepcopy(model)
    loader = bare_pipeline(model)
    loader.load_lora_weights(their_state_dict(factors), adapter_name="x")
    loader.fuse_lora()
    loader.unload_lora_weights()
    for blocks in BLOCKS:
        quantize_(model.get_submodule(blocks), Float8WeightOnlyConfig(granularity=PerRow()))


def report(times: SwapTimes, fast: Mapping[str, float]) -> list[str]:
    """Markdown tables of the ways, in the original precision and in fp8."""
    rows = (
        ("ours, another LoRA", times.ours),
        ("ours, another scale", times.other_scale),
        ("ours, the same again", times.same_again),
        ("diffusers load + set + unload", times.diffusers),
        ("diffusers hotswap=True", times.hotswap),
    )
    return [
        "| swap, 19 + 38 blocks, 494 layers | ms | times ours |",
        "|---|---|---|",
        *(f"| {name} | {seconds * 1000:.2f} | {seconds / times.ours:.2f} |" for name, seconds in rows),
        "",
        "| go_fast: the fp8 copy is rewritten | ms | times the first |",
        "|---|---|---|",
        *(f"| {name} | {s * 1000:.2f} | {s / next(iter(fast.values())):.2f} |" for name, s in fast.items()),
    ]


def main() -> None:
    """Measure and write the report."""
    table = "\n".join(report(measure(), measure_fast()))
    where = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    REPORT.write_text(
        f"# Swapping LoRAs\n\nMade by `script/bench swap` on {where}; medians of {ROUNDS}, the ways taking turns.\n\n"
        f"{table}\n\n{(__doc__ or '').partition(chr(10))[2].strip()}\n"
    )
    print(table)


if __name__ == "__main__":
    main()
