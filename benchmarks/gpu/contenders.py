"""Who is measured: ours in both precisions, and what can be had from PyPI for the same job.

Peers are used as their documentation says: plain pipelines; `compile_repeated_blocks`; torchao's fp8 with a LoRA that
PEFT hot-swaps, quantised, loaded and compiled in this order; cache-dit at its defaults over the plain pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from PIL import Image
from torchao.quantization import quantize_

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.loras import Loras
from benchmarks.gpu.models import MODELS, Weights
from benchmarks.gpu.plan import CACHED, COMPILED, EAGER, HOTSWAP, OURS_FAST, SWAP, SWITCH, Case, Change
from benchmarks.gpu.scales import Scale
from engine.compilation import should_compile
from engine.fp8 import Scheme, choose_scheme
from engine.precision import Precision
from engine.start import assemble
from errors import ModelError
from lora_loading.reading.adapter import LoraAdapter
from request import GenerationRequest, Mode, Size

GUIDANCE = 3.5
ADAPTER = "measured"


@dataclass(frozen=True)
class Bench:
    """What all contenders work with."""

    scale: Scale
    clock: Clock
    weights: Weights
    loras: Loras


class Contender(Protocol):
    """Somebody who makes images, and can be watched at it."""

    def pipeline(self, case: Case) -> Any:  # noqa: ANN401 - diffusers ships no types
        """The pipeline that will make the case's images; it is built if it is not there."""

    def make_image(self, case: Case, prompt: str, steps: int) -> Image.Image:
        """One image, of the seed 0."""

    def change(self, change: Change) -> Callable[[int], object]:
        """What does the change, given the number of the turn: odd and even turns go to and fro."""

    @property
    def models_used(self) -> frozenset[str]:
        """Whose pristine weights it has need of."""


class Ours:
    """The engine with both precisions, as the predictor sets it up."""

    models_used = frozenset(MODELS)

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        device = bench.clock.device
        models = bench.weights.models(*MODELS)
        compiling = should_compile("auto", device)
        self.engine = assemble(models, fp8_scheme(device), device, compiling=compiling, lora_gain=1.0)

    def precision(self, contender: str) -> Precision:
        """The precision that a contender's name means."""
        chosen = self.engine.fast if contender == OURS_FAST else self.engine.exact
        if chosen is None:
            raise ValueError("the engine has no fast precision")
        return chosen

    def pipeline(self, case: Case) -> Any:  # noqa: ANN401
        """The precision's own."""
        return self.precision(case.contender).models[case.model].pipelines[Mode.TXT2IMG]

    def make_image(self, case: Case, prompt: str, steps: int) -> Image.Image:
        """By way of a request, its LoRAs applied on the way."""
        request = GenerationRequest(
            prompt=prompt,
            mode=Mode.TXT2IMG,
            size=Size(case.width, case.height),
            model=case.model,
            num_outputs=1,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            strength=1.0,
            seed=0,
            output_format="webp",
            output_quality=80,
            go_fast=case.contender == OURS_FAST,
        )
        (image,) = self.engine.generate(request, self.stack(case.loras, case.rank))
        return image

    def stack(self, count: int, rank: int) -> list[tuple[LoraAdapter, float]]:
        """The first LoRAs of this rank, at full strength."""
        return [(self._bench.loras.adapter(rank, index), 1.0) for index in range(count)]

    def change(self, change: Change) -> Callable[[int], object]:
        """Another LoRA on dev, or the other model without any."""
        adapters = self.precision(change.contender).adapters
        names = tuple(MODELS)
        if change.what == SWITCH:
            return lambda turn: adapters[names[turn % 2]].apply(())
        if change.what == SWAP:
            pair = self.stack(2, change.rank)
            return lambda turn: adapters[names[0]].apply(pair[turn % 2 :][:1])
        raise ValueError(change.what)


