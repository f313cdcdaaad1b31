"""The three modes over shared parts, on the real pipelines and the tiny model; bare diffusers calls are the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline
from PIL import Image

from benchmarks.models import vae_of
from benchmarks.scales import TINY as TINY_SCALE
from engine.engine import Engine, denoising_steps
from engine.image_to_latents import encode_image
from engine.loading import load_models
from engine.precision import exact_precision
from engine.profiles import TINY, model_profiles
from errors import ModelError
from lora_loading.reading.adapter import LoraAdapter
from lora_loading.reading.layers import LayerUpdate
from lora_loading.shapes import T5
from lora_loading.updates import Full
from request import GenerationRequest, Mode
from settings import Settings
from tests.conftest import QUICK, request_of
from tests.tiny_models import narrow_transformer

Save = Callable[..., Path]


def image_of(engine: Engine, **inputs: Any) -> Image.Image:
    return next(engine.generate(request_of(**{**QUICK, **inputs})))


def bare_call(engine: Engine, request: GenerationRequest, **extra: Any) -> Image.Image:
    """What diffusers' own pipeline gives for the request, called as its documentation says."""
    model = engine.exact.models[request.model]
    pipeline = model.pipelines[request.mode]
    image: Image.Image = pipeline(
        request.prompt,
        width=request.size.width,
        height=request.size.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        max_sequence_length=model.profile.max_prompt_tokens,
        generator=torch.Generator().manual_seed(request.seed),
        **extra,
    ).images[0]
    return image


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_text_to_image_equals_the_bare_pipeline(engine: Engine, model: str) -> None:
    request = request_of(**QUICK, model=model)
    assert next(engine.generate(request)).tobytes() == bare_call(engine, request).tobytes()


def test_image_to_image_equals_the_bare_pipeline(engine: Engine, save: Save, scene_image: Image.Image) -> None:
    request = request_of(**QUICK, image=save(scene_image), prompt_strength=0.7)
    bare = bare_call(engine, request, image=request.image, strength=0.7)
    assert next(engine.generate(request)).tobytes() == bare.tobytes()


def test_the_modes_share_their_weights_and_nothing_that_changes(engine: Engine) -> None:
    for model in engine.exact.models.values():
        pipelines = list(model.pipelines.values())
        assert len({id(pipeline.transformer) for pipeline in pipelines}) == 1
        assert len({id(pipeline.scheduler) for pipeline in pipelines}) == 3
    assert len({id(model.pipelines[Mode.TXT2IMG].vae) for model in engine.exact.models.values()}) == 1
    assert len({id(model.pipelines[Mode.TXT2IMG].text_encoder_2) for model in engine.exact.models.values()}) == 1


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_the_same_seed_gives_the_same_bytes_whatever_came_between(
    engine: Engine, save: Save, scene_image: Image.Image, model: str
) -> None:
    first = image_of(engine, model=model)
    image_of(engine, model=model, image=save(scene_image), num_inference_steps=5)
    image_of(engine, model=model, image=save(scene_image), mask=save(Image.new("L", (256, 256), 255), "m.png"))
    image_of(engine, model=model, seed=8, num_inference_steps=1)
    assert image_of(engine, model=model).tobytes() == first.tobytes()
    assert image_of(engine, model=model, seed=8).tobytes() != first.tobytes()


def test_an_image_depends_on_its_seed_and_index_alone(engine: Engine) -> None:
    both = [p.tobytes() for p in engine.generate(request_of(**QUICK, num_outputs=3))]
    assert len(set(both)) == 3
    assert [p.tobytes() for p in engine.generate(request_of(**QUICK, num_outputs=1))] == both[:1]
    assert image_of(engine, seed=QUICK["seed"] + 2).tobytes() == both[2]


def test_the_global_random_state_is_left_alone(engine: Engine) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    image_of(engine)
    assert torch.equal(torch.get_rng_state(), before)


def test_guidance_has_an_effect_on_dev_and_none_on_schnell(engine: Engine) -> None:
    assert image_of(engine, guidance_scale=1.0).tobytes() != image_of(engine, guidance_scale=5.0).tobytes()
    schnell = [image_of(engine, model="schnell", guidance_scale=scale).tobytes() for scale in (0.0, 5.0)]
    assert schnell[0] == schnell[1]


@pytest.mark.parametrize("model", ["dev", "schnell"])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_as_many_steps_are_taken_as_asked(engine: Engine, model: str, steps: int) -> None:
    request = request_of(**{**QUICK, "num_inference_steps": steps, "width": 256, "height": 256}, model=model)
    pipeline = engine.exact.models[model].pipelines[Mode.TXT2IMG]
    next(engine.generate(request))
    assert pipeline.num_timesteps == steps


