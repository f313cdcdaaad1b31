"""Turn a request into images with the loaded models. Knows nothing of Cog's inputs, files or the safety checker.

The images of a request are generated one after another, each with its own random generator. So an image depends on its
seed and not on `num_outputs`, and the first image is ready as early as if it were the only one.

Whoever asks, models run on one thread alone, from the warm-up to the last request: see `engine.device_thread`.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from engine.device_thread import DeviceThread
from engine.image_to_latents import EncodedImage, encode_image
from engine.lean_transformer import REQUEST, LeanTransformer, RequestState
from engine.loading import Model
from engine.memory_plan import EXACT, LAYOUTS, Layout, Placement, new_weights_bytes
from engine.offload import moved_to_device
from engine.out_of_memory import retry_on_oom
from engine.precision import Precision
from errors import ModelError
from images import composite
from logs import Event, log_stage
from lora_loading.applying.manager import AdapterManager
from lora_loading.reading.adapter import Stack
from lora_loading.shapes import CLIP, T5, TRANSFORMER, ModelShapes
from request import GenerationRequest, Mode

logger = logging.getLogger(__name__)

EVERYTHING_ON_THE_DEVICE = LAYOUTS[0]
PROMPTS_KEPT = 32
"""How many encoded prompts are kept on the device: 4 MB each for FLUX.1 [dev]."""


class Engine:
    """The loaded models in both precisions."""

    def __init__(
        self,
        exact: Precision,
        fast: Precision | None,
        device: torch.device,
        layout: Layout = EVERYTHING_ON_THE_DEVICE,
        thread: DeviceThread | None = None,
        spare_bytes: int | None = None,
    ) -> None:
        """Keep the models; nothing is moved or computed.

        Args:
            exact: the models in their original precision.
            fast: the models in fp8. None where fp8 does not work: `go_fast` then runs exact, with a line in the log.
            device: where the models run.
            layout: device placement and served precisions; a request for an unserved precision runs in the served one.
            thread: where models run; None for a new one.
            spare_bytes: what the weights that a stack makes anew may take in the original precision: see
                `Plan.spare_bytes`; None for no limit. A stack that needs more runs in fp8.
        """
        self._thread = thread or DeviceThread()
        self.exact = exact
        self.fast = fast
        self._device = device
        self._layout = layout
        self._spare_bytes = spare_bytes
        self._prompts: OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]] = OrderedDict()

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models."""
        return tuple(self.exact.models)

    def shapes(self, model: str) -> ModelShapes:
        """The layer shapes that an adapter for this model must fit, for `read_adapter`."""
        return self.exact.adapters[model].shapes

    def require_working_device(self) -> None:
        """Make sure that the device computes: after some faults of CUDA it does not until the process ends.

        In the calling thread, so that it need not wait for a prediction.

        Raises:
            ModelError: it does not.
        """
        try:
            total = torch.ones(8, device=self._device).sum().item()
        except RuntimeError as error:
            raise ModelError(f"The device {self._device} does not compute any more. Restart the server.") from error
        if total != 8:
            raise ModelError(f"The device {self._device} computes wrongly. Restart the server.")

    def generate(
        self, request: GenerationRequest, stack: Stack = (), base: Stack = ()
    ) -> Generator[Image.Image, None, None]:
        """Yield `request.num_outputs` RGB images of `request.size`, in order; close it if it is not used up.

        Args:
            request: a complete request.
            stack: the request's adapters, read for `shapes(request.model)`, with their scales; go_fast's gain is
                applied here.
            base: the operator's adapters, likewise, which the gain does not change.

        Raises:
            ModelError: the result has values that are not finite, or the device ran out of memory twice.
        """
        return self._thread.iterate(lambda: self._generate(request, stack, base))

    def _generate(self, request: GenerationRequest, stack: Stack, base: Stack) -> Iterator[Image.Image]:
        if request.image is not None and denoising_steps(request) == 0:
            yield from (request.image.copy() for _ in range(request.num_outputs))
            return
        precision = self._precision(request, [*base, *stack])
        model = precision.models[request.model]
        pipeline = model.pipelines[request.mode]
        gain = precision.lora_gain if request.go_fast else 1.0
        if stack and gain != 1:
            logger.info("go_fast multiplies the scales of LoRAs by %g", gain)
        stack = [*base, *((adapter, scale * gain) for adapter, scale in stack)]
        prompt = retry_on_oom(lambda: self._prepared(precision, model, stack, request), request.size)
        given = retry_on_oom(lambda: encode_image(pipeline, request, self._device), request.size)
        with self._on_device(precision, pipeline.transformer):
            for index in range(request.num_outputs):
                make = partial(self._denoise, pipeline, model, request, index, prompt, given)
                started = time.monotonic()
                image = retry_on_oom(make, request.size)
                seconds = time.monotonic() - started
                log_stage(logger, Event("generate", seconds), f"image {index}: generated in {seconds:.2f} s")
                if request.image is not None and request.mask is not None:
                    image = composite(request.image, image, request.mask)
                yield image

    def _precision(self, request: GenerationRequest, stack: Stack) -> Precision:
        if request.go_fast and self.fast is None:
            logger.warning("go_fast: fp8 does not work on this device, so the original precision is used")
        if not request.go_fast and self.fast is not None and EXACT not in self._layout.precisions:
            logger.warning("the original precision does not fit into this device's memory, so fp8 is used")
            return self.fast
        if not request.go_fast and self.fast is not None and self._spare_bytes is not None:
            needed = new_weights_bytes(stack, self.shapes(request.model))
            if needed > self._spare_bytes:
                logger.warning(
                    "beside the original weights these LoRAs take %.1f GB, since they are not low-rank, and %.1f GB "
                    "are left, so fp8 is used",
                    needed / 1e9,
                    self._spare_bytes / 1e9,
                )
                return self.fast
        return self.fast if request.go_fast and self.fast is not None else self.exact

    def _prepared(
        self, precision: Precision, model: Model, stack: Stack, request: GenerationRequest
    ) -> tuple[Tensor, Tensor]:
        """Apply the adapters, then encode the prompt with them; returns what `_encoded` returns."""
        if precision is self.exact and self.fast is not None and self._layout.working_copy is Placement.ON_DEMAND:
            self.fast.release()
        self._clear_others(precision, request.model)
        adapters = precision.adapters[request.model]
        _apply(adapters, stack)
        if model.profile.vocabulary and (remark := model.profile.vocabulary.remark(request.prompt)):
            logger.info("%s", remark)
        started = time.monotonic()
        encoded = self._encoded(model, adapters, request.prompt)
        seconds = time.monotonic() - started
        log_stage(logger, Event("encode_prompt", seconds), f"prompt encoded in {seconds:.2f} s")
        return encoded

    def _clear_others(self, precision: Precision, model: str) -> None:
        """Take the adapters off the transformers in the original precision that are not to run.

        The memory plan has room for one transformer's; what is not low-rank takes as much as the weights themselves.
        """
        for name, adapters in self.exact.adapters.items():
            if precision is not self.exact or name != model:
                adapters.components[TRANSFORMER].apply([])

    def _on_device(self, precision: Precision, transformer: nn.Module) -> AbstractContextManager[None]:
        """Within, the transformer is on the device; the working copy's transformers always are."""
        away = precision is self.exact and self._layout.pristine is Placement.ON_DEMAND
        return moved_to_device([transformer] if away else [], self._device)

    @torch.inference_mode()
    def _encoded(self, model: Model, adapters: AdapterManager, prompt: str) -> tuple[Tensor, Tensor]:
        """The prompt's T5 states (1, tokens, width) and pooled CLIP vector (1, width), cached by prompt and adapter."""
        pipeline = model.pipelines[Mode.TXT2IMG]
        limit = model.profile.max_prompt_tokens
        for_clip, for_t5 = adapters.prompt(CLIP, prompt), adapters.prompt(T5, prompt)
        tokens = len(pipeline.tokenizer_2(for_t5, truncation=False, verbose=False).input_ids)
        if tokens > limit:
            logger.warning(
                "the prompt has %d tokens, of which %s reads the first %d", tokens, model.profile.name, limit
            )
        key = (prompt, limit, adapters.active_stack(CLIP), adapters.active_stack(T5))
        if key not in self._prompts:
            away = self._layout.text_encoders is Placement.ON_DEMAND
            encoders = [pipeline.text_encoder, pipeline.text_encoder_2] if away else []
            with moved_to_device(encoders, self._device):
                prompt_embeds, pooled, _ = pipeline.encode_prompt(
                    prompt=for_clip, prompt_2=for_t5, device=self._device, max_sequence_length=limit
                )
            if not (torch.isfinite(prompt_embeds).all() and torch.isfinite(pooled).all()):
                raise ModelError("The encoded prompt has values that are not finite. Try again, or lower LoRA scales.")
            self._prompts[key] = prompt_embeds, pooled
            if len(self._prompts) > PROMPTS_KEPT:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(key)
        return self._prompts[key]

    @torch.inference_mode()
    def _denoise(
        self,
        pipeline: DiffusionPipeline,
        model: Model,
        request: GenerationRequest,
        index: int,
        prompt: tuple[Tensor, Tensor],
        given: EncodedImage | None,
    ) -> Image.Image:
        generator = torch.Generator(self._device).manual_seed(request.seed_of(index))
        prompt_embeds, pooled = prompt
        pixels: Tensor = pipeline(
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled,
            width=request.size.width,
            height=request.size.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=generator,
            max_sequence_length=model.profile.max_prompt_tokens,
            output_type="pt",
            joint_attention_kwargs=_shared_by_steps(pipeline),
            **({} if given is None else given.arguments(request, generator)),
        ).images[0]
        return _to_image(pixels)