class Peer:
    """A diffusers pipeline. One is there at a time; another model or rank has one built in its place."""

    def __init__(self, bench: Bench, build: Callable[[Bench, str, int], Any]) -> None:
        self._bench = bench
        self._build = build
        self._built: tuple[tuple[str, int], Any] | None = None

    @property
    def models_used(self) -> frozenset[str]:
        """The one that is there."""
        return frozenset(() if self._built is None else (self._built[0][0],))

    def pipeline(self, case: Case) -> Any:  # noqa: ANN401
        """The one that is there, if it is of this model and rank."""
        key = (case.model, case.rank)
        if self._built is None or self._built[0] != key:
            self._built = None
            torch.compiler.reset()
            self._bench.clock.free()
            self._built = key, self._build(self._bench, *key)
        return self._built[1]

    def make_image(self, case: Case, prompt: str, steps: int) -> Image.Image:
        """By calling the pipeline."""
        image: Image.Image = self.pipeline(case)(
            prompt,
            width=case.width,
            height=case.height,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            max_sequence_length=self._bench.scale.text_tokens[case.model],
            generator=torch.Generator(self._bench.clock.device).manual_seed(0),
        ).images[0]
        return image

    def change(self, change: Change) -> Callable[[int], object]:
        """diffusers' hotswap of the LoRA that the pipeline was built with."""
        if self._built is None or change.what != SWAP:
            raise ValueError(f"{change.what}: there is no LoRA to swap")
        pipeline = self._built[1]
        files = [self._bench.loras.state_dict(change.rank, index) for index in range(2)]

        def swap(turn: int) -> None:
            pipeline.load_lora_weights(dict(files[turn % 2]), adapter_name=ADAPTER, hotswap=True)

        return swap


def eager(bench: Bench, model: str, rank: int) -> Any:  # noqa: ANN401
    """The pipeline as it is."""
    return bench.weights.pipeline(model)


def compiled(bench: Bench, model: str, rank: int) -> Any:  # noqa: ANN401
    """Its blocks compiled, once for all sizes."""
    pipeline = bench.weights.pipeline(model)
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=bench.scale.compiler)
    return pipeline


def hotswap(bench: Bench, model: str, rank: int) -> Any:  # noqa: ANN401
    """All linear layers in fp8, by the scheme that ours has on this device, with one LoRA that can be swapped."""
    pipeline = bench.weights.pipeline(model)
    quantize_(pipeline.transformer, fp8_scheme(bench.clock.device).config)
    pipeline.enable_lora_hotswap(target_rank=rank)
    pipeline.load_lora_weights(bench.loras.state_dict(rank, 0), adapter_name=ADAPTER)
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=bench.scale.compiler)
    return pipeline


def cached(bench: Bench, model: str, rank: int) -> Any:  # noqa: ANN401
    """With cache-dit at its defaults (8 blocks always run, if there are so many); it leaves out parts of steps."""
    cache_dit = import_module("cache_dit")
    pipeline = bench.weights.pipeline(model)
    blocks = len(pipeline.transformer.transformer_blocks) + len(pipeline.transformer.single_transformer_blocks)
    return cache_dit.enable_cache(pipeline, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=min(8, blocks)))


PEERS: Mapping[str, Callable[[Bench, str, int], Any]] = {
    EAGER: eager,
    COMPILED: compiled,
    HOTSWAP: hotswap,
    CACHED: cached,
}


def open_contender(stage: str, bench: Bench) -> Contender:
    """The contender of a stage, by the stage's name."""
    return Peer(bench, PEERS[stage]) if stage in PEERS else Ours(bench)


def is_installed(stage: str) -> bool:
    """Whether what the stage needs besides the project's own requirements is there."""
    return stage != CACHED or find_spec("cache_dit") is not None


def fp8_scheme(device: torch.device) -> Scheme:
    """How the device holds weights in fp8.

    Raises:
        ModelError: it cannot.
    """
    scheme = choose_scheme(device)
    if scheme is None:
        raise ModelError(f"fp8 does not work on {device}, so there is nothing to measure. Use another device.")
    return scheme
