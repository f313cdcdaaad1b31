"""Start the engine of a profile: plan the memory, load, make the fp8 copy, compile, warm up.

Compilation goes on while the transformers are read, and needs none of their weights: the same graphs serve all blocks
of a kind, so they are made for a transformer of three blocks of zeros. The warm-up then finds them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.compilation import (
    WARM_UP_SIZE,
    CompileCache,
    compile_blocks,
    compile_decoder,
    compiled_parts,
    lay_out_channels_last,
    run_uncompiled,
    should_compile,
)
from engine.device_thread import DeviceThread
from engine.engine import EVERYTHING_ON_THE_DEVICE, Engine
from engine.fp8 import Rewrite, Scheme, choose_rewrite, choose_scheme
from engine.loading import Model, Shared, empty_transformer, load_models, model_over
from engine.memory_plan import EXACT, Layout, Placement, Plan, plan_memory, profile_sizes
from engine.offload import pin
from engine.out_of_memory import free_memory
from engine.precision import RESERVED_RANK, Precision, exact_precision, fast_precision
from engine.profiles import ModelProfile
from engine.timeline import Timeline
from lora_loading.reading.adapter import LoraAdapter, Stack
from lora_loading.reading.layers import LayerUpdate
from lora_loading.shapes import TRANSFORMER
from lora_loading.updates import LowRank
from request import GenerationRequest, Mode
from settings import Settings

logger = logging.getLogger(__name__)

HOST = torch.device("cpu")
GRAPHS = "graphs"
"""The name of the folder for compiled graphs, in the cache folder."""


def start_engine(
    profiles: tuple[ModelProfile, ...], settings: Settings, device: torch.device, timeline: Timeline | None = None
) -> Engine:
    """Load the models and return an engine that is ready for its first request.

    Memory that is already allocated on the device, such as the safety checker's, is counted in the plan.

    Args:
        profiles: their sources are local folders.
        settings: the operator's settings.
        device: where the models run.
        timeline: to note each part of the start in.

    Raises:
        SettingsError: the models do not fit into the device's memory.
    """
    timeline, thread = timeline or Timeline(), DeviceThread()
    scheme = thread.run(lambda: choose_scheme(device))
    rewrite = thread.run(lambda: choose_rewrite(device)) if scheme else None
    logger.info("go_fast: %s", scheme.name if scheme else "fp8 does not work on this device, so it runs exact")
    plan = _plan(profiles, scheme, device)
    layout = plan.layout
    compiling = should_compile(settings.compile, device)
    cache = CompileCache(_graphs_folder(settings), device)

    def build(models: Mapping[str, Model]) -> Engine:
        work = partial(assemble, models, scheme, device, layout, compiling=compiling, rewrite=rewrite, thread=thread)
        return thread.run(lambda: work(lora_gain=settings.go_fast_lora_gain, spare_bytes=plan.spare_bytes))

    def compile_ahead(shared: Shared) -> None:
        with timeline.part("compilation, while transformers are read"):
            cache.load()
            _compile_ahead(build, profiles[0], shared, layout, device)

    models = _loaded(profiles, layout, device, timeline, compile_ahead if compiling else None)
    with timeline.part("fp8 copy"):
        engine = build(models)
    if compiling:
        with timeline.part("warm-up"):
            _warm_up(engine, layout)
        cache.save()
    return engine


def _compile_ahead(
    build: Callable[[Mapping[str, Model]], Engine],
    profile: ModelProfile,
    shared: Shared,
    layout: Layout,
    device: torch.device,
) -> None:
    """Compile every graph with a transformer that has a block of each kind; an error here costs time alone."""
    try:
        stand_in = empty_transformer(profile.source, num_layers=1, num_single_layers=2)
        place = device if layout.pristine is Placement.DEVICE else HOST
        zeros = partial(torch.zeros, dtype=shared["vae"].dtype, device=place)
        stand_in.load_state_dict({n: zeros(p.shape) for n, p in stand_in.named_parameters()}, assign=True)
        _warm_up(build({profile.name: model_over(profile, stand_in, shared)}), layout)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("nothing was compiled while weights are read, but afterwards: %s", reason)
    free_memory()


def assemble(
    models: Mapping[str, Model],
    scheme: Scheme | None,
    device: torch.device,
    layout: Layout = EVERYTHING_ON_THE_DEVICE,
    *,
    compiling: bool,
    lora_gain: float,
    rewrite: Rewrite | None = None,
    thread: DeviceThread | None = None,
    spare_bytes: int | None = None,
) -> Engine:
    """Build the engine over loaded models; `scheme` is None where fp8 does not work.

    For `rewrite` see `fp8.choose_rewrite`, for `thread` and `spare_bytes` see `Engine`. With `compiling`, the
    transformers' blocks and the VAE's decoder are compiled at their first call.
    """
    for vae in _vaes(models):
        if device.type == "cuda":
            lay_out_channels_last(vae)
        if compiling:
            compile_decoder(vae)
    exact = exact_precision(models, RESERVED_RANK if compiling else 0)
    fast = fast_precision(exact, scheme, device, lora_gain, rewrite) if scheme else None
    for precision in filter(None, (exact, fast)) if compiling else ():
        for model in precision.models.values():
            compile_blocks(model.pipelines[Mode.TXT2IMG].transformer)
    return Engine(exact, fast, device, layout, thread, spare_bytes)


def _vaes(models: Mapping[str, Model]) -> list[Any]:
    """Each once: models mostly share one."""
    return list({id(vae): vae for model in models.values() if (vae := model.pipelines[Mode.TXT2IMG].vae)}.values())


def _graphs_folder(settings: Settings) -> Path:
    return (settings.graphs_dir or settings.cache_dir / GRAPHS).expanduser()


def _plan(profiles: tuple[ModelProfile, ...], scheme: Scheme | None, device: torch.device) -> Plan:
    cuda = device.type == "cuda"
    allocated = torch.cuda.memory_allocated(device) if cuda else 0
    sizes = profile_sizes(profiles, fp8=scheme is not None, checker_bytes=allocated)
    plan = plan_memory(sizes, torch.cuda.mem_get_info(device)[1] if cuda else None)
    if cuda:
        logger.info("memory: %s", plan)
    return plan


def _loaded(
    profiles: tuple[ModelProfile, ...],
    layout: Layout,
    device: torch.device,
    timeline: Timeline,
    meanwhile: Callable[[Shared], None] | None,
) -> dict[str, Model]:
    transformers_at = device if layout.pristine is Placement.DEVICE else HOST
    text_encoders_at = device if layout.text_encoders is Placement.DEVICE else HOST
    models = load_models(profiles, device, transformers_at, text_encoders_at, timeline, meanwhile)
    for model in models.values() if device.type == "cuda" else ():
        pipeline = model.pipelines[Mode.TXT2IMG]
        for module in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
            if module.device == HOST:
                pin(module)
    return models


def _warm_up(engine: Engine, layout: Layout) -> None:
    """Generate one image with each kind of graph; a graph that is not there yet is compiled now."""
    name = next(iter(engine.exact.models))
    runs: list[tuple[bool, Stack]] = []
    if engine.fast is not None:  # first: where exact requests release the copy, it would be written twice
        runs.append((True, ()))
    if EXACT in layout.precisions:
        runs += [(False, ()), (False, [(_zero_adapter(engine.exact, name), 1.0)])]
    for go_fast, stack in runs:
        _generate_once(engine, _warm_up_request(name, go_fast), stack)


def _generate_once(engine: Engine, request: GenerationRequest, stack: Stack) -> None:
    """Generate one image with compiled blocks; if that fails, with all blocks uncompiled.

    Kernels are tuned at their first call, so a failure can come after `compiled_or_eager` returned. An error that has
    nothing to do with compilation comes again, and ends the setup.
    """
    try:
        list(engine.generate(request, stack))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("the first compiled image failed, so blocks run uncompiled and slower: %s", reason)
        for precision in filter(None, (engine.exact, engine.fast)):
            for model in precision.models.values():
                run_uncompiled(compiled_parts(model.pipelines[Mode.TXT2IMG].transformer))
            run_uncompiled(vae.decoder for vae in _vaes(precision.models))
        list(engine.generate(request, stack))


def _warm_up_request(model: str, go_fast: bool) -> GenerationRequest:
    return GenerationRequest(
        prompt="",
        mode=Mode.TXT2IMG,
        size=WARM_UP_SIZE,
        model=model,
        num_outputs=1,
        num_inference_steps=1,
        guidance_scale=3.0,
        strength=1.0,
        seed=0,
        output_format="png",
        output_quality=80,
        go_fast=go_fast,
    )


def _zero_adapter(precision: Precision, model: str) -> LoraAdapter:
    """A zero adapter: forces the AdaptedLinear layers, so that their graph is compiled in the warm-up."""
    layers = precision.adapters[model].shapes.by_component[TRANSFORMER].values()
    layer = next(layer for layer in layers if len(layer.weight) == 2)
    rows, columns = layer.weight
    factors = LowRank(torch.zeros(1, columns), torch.zeros(rows, 1), 1.0)
    return LoraAdapter("warm-up", "none", (LayerUpdate(TRANSFORMER, layer.name, "weight", factors),))
