"""Turn a request into images with the loaded models. Knows no inputs, files or safety.

Images are made one after another, each from a generator of its own: an image then depends on its seed alone and
not on how many were asked for, and the first one is ready as early as if it were the only one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from engine.loading import Model
from engine.memory_plan import EXACT, LAYOUTS, Layout, Placement
from engine.offload import moved_to_device
from engine.out_of_memory import retry_on_oom
from engine.precision import Precision
from errors import ModelError
from images import composite
from lora_loading.applying.manager import AdapterManager, Stack
from lora_loading.shapes import CLIP, T5
from request import GenerationRequest, Mode

logger = logging.getLogger(__name__)

EVERYTHING_ON_THE_DEVICE = LAYOUTS[0]
PROMPTS_KEPT = 32
"""Encoded prompts in the device's memory: 4 MB each for FLUX.1 [dev]."""


class Engine:
    """The loaded models in their precisions, and the one way to use them."""

    def __init__(
        self, exact: Precision, fast: Precision | None, device: torch.device, layout: Layout = EVERYTHING_ON_THE_DEVICE
    ) -> None:
        """Take the models over.

        Args:
            exact: the models in their original precision.
            fast: the same in fp8; None where the device can't, and then `go_fast` runs exact and the log says so.
            device: where they run.
            layout: where the parts are, and which precisions are served; another one is replaced by one that is.
        """
        self.exact = exact
        self.fast = fast
        self._device = device
        self._layout = layout
        self._prompts: OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]] = OrderedDict()

    def generate(self, request: GenerationRequest, stack: Stack = ()) -> Iterator[Image.Image]:
        """Yield `request.num_outputs` RGB images of `request.size`, in order.

        Args:
            request: what to make.
            stack: the adapters to make it with, read for the model's shapes (see `Precision.adapters`), and their
                strengths as the request has them.

        Raises:
            ModelError: the model's numbers are not finite, or the device's memory does not suffice.
        """
        if request.image is not None and denoising_steps(request) == 0:
            yield from (request.image.copy() for _ in range(request.num_outputs))
            return
        precision = self._precision(request)
        model = precision.models[request.model]
        pipeline = model.pipelines[request.mode]
        gain = precision.lora_gain if request.go_fast else 1.0
        stack = [(adapter, strength * gain) for adapter, strength in stack]
        prompt_embeds, pooled = retry_on_oom(lambda: self._prepared(precision, model, stack, request), request.size)
        with self._at_hand(precision, pipeline.transformer):
            for index in range(request.num_outputs):
                make = partial(self._denoise, pipeline, model, request, index, prompt_embeds, pooled)
                image = retry_on_oom(make, request.size)
                if request.image is not None and request.mask is not None:
                    image = composite(request.image, image, request.mask)
                yield image

    def _precision(self, request: GenerationRequest) -> Precision:
        if request.go_fast and self.fast is None:
            logger.warning("go_fast: this device has no use of fp8, so the original precision is used")
        if not request.go_fast and self.fast is not None and EXACT not in self._layout.precisions:
            logger.warning("the original precision does not fit this device, so fp8 is used")
            return self.fast
        return self.fast if request.go_fast and self.fast is not None else self.exact

    def _prepared(
        self, precision: Precision, model: Model, stack: Stack, request: GenerationRequest
    ) -> tuple[Tensor, Tensor]:
        """Have the models carry the stack; the encoded prompt."""
        if precision is self.exact and self.fast is not None and self._layout.working_copy is Placement.ON_DEMAND:
            self.fast.release()
        adapters = precision.adapters[request.model]
        adapters.apply(stack)
        return self._encoded(model, adapters, request.prompt)

    def _at_hand(self, precision: Precision, transformer: nn.Module) -> AbstractContextManager[None]:
        """Have the transformer on the device; fp8 ones always are."""
        away = precision is self.exact and self._layout.pristine is Placement.ON_DEMAND
        return moved_to_device([transformer] if away else [], self._device)

    @torch.inference_mode()
    def _encoded(self, model: Model, adapters: AdapterManager, prompt: str) -> tuple[Tensor, Tensor]:
        """The prompt's T5 states (1, tokens, width) and pooled CLIP vector (1, width), kept for the next request."""
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
            with moved_to_device([pipeline.text_encoder, pipeline.text_encoder_2], self._device):
                prompt_embeds, pooled, _ = pipeline.encode_prompt(
                    prompt=for_clip, prompt_2=for_t5, device=self._device, max_sequence_length=limit
                )
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
        prompt_embeds: Tensor,
        pooled: Tensor,
    ) -> Image.Image:
        from_image = {} if request.image is None else {"image": request.image, "strength": request.strength}
        from_mask = {} if request.mask is None else {"mask_image": request.mask}
        generator = torch.Generator(self._device).manual_seed(request.seed_of(index))
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
            **from_image,
            **from_mask,
        ).images[0]
        return _to_image(pixels)


def denoising_steps(request: GenerationRequest) -> int:
    """How many steps the pipelines will take: strength takes the last part of them, rounded up."""
    steps = request.num_inference_steps
    return steps - int(max(steps - min(steps * request.strength, steps), 0))


def _to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> RGB.

    Raises:
        ModelError: a value is not finite.
    """
    if not torch.isfinite(pixels).all():
        raise ModelError("The model's result holds numbers that are not finite. Try another seed or fewer changes.")
    values = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())