def _apply(adapters: AdapterManager, stack: Stack) -> None:
    """Make the model carry the stack; one log line."""
    started = time.monotonic()
    before = [component.active_stack for component in adapters.components.values()]
    adapters.apply(stack)
    swapped = before != [component.active_stack for component in adapters.components.values()]
    event = Event("apply_loras", time.monotonic() - started, outcome="swapped" if swapped else "kept")
    log_stage(logger, event, f"LoRAs {event.outcome}: {len(stack)}, in {event.seconds:.2f} s")


def _shared_by_steps(pipeline: DiffusionPipeline) -> dict[str, RequestState] | None:
    """What go_fast's transformer keeps from step to step, within one call of the pipeline."""
    return {REQUEST: RequestState(pipeline.scheduler)} if isinstance(pipeline.transformer, LeanTransformer) else None


def denoising_steps(request: GenerationRequest) -> int:
    """How many steps the pipelines take: `num_inference_steps * strength`, rounded up, as diffusers rounds it."""
    steps = request.num_inference_steps
    return steps - int(max(steps - min(steps * request.strength, steps), 0))


def _to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> RGB.

    Raises:
        ModelError: a value is not finite.
    """
    if not torch.isfinite(pixels).all():
        raise ModelError("The model's result has values that are not finite. Try another seed, or lower LoRA scales.")
    values = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())
