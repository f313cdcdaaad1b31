"""One denoising step: the graphs that inductor writes for it, its launches, traffic and FLOP, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from benchmarks.dry_run.bounds import FLOP_ACCURACY, STEP_ELEMENTWISE_GB, STEP_LAUNCHES, STEP_TFLOP
from benchmarks.dry_run.counting import Counts, DeviceCounter
from benchmarks.dry_run.device import HostValues, fake_device, fake_tensors
from benchmarks.dry_run.flux import decode, engine_of, loras, precision_of, request_state, take_step, transformer_of
from benchmarks.dry_run.graphs import Graph, Kernel, Recorder, assembled, recording
from benchmarks.plan import PRECISIONS
from benchmarks.scales import FULL, Scale
from benchmarks.tables import Table, gigabytes
from engine.compilation import WARM_UP_SIZE, compiled_parts
from engine.engine import Engine
from engine.precision import RESERVED_RANK
from request import Mode

WITH_LORAS = "exact with LoRAs"
DECODER = "VAE decoder"
OTHER_LATENTS = ((128, 128), (32, 32), (180, 180), (104, 152))
"""Heights and widths of latents after the first, which may compile nothing more."""
OTHER_TOKENS = ((256, 512), (1024, 256), (8100, 512), (4095, 77))
"""Image and text tokens after the first step's, which may compile nothing more."""


@dataclass(frozen=True)
class Step:
    """What one step at 1024x1024 asks of the device."""

    launches: int
    elementwise_bytes: int
    counts: Counts
    """Counted eagerly: its products are those of the compiled step too."""


@dataclass(frozen=True)
class Compiled:
    """The graphs of one precision, and how many more other sizes, models and LoRAs compiled."""

    graphs: list[Graph]
    recompiled: int


def compiled_graphs(scale: Scale = FULL, parts: Iterable[str] = (*PRECISIONS, DECODER)) -> dict[str, Compiled]:
    """By precision, along the engine's own path; "exact with LoRAs" are the graphs with factors beside the weights.

    `DECODER` is the VAE's, which both precisions share.
    """
    found: dict[str, Compiled] = {}
    recorder = Recorder()
    with fake_device(), recording(recorder), fake_tensors():
        engine = _compiling_engine(scale)
        for part in parts:
            if part == DECODER:
                found[part] = _compiled_decoder(engine, recorder)
                continue
            found[part] = _compiled(engine, part, recorder)
            if part == "exact":
                engine.exact.adapters["dev"].apply(loras(engine, 1))
                found[WITH_LORAS] = _compiled(engine, part, recorder)
    return found


def _compiling_engine(scale: Scale) -> Engine:
    """Built with values for the host, which schedulers ask for and torch.compile cannot trace."""
    counter = DeviceCounter()
    with HostValues(counter.on_sync), counter:
        return engine_of(scale=scale, compiling=True)


def _compiled(engine: Engine, precision: str, recorder: Recorder) -> Compiled:
    """One step at 1024x1024 of dev, then other sizes, the other model, and other LoRAs."""
    before = len(recorder.graphs)
    take_step(transformer_of(engine, precision))
    graphs = recorder.graphs[before:]
    calls = [graph.calls for graph in graphs]
    for image_tokens, text_tokens in OTHER_TOKENS:
        take_step(transformer_of(engine, precision), image_tokens, text_tokens)
    owner = precision_of(engine, precision)
    if owner is not engine.exact or owner.adapters["dev"].active_stack("transformer"):
        for model in ("schnell", "dev"):
            owner.adapters[model].apply(loras(engine, 2))
            take_step(transformer_of(engine, precision, model), text_tokens=FULL.text_tokens[model])
    for graph, number in zip(graphs, calls, strict=True):
        graph.calls = number
    return Compiled(graphs, len(recorder.graphs) - before - len(graphs))


