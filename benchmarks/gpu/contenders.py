"""Who is measured: ours in both precisions, and diffusers as its documentation says.

diffusers: plain pipelines; `compile_repeated_blocks`; torchao's fp8 with a LoRA that PEFT hot-swaps, quantised, loaded
and compiled in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torchao.quantization import quantize_

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.loras import Loras
from benchmarks.models import MODELS, Weights
from benchmarks.plan import RANK, Case, Change, request_of
from benchmarks.scales import Scale
from engine.compilation import should_compile
from engine.fp8 import DYNAMIC, WEIGHT_ONLY, choose_rewrite, choose_scheme
from engine.start import assemble
from request import Mode

ADAPTER = "measured"


class Ours:
    """The engine with both precisions, as the predictor sets it up."""

    def __init__(self, weights: Weights, loras: Loras, device: torch.device) -> None:
        self._loras = loras
        scheme, rewrite = choose_scheme(device) or WEIGHT_ONLY, choose_rewrite(device)
        compiling = should_compile("auto", device)
        models = weights.models(*MODELS)
        self.engine = assemble(models, scheme, device, compiling=compiling, lora_gain=1.0, rewrite=rewrite)

    def transformer(self, case: Case) -> Any:  # noqa: ANN401 - diffusers ships no types
        """The one that makes the case's images."""
        precision = self.engine.fast if case.precision == "fast" and self.engine.fast else self.engine.exact
        pipeline = precision.models[case.model].pipelines[case.mode]
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.transformer

    def make(self, case: Case, prompt: str, steps: int) -> bytes:
        """One image's pixels, by way of a request, its LoRAs applied on the way."""
        (image,) = self.engine.generate(request_of(case, steps, prompt), self._stack(case.loras))
        return image.tobytes()

    def change(self, change: Change) -> None:
        """Bring the fp8 copy to a model and its LoRAs."""
        if self.engine.fast is not None:
            self.engine.fast.adapters[change.model].apply(self._stack(change.loras))

    def _stack(self, count: int) -> list[tuple[Any, float]]:
        return [(self._loras.adapter(index), 1.0) for index in range(count)]


class Peer:
    """A diffusers pipeline from text to image; it has one model, which is built when it is first asked for."""

    def __init__(self, build: Callable[[Any, Scale, Loras], Any], weights: Weights, scale: Scale, loras: Loras) -> None:
        self._given = build, weights, scale, loras
        self._built: tuple[str, Any] | None = None

    def transformer(self, case: Case) -> Any:  # noqa: ANN401
        """The one that makes the case's images."""
        return self._pipeline(case.model).transformer

    def _pipeline(self, model: str) -> Any:  # noqa: ANN401
        build, weights, scale, loras = self._given
        if self._built is None or self._built[0] != model:
            self._built = None
            torch.compiler.reset()
            pipeline = build(weights.models(model)[model].pipelines[Mode.TXT2IMG], scale, loras)
            pipeline.set_progress_bar_config(disable=True)
            self._built = model, pipeline
        return self._built[1]

    def make(self, case: Case, prompt: str, steps: int) -> bytes:
        """One image's pixels."""
        pipeline = self._pipeline(case.model)
        image = pipeline(
            prompt,
            width=case.size.width,
            height=case.size.height,
            num_inference_steps=steps,
            guidance_scale=3.0,
            max_sequence_length=self._given[2].text_tokens[case.model],
            generator=torch.Generator(pipeline.device).manual_seed(0),
        ).images[0]
        pixels: bytes = image.tobytes()
        return pixels


def compiled(pipeline: Any, scale: Scale, loras: Loras) -> Any:  # noqa: ANN401
    """Its blocks compiled, once for all sizes."""
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=scale.compiler)
    return pipeline


def hotswap(pipeline: Any, scale: Scale, loras: Loras) -> Any:  # noqa: ANN401
    """All linear layers in fp8 with one LoRA that can be swapped."""
    quantize_(pipeline.transformer, (DYNAMIC if pipeline.device.type == "cuda" else WEIGHT_ONLY).config)
    pipeline.enable_lora_hotswap(target_rank=RANK)
    pipeline.load_lora_weights(loras.state_dict(0), adapter_name=ADAPTER)
    return compiled(pipeline, scale, loras)


PEERS: Mapping[str, Callable[[Any, Scale, Loras], Any]] = {
    "diffusers": lambda pipeline, scale, loras: pipeline,
    "diffusers compiled": compiled,
    "diffusers fp8, hotswap": hotswap,
}


def median_seconds(clock: Clock, make: Callable[[], object], runs: int) -> float:
    """Of a call on the host's clock, the device's work included."""

    def finished() -> None:
        make()
        clock.finish()

    return clock.of_one([finished], 1, runs)
