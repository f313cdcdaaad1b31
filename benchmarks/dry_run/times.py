"""Seconds worked out from what was counted and from rates that others measured. Every one of them is modelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.dry_run.bounds import MODELLED_SECONDS
from benchmarks.dry_run.counting import ATTENTION, BF16, CONVOLUTION, FP8, Counts, DeviceCounter, Product
from benchmarks.dry_run.device import DEVICE, fake_device, fake_tensors
from benchmarks.dry_run.flux import build_models, decode
from benchmarks.dry_run.graphs import Graph
from benchmarks.dry_run.steps import DECODER, WITH_LORAS, Step
from benchmarks.plan import SQUARE
from benchmarks.scales import FULL
from benchmarks.tables import Table
from engine.compilation import WARM_UP_SIZE, lay_out_channels_last
from request import Mode


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    fp8: float
    bf16: float
    attention: float
    convolution: float
    bytes: float
    """Read and written."""
    launch_seconds: float
    """Between two kernels."""
    upload_bytes: float
    """From page-locked host memory."""


NOMINAL = Rates(1250e12, 700e12, 600e12, 350e12, 2.8e12, 2e-6, 50e9)
WORST = Rates(1000e12, 600e12, 500e12, 250e12, 2.3e12, 5e-6, 25e9)
BEST = Rates(1400e12, 780e12, 650e12, 450e12, 3.0e12, 1e-6, 55e9)
ASSUMED = (
    "Modelled, not measured. A product takes the longer of its FLOP and its bytes, other kernels their bytes, each "
    "launch a gap. Nominal rates: fp8 1250, bf16 700, attention 600, convolution 350 TFLOP/s, memory 2.8 TB/s, a "
    "gap of 2 us, uploads 50 GB/s. In brackets all rates at their best and at their worst: fp8 1400 and 1000, bf16 "
    "780 and 600, attention 650 and 500, convolution 450 and 250, memory 3.0 and 2.3, gaps 1 and 5 us, uploads 55 "
    "and 25. Measured on one H100: bf16 798 TFLOP/s at 8192 cubed, memory 3.0 TB/s; published: attention 631, fp8 "
    "per row 1200 to 1400. Host time, the safety checker and the encoding of files are left out. With go_fast LoRAs "
    "are merged, so an image takes as long with 0, 1 and 2 of them; beside exact weights one takes as long as two of "
    "together rank 64. The floor has go_fast's products and attention alone."
)
BEFORE_LEAN = (1178, 43.7e9)
"""Launches and elementwise bytes of a step with diffusers' fp8 blocks compiled, counted before they were replaced."""


def seconds(launches: int, elementwise_bytes: float, products: Mapping[Product, int], rates: Rates) -> float:
    """Of a piece of work."""
    speeds = {FP8: rates.fp8, BF16: rates.bf16, ATTENTION: rates.attention, CONVOLUTION: rates.convolution}
    multiplying = sum(
        count * max(product.flop / speeds[product.kind], product.moved_bytes / rates.bytes)
        for product, count in products.items()
    )
    return multiplying + elementwise_bytes / rates.bytes + launches * rates.launch_seconds