def test_more_steps_change_the_image(engine: Engine) -> None:
    assert image_of(engine, num_inference_steps=1).tobytes() != image_of(engine, num_inference_steps=2).tobytes()


# Strength


@pytest.mark.parametrize("with_mask", [False, True])
def test_strength_zero_returns_the_image_as_it_is(
    engine: Engine, save: Save, scene_image: Image.Image, with_mask: bool
) -> None:
    mask = {"mask": save(Image.new("L", (256, 256), 255), "m.png")} if with_mask else {}
    request = request_of(**{**QUICK, "num_outputs": 2}, image=save(scene_image), prompt_strength=0.0, **mask)
    images = list(engine.generate(request))
    assert [p.tobytes() for p in images] == [scene_image.tobytes()] * 2


@pytest.mark.parametrize("strength", [1e-9, 0.001, 0.02, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_no_strength_is_an_error(
    engine: Engine, save: Save, scene_image: Image.Image, strength: float, steps: int
) -> None:
    given = {**QUICK, "num_inference_steps": steps}
    request = request_of(**given, image=save(scene_image), prompt_strength=strength)
    assert next(engine.generate(request)).size == (256, 256)
    assert denoising_steps(request) >= 1


def test_strength_one_ignores_what_the_image_shows(engine: Engine, save: Save, scene_image: Image.Image) -> None:
    other = save(Image.effect_noise((256, 256), 80), "other.png")
    images = [image_of(engine, image=image, prompt_strength=1.0).tobytes() for image in (save(scene_image), other)]
    assert images[0] == images[1]


def test_less_strength_stays_nearer_to_the_image(engine: Engine, save: Save, scene_image: Image.Image) -> None:
    image = save(scene_image)
    changes = [
        np.abs(
            np.asarray(image_of(engine, image=image, prompt_strength=s, num_inference_steps=8), dtype=float)
            - np.asarray(scene_image, dtype=float)
        ).mean()
        for s in (0.2, 0.6, 1.0)
    ]
    assert changes[0] < changes[1] < changes[2]


# Inpainting


def test_black_of_the_mask_is_kept_to_the_pixel_and_white_is_repainted(engine: Engine, save: Save) -> None:
    original = Image.effect_noise((256, 256), 60).convert("RGB")
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (128, 0, 256, 256))
    image = image_of(engine, image=save(original), mask=save(mask, "mask.png"), prompt_strength=1.0)
    kept, repainted = (0, 0, 128, 256), (128, 0, 256, 256)
    assert image.crop(kept).tobytes() == original.crop(kept).tobytes()
    assert image.crop(repainted).tobytes() != original.crop(repainted).tobytes()


def test_the_mask_of_another_size_is_fitted(engine: Engine, save: Save, scene_image: Image.Image) -> None:
    image = image_of(engine, image=save(scene_image), mask=save(Image.new("L", (90, 90), 0), "m.png"))
    assert image.tobytes() == scene_image.tobytes()


def test_inpainting_equals_the_bare_pipeline(engine: Engine, save: Save, scene_image: Image.Image) -> None:
    """Where the mask is white; elsewhere pixels are put back."""
    request = request_of(**QUICK, image=save(scene_image), mask=save(Image.new("L", (256, 256), 255), "m.png"))
    bare = bare_call(engine, request, image=request.image, mask_image=request.mask, strength=request.strength)
    assert next(engine.generate(request)).tobytes() == bare.tobytes()


@pytest.mark.parametrize("with_mask", [False, True])
def test_an_image_is_encoded_once_for_all_outputs(
    engine: Engine, save: Save, scene_image: Image.Image, with_mask: bool
) -> None:
    mask = {"mask": save(Image.new("L", (256, 256), 255), "m.png")} if with_mask else {}
    encoder, calls = engine.exact.models["dev"].pipelines[Mode.TXT2IMG].vae.encoder, []
    hook = encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        images = list(engine.generate(request_of(**QUICK, num_outputs=3, image=save(scene_image), **mask)))
    finally:
        hook.remove()
    assert len({image.tobytes() for image in images}) == 3
    assert len(calls) == 1


def test_latents_are_drawn_as_diffusers_draws_them(scene_image: Image.Image) -> None:
    """With a VAE that gives a distribution, as FLUX.1's does; all pipelines of one request, to the bit."""
    vae = vae_of(TINY_SCALE).eval()
    for kind in (FluxImg2ImgPipeline, FluxInpaintPipeline):
        pipeline = kind(None, vae, None, None, None, None, narrow_transformer())
        request = replace(request_of(**QUICK), image=scene_image, strength=0.8)
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        encoded = encode_image(pipeline, request, torch.device("cpu"))
        assert encoded is not None
        ours = encoded.arguments(request, generators[0])["image"]
        pixels = pipeline.image_processor.preprocess(scene_image, height=256, width=256)
        with torch.no_grad():
            theirs = pipeline._encode_vae_image(pixels, generators[1])
        assert torch.equal(ours, theirs)
        assert torch.equal(*(generator.get_state() for generator in generators))


# Sizes, prompts, faults


@pytest.mark.parametrize("size", [(256, 1440), (400, 272)])
def test_a_size_is_the_one_asked_for(engine: Engine, size: tuple[int, int]) -> None:
    assert image_of(engine, width=size[0], height=size[1], num_inference_steps=1).size == size


def test_the_smallest_image_works(engine: Engine, save: Save) -> None:
    assert image_of(engine, image=save(Image.new("RGB", (3, 2)))).size == (16, 16)


@pytest.mark.parametrize("prompt", ["", " ", "é 漢字 😀 \x00 <|endoftext|> </s>", "red " * 5000])
def test_any_prompt_gives_an_image(engine: Engine, prompt: str) -> None:
    assert image_of(engine, prompt=prompt, num_inference_steps=1).size == (256, 256)


def test_a_prompt_that_is_cut_is_said_in_the_log(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    image_of(engine, prompt="secret words " * 40, num_inference_steps=1)
    assert "reads the first 40" in caplog.text
    assert "secret" not in caplog.text


def test_a_prompt_is_encoded_once_and_again_when_an_adapter_changes_the_encoder(
    engine: Engine,
) -> None:
    """Counted at the text encoder itself; the image from a kept prompt is the same to the byte."""
    encoder, calls = engine.exact.models["dev"].pipelines[Mode.TXT2IMG].text_encoder_2, []
    hook = encoder.register_forward_hook(lambda *_: calls.append(1))
    adapters = engine.exact.adapters["dev"]
    layer = next(name for name in adapters.shapes.by_component[T5] if name.endswith("SelfAttention.q"))
    change = LayerUpdate(T5, layer, "weight", Full(torch.full((256, 128), 0.01)))
    adapter = LoraAdapter("t5", "test", (change,))
    try:
        asked = request_of(**QUICK, prompt="a prompt that no other test has", num_outputs=2)
        first = [p.tobytes() for p in engine.generate(asked)]
        assert len(calls) == 1
        assert [p.tobytes() for p in engine.generate(asked)] == first
        assert len(calls) == 1
        changed = [p.tobytes() for p in engine.generate(asked, [(adapter, 1.0)])]
        assert len(calls) == 2
        assert changed != first
        assert [p.tobytes() for p in engine.generate(asked)] == first
        assert len(calls) == 2
    finally:
        hook.remove()


@pytest.mark.usefixtures("broken_vae")
def test_numbers_that_are_not_finite_are_an_error_not_a_black_image(engine: Engine) -> None:
    with pytest.raises(ModelError, match="not finite"):
        image_of(engine)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2"])
def test_one_lack_of_memory_is_overcome_and_a_second_is_an_error_that_leaves_nothing(engine: Engine, part: str) -> None:
    asked = request_of(**QUICK, prompt=f"a prompt that only this test has, for {part}")
    module, left = getattr(engine.exact.models["dev"].pipelines[Mode.TXT2IMG], part), [0]

    def lack(*_: object) -> None:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with_hook = module.decoder if part == "vae" else module
    hook = with_hook.register_forward_pre_hook(lack)
    try:
        left[0] = 2
        with pytest.raises(ModelError, match=r"256x256.*memory"):
            next(engine.generate(asked))
        left[0] = 1
        once = next(engine.generate(asked)).tobytes()
        assert left[0] == 0
        assert next(engine.generate(asked)).tobytes() == once
    finally:
        hook.remove()


def test_a_request_given_up_between_images_leaves_no_trace(engine: Engine) -> None:
    golden = image_of(engine).tobytes()
    list(islice(engine.generate(request_of(**QUICK, num_outputs=3)), 1))
    assert image_of(engine).tobytes() == golden


def test_the_full_profile_loads_from_local_folders() -> None:
    """The same loading code, pointed at the tiny checkpoints as if they were the big ones."""
    settings = Settings(profile="full", dev=str(TINY / "tiny-dev"), schnell=str(TINY / "tiny-schnell"))
    profiles = model_profiles("full", settings)
    engine = Engine(exact_precision(load_models(profiles, torch.device("cpu"))), None, torch.device("cpu"))
    assert image_of(engine, model="schnell", num_inference_steps=1).size == (256, 256)
    assert {p.name for p in profiles} == {"dev", "schnell"}