@torch.inference_mode()
def _compiled_decoder(engine: Engine, recorder: Recorder) -> Compiled:
    """Decode at the warm-up's size, then at others."""
    before = len(recorder.graphs)
    vae = engine.exact.models["dev"].pipelines[Mode.TXT2IMG].vae
    decode(vae, WARM_UP_SIZE.height // 8, WARM_UP_SIZE.width // 8)
    graphs = recorder.graphs[before:]
    for height, width in OTHER_LATENTS:
        decode(vae, height, width)
    for graph in graphs:
        graph.calls = 1
    return Compiled(graphs, len(recorder.graphs) - before - len(graphs))


def graphs_table(found: dict[str, Compiled]) -> Table:
    """Every graph with its kernels, assembled for sm_90."""
    columns = ("precision", "graph", "Triton launches", "products", "MB", "calls a step", "registers", "spills")
    table = Table("Compiled graphs, for compute capability 9.0", columns)
    for precision, compiled in found.items():
        for graph in compiled.graphs:
            kernels = assembled([graph]) if graph.code else []
            most = max((kernel.registers for kernel in kernels), default=0)
            counted = (graph.launches, graph.products, f"{graph.triton_bytes / 1e6:.0f}", graph.calls)
            table.rows.append((precision, graph.name, *counted, most, _spills(kernels)))
            table.require(not graph.error, f"{precision}, {graph.name} does not compile: {graph.error}")
            for problem in _kernel_problems(kernels):
                table.require(False, f"{precision}, {graph.name}: {problem}")
        table.require(bool(compiled.graphs), f"{precision}: nothing was compiled")
        table.require(not compiled.recompiled, f"{precision}: {compiled.recompiled} graphs more for other sizes")
    table.notes.append(
        "Registers are the most of a thread in any kernel. A kernel has several configurations, of which the device "
        "chooses the fastest at its first call; spills counts those that spill. At least one of each kernel must not."
    )
    return table


def _spills(kernels: list[Kernel]) -> str:
    return f"{sum(kernel.spilled_bytes > 0 for kernel in kernels)} of {len(kernels)}"


def _kernel_problems(kernels: list[Kernel]) -> Iterable[str]:
    """Kernels that cannot be assembled, and kernels that spill in all their configurations."""
    yield from (f"{kernel.name}: {kernel.error}" for kernel in kernels if kernel.error)
    for name in {kernel.name for kernel in kernels}:
        if all(kernel.spilled_bytes for kernel in kernels if kernel.name == name):
            yield f"{name} spills in every configuration"


def eager_steps(scale: Scale = FULL) -> dict[str, Counts]:
    """Counts of one step by precision; "... outside" are those outside the parts that are compiled.

    "first" is go_fast's first step of a request of 28, with what the others share. LoRAs beside exact weights have the
    rank that compiled blocks reserve for them, so one takes as long as two.
    """
    found: dict[str, Counts] = {}
    counter = DeviceCounter()
    with fake_device(), fake_tensors(counter.on_sync), counter.watching():
        engine = engine_of(scale=scale)
        for precision in PRECISIONS:
            found[f"schnell {precision}"] = counter.restart()
            take_step(transformer_of(engine, precision, "schnell"), text_tokens=FULL.text_tokens["schnell"])
            transformer = transformer_of(engine, precision)
            shared = request_state(FULL.steps["dev"]) if precision == "fast" else None
            if shared is not None:
                found["first"] = counter.restart()
                take_step(transformer, shared=shared)
            found[precision] = counter.restart()
            take_step(transformer, shared=shared)
            found[f"{precision} outside"] = counter.restart()
            with counter.paused_within(compiled_parts(transformer)):
                take_step(transformer, shared=shared)
            counter.restart()
        for model, prefix in (("dev", ""), ("schnell", "schnell ")):
            counter.restart()
            engine.exact.adapters[model].apply(loras(engine, 2, RESERVED_RANK // 2))
            found[prefix + WITH_LORAS] = counter.restart()
            take_step(transformer_of(engine, "exact", model), text_tokens=FULL.text_tokens[model])
        counter.restart()
    return found


def steps_of(eager: dict[str, Counts], compiled: dict[str, Compiled]) -> dict[str, Step]:
    """Steps by name, "exact eager", "exact" and so on; after "schnell " those of schnell, with less text."""
    steps = {}
    shorter = sum(FULL.text_tokens[n] * sign for n, sign in (("schnell", 1), ("dev", -1))) / 4608 + 1
    for name, beside in (("exact", "exact"), (WITH_LORAS, "exact"), ("fast", "fast")):
        plain = eager[name]
        if name != WITH_LORAS:
            steps[f"{name} eager"] = Step(plain.kernels, plain.elementwise_bytes, plain)
        outside, graphs = eager[f"{beside} outside"], compiled[name].graphs
        launches = outside.kernels + sum(graph.calls * (graph.launches + graph.products) for graph in graphs)
        moved = outside.elementwise_bytes + sum(graph.calls * graph.triton_bytes for graph in graphs)
        steps[name] = Step(launches, moved, plain)
        steps[f"schnell {name}"] = Step(launches, int(moved * shorter), eager[f"schnell {name}"])
    schnell = eager["schnell exact"]
    steps["schnell exact eager"] = Step(schnell.kernels, schnell.elementwise_bytes, schnell)
    return steps


def steps_table(steps: dict[str, Step]) -> Table:
    """Launches, elementwise traffic and FLOP of a step."""
    columns = ("one step, 1024x1024", "launches", "elementwise GB", "TFLOP", "waits", "copies")
    table = Table("A denoising step", columns)
    for name, step in steps.items():
        tflop, moved = step.counts.flop / 1e12, gigabytes(step.elementwise_bytes)
        waits, copies = sum(step.counts.syncs.values()), sum(step.counts.copies.values())
        table.rows.append((name, step.launches, moved, f"{tflop:.2f}", waits, copies))
        if name.startswith("schnell"):
            continue
        expected = name == WITH_LORAS or abs(tflop - STEP_TFLOP) <= FLOP_ACCURACY * STEP_TFLOP
        table.require(expected, f"{name}: {tflop:.2f} TFLOP")
        table.require(not waits and not copies, f"{name}: {dict(step.counts.syncs)} {dict(step.counts.copies)}")
        if name in STEP_LAUNCHES:
            table.require(step.launches <= STEP_LAUNCHES[name], f"{name}: {step.launches} launches")
            table.require(step.elementwise_bytes <= STEP_ELEMENTWISE_GB[name] * 1e9, f"{name}: {moved} GB elementwise")
    return table