def parts_of_an_image() -> dict[str, Counts]:
    """What an image costs besides its steps: its prompt encoded, by model, and its latents decoded at 1024x1024."""
    found = {}
    counter = DeviceCounter()
    with fake_device(), fake_tensors(counter.on_sync), counter.watching(), torch.inference_mode():
        models = build_models()
        for name, model in models.items():
            pipeline = model.pipelines[Mode.TXT2IMG]
            found[name] = counter.restart()
            tokens = torch.zeros(1, FULL.text_tokens[name], dtype=torch.long, device=DEVICE)
            pipeline.text_encoder_2(tokens)
            pipeline.text_encoder(tokens[:, :77])
        lay_out_channels_last(pipeline.vae)
        found[DECODER] = counter.restart()
        decode(pipeline.vae, SQUARE.height // 8, SQUARE.width // 8)
        counter.restart()
    return found


def times_table(
    steps: Mapping[str, Step],
    first: Counts,
    changes: Mapping[str, Counts],
    others: Mapping[str, Counts],
    decoder: Graph,
) -> Table:
    """Modelled seconds of whole images at 1024x1024 and of changes.

    Args:
        steps: of dev by name; of schnell by "schnell " and the name.
        first: go_fast's first step of a request of dev, which holds what the others share.
        changes: by the names of `changes_table`'s rows.
        others: see `parts_of_an_image`.
        decoder: the VAE's, compiled.
    """
    table = Table("Modelled seconds on an H100", ("modelled, 1024x1024", "one step, ms", "dev, 28 steps", "schnell, 4"))
    eager = steps["fast eager"]
    launches, moved = first.kernels - eager.launches, first.elementwise_bytes - eager.elementwise_bytes
    request = seconds(launches, moved, first.products - eager.counts.products, NOMINAL)
    decoding = {True: _work(others[DECODER]), False: _compiled_decoding(others[DECODER], decoder)}
    for name in ("exact eager", "exact", WITH_LORAS, "fast before", "fast", "floor"):
        own = _step(steps, name)
        decoded = decoding[name in ("exact eager", "fast before")]
        images = {}
        for model, prefix, number in (("dev", "", 28), ("schnell", "schnell ", 4)):
            step = _step(steps, name, prefix)
            images[model] = [
                number * seconds(*step, rates)
                + seconds(*_work(others[model]), rates)
                + seconds(*decoded, rates)
                + (request if name == "fast" else 0)
                for rates in (NOMINAL, BEST, WORST)
            ]
        table.rows.append((name, f"{1e3 * seconds(*own, NOMINAL):.1f}", *map(_span, images.values())))
        for model, values in images.items():
            bound = MODELLED_SECONDS.get(f"{name} {model}")
            table.require(bound is None or values[0] <= bound, f"{name}, {model}: {values[0]:.3f} s")
    parts = {
        "encoding the prompt": _work(others["dev"]),
        "decoding": decoding[True],
        "decoding, compiled": decoding[False],
    }
    for name, work in parts.items():
        table.rows.append((name, _span([1e3 * seconds(*work, rates) for rates in (NOMINAL, BEST, WORST)]), "", ""))
    for name, counts in changes.items():
        values = [
            seconds(*_work(counts), rates) + counts.copied_bytes / rates.upload_bytes
            for rates in (NOMINAL, BEST, WORST)
        ]
        table.rows.append((f"change of the fp8 copy, {name}", _span([1e3 * value for value in values]), "", ""))
        table.require(values[0] <= MODELLED_SECONDS["change"], f"{name}: {values[0]:.3f} s")
    table.notes.append(ASSUMED)
    return table


Work = tuple[int, float, Mapping[Product, int]]


def _work(counts: Counts) -> Work:
    return counts.kernels, counts.elementwise_bytes, counts.products


def _compiled_decoding(eager: Counts, graph: Graph) -> Work:
    """The decoder is all of it. The graph was made for the warm-up's size, which is a little smaller."""
    larger = SQUARE.width * SQUARE.height / (WARM_UP_SIZE.width * WARM_UP_SIZE.height)
    return graph.launches + graph.products, graph.triton_bytes * larger, eager.products


def _step(steps: Mapping[str, Step], name: str, prefix: str = "") -> Work:
    """Launches, elementwise bytes and products of a row's step."""
    if name == "floor":
        return 0, 0.0, steps[f"{prefix}fast"].counts.products
    if name == "fast before":
        launches, moved = BEFORE_LEAN
        return launches, moved, steps[f"{prefix}fast"].counts.products
    step = steps[f"{prefix}{name}"]
    return step.launches, step.elementwise_bytes, step.counts.products


def _span(values: list[float]) -> str:
    nominal, best, worst = (f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values)
    return f"{nominal} ({best} to {worst})"
