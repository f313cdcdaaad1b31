"""The parts of the embedded model's training that can be right or wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from training.distil import fold_guidance
from training.flow import Batch, Pool, Schedule, draw_batch, new_transformer, noise_levels, velocity
from training.world import SHAPES, held_out_scenes, prompt_of, random_scene, varied_prompt


def batch_of(tokens: int, full_tokens: int) -> Batch:
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (tokens, 3)).float()
    return Batch(
        torch.randn(2, tokens, 64),
        ids,
        torch.ones(2, tokens),
        torch.randn(2, 128),
        torch.randn(2, 32, 128),
        full_tokens,
    )


@torch.no_grad()
def test_a_part_of_the_tokens_is_weighed_as_all_of_them() -> None:
    """Half of a picture whose other half is its copy must see what the whole picture sees."""
    model, half = new_transformer(True), batch_of(48, 96)
    noisy, levels, guidance = torch.randn(2, 48, 64), torch.full((2,), 0.6), torch.ones(2)
    whole = replace(half, image_ids=half.image_ids.repeat(2, 1))
    seen_whole = velocity(model, noisy.repeat(1, 2, 1), levels, whole, guidance)[:, :48]
    assert torch.allclose(velocity(model, noisy, levels, half, guidance), seen_whole, atol=1e-5)
    unweighed = velocity(model, noisy, levels, replace(half, full_tokens=48), guidance)
    assert not torch.allclose(unweighed, seen_whole, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_folded_guidance_equals_the_guided_model(guidance: float) -> None:
    dev, batch = new_transformer(True), batch_of(16, 16)
    levels = torch.tensor([0.3, 0.9])
    guided = velocity(dev, batch.latents, levels, batch, torch.full((2,), guidance))
    assert torch.allclose(velocity(fold_guidance(dev, guidance), batch.latents, levels, batch, None), guided, atol=1e-5)


def test_a_batch_keeps_each_tokens_own_position() -> None:
    """Latents that carry their token's number show that pictures and position ids stay together."""
    numbers = torch.arange(16).float()[None, :, None].expand(3, 16, 64).half()
    pool = Pool((64, 64), numbers, torch.zeros(3, 128), torch.zeros(3, 32, 128))
    batch = draw_batch(pool, 2, 5, (torch.ones(1, 128), torch.ones(1, 32, 128)), random.Random(0))
    assert batch.latents.shape == (2, 5, 64)
    assert batch.full_tokens == 16
    assert torch.equal(batch.image_ids[:, 1] * 4 + batch.image_ids[:, 2], batch.latents[0, :, 0])


@pytest.mark.parametrize("emphasis", [1.0, 2.0])
@pytest.mark.parametrize("tokens", [64, 4096])
def test_noise_levels_lie_between_none_and_all(emphasis: float, tokens: int) -> None:
    levels = noise_levels(1000, tokens, emphasis)
    assert 0 < levels.min() < levels.max() < 1
    assert levels.mean() > noise_levels(1000, tokens, emphasis / 2).mean()


def test_the_learning_rate_rises_stays_and_falls() -> None:
    schedule = Schedule(steps=100, peak=1.0, warmup=9, decay=0.5)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)


def test_the_prompts_that_the_readme_shows_are_the_worlds() -> None:
    """Wordings that a newcomer types first can all come out of the world."""
    rng = random.Random(0)
    prompts = {prompt_of(random_scene(rng)) for _ in range(60_000)}
    assert any(p.startswith("a small blue star at the top on a ") for p in prompts)
    assert any(p.startswith("a large red circle on a ") for p in prompts)
    assert all(any(shape in prompt for shape in SHAPES) for prompt in prompts)


def test_varied_prompts_keep_the_scenes_words() -> None:
    rng = random.Random(0)
    for scene in held_out_scenes(200, 3):
        prompt = varied_prompt(scene, rng).lower()
        assert scene.background in prompt
        for thing in scene.things:
            assert thing.colour in prompt
            assert thing.shape in prompt
