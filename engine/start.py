"""Start the engine of a profile: plan the memory, load, make the fp8 copy, compile, warm up."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from engine.compilation import WARM_UP_SIZE, CompileCache, compile_blocks, run_uncompiled, should_compile
from engine.engine import EVERYTHING_ON_THE_DEVICE, Engine
from engine.fp8 import Rewrite, Scheme, choose_rewrite, choose_scheme
from engine.loading import Model, load_models
from engine.memory_plan import EXACT, Layout, Placement, plan_memory, profile_sizes
from engine.offload import pin
from engine.precision import RESERVED_RANK, Precision, exact_precision, fast_precision
from engine.profiles import ModelProfile
from lora_loading.applying.manager import Stack
from lora_loading.reading.adapter import LoraAdapter
from lora_loading.reading.layers import LayerUpdate
from lora_loading.shapes import TRANSFORMER
from lora_loading.updates import LowRank
from request import GenerationRequest, Mode
from settings import Settings

logger = logging.getLogger(__name__)

HOST = torch.device("cpu")
GRAPHS = "graphs"
"""The name of the folder for compiled graphs, in the cache folder."""


def start_engine(profiles: tuple[ModelProfile, ...], settings: Settings, device: torch.device) -> Engine:
    """Load the models and return an engine that is ready for its first request.

    Memory that is already allocated on the device, such as the safety checker's, is counted in the plan.

    Args:
        profiles: their sources are local folders.
        settings: the operator's settings.
        device: where the models run.

    Raises:
        SettingsError: the models do not fit into the device's memory.
    """
    scheme = choose_scheme(device)
    logger.info("go_fast: %s", scheme.name if scheme else "fp8 does not work on this device, so it runs exact")
    layout = _layout(profiles, scheme, device)
    compiling = should_compile(settings.compile, device)
    models = _loaded(profiles, layout, device)
    rewrite = choose_rewrite(device) if scheme else None
    gain = settings.go_fast_lora_gain
    engine = assemble(models, scheme, device, layout, compiling=compiling, lora_gain=gain, rewrite=rewrite)
    if compiling:
        _warm_up(engine, layout, CompileCache(_graphs_folder(settings), device))
    return engine


def assemble(
    models: Mapping[str, Model],
    scheme: Scheme | None,
    device: torch.device,
    layout: Layout = EVERYTHING_ON_THE_DEVICE,
    *,
    compiling: bool,
    lora_gain: float,
    rewrite: Rewrite | None = None,
) -> Engine:
    """Build the engine over loaded models; `scheme` is None where fp8 does not work.

    For `rewrite` see `fp8.choose_rewrite`. With `compiling`, the transformers' blocks are compiled at their first call.
    """
    exact = exact_precision(models, RESERVED_RANK if compiling else 0)
    fast = fast_precision(exact, scheme, device, lora_gain, rewrite) if scheme else None
    for precision in filter(None, (exact, fast)) if compiling else ():
        for model in precision.models.values():
            compile_blocks(model.pipelines[Mode.TXT2IMG].transformer)
    return Engine(exact, fast, device, layout)


def _graphs_folder(settings: Settings) -> Path:
    return (settings.graphs_dir or settings.cache_dir / GRAPHS).expanduser()


def _layout(profiles: tuple[ModelProfile, ...], scheme: Scheme | None, device: torch.device) -> Layout:
    cuda = device.type == "cuda"
    allocated = torch.cuda.memory_allocated(device) if cuda else 0
    sizes = profile_sizes(profiles, fp8=scheme is not None, checker_bytes=allocated)
    plan = plan_memory(sizes, torch.cuda.mem_get_info(device)[1] if cuda else None)
    if cuda:
        logger.info("memory: %s", plan)
    return plan.layout


def _loaded(profiles: tuple[ModelProfile, ...], layout: Layout, device: torch.device) -> dict[str, Model]:
    transformers_at = device if layout.pristine is Placement.DEVICE else HOST
    text_encoders_at = device if layout.text_encoders is Placement.DEVICE else HOST
    models = load_models(profiles, device, transformers_at, text_encoders_at)
    for model in models.values() if device.type == "cuda" else ():
        pipeline = model.pipelines[Mode.TXT2IMG]
        for module in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
            if module.device == HOST:
                pin(module)
    return models


def _warm_up(engine: Engine, layout: Layout, cache: CompileCache) -> None:
    """Generate one image with each kind of graph; graphs come from the cache or are compiled now."""
    started = time.monotonic()
    cache.load()
    name = next(iter(engine.exact.models))
    runs: list[tuple[bool, Stack]] = []
    if EXACT in layout.precisions:
        runs += [(False, ()), (False, [(_zero_adapter(engine.exact, name), 1.0)])]
    if engine.fast is not None:
        runs.append((True, ()))
    for go_fast, stack in runs:
        _generate_once(engine, _warm_up_request(name, go_fast), stack)
    cache.save()
    logger.info("compiled and warmed up in %.1f s", time.monotonic() - started)


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
                run_uncompiled(model.pipelines[Mode.TXT2IMG].transformer)
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
