"""The parts of the embedded model's training that can be right or wrong."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel

from training.attention import PartialAttention, velocity
from training.data import FLAT_WEIGHT, Batch, Pool, draw_batch
from training.distil import fold_guidance
from training.flow_matching import noise_levels
from training.position import PositionTask, from_centre
from training.text import STRANGE_SHARE, any_prompt
from training.train import Schedule, Worker, new_transformer, train
from training.world import SHAPES, TRIGGER, held_out_scenes, prompt_of, random_scene, varied_prompt


def batch_of(tokens: int, stands_for: float = 1.0) -> Batch:
    """Two images of 256x256, of whose tokens these many are seen, each at positions of its own."""
    torch.manual_seed(0)
    return Batch(
        latents=torch.randn(2, tokens, 64),
        positions=torch.randint(0, 64, (2, tokens, 3)).float(),
        weights=torch.ones(2, tokens),
        stands_for=torch.full((2, tokens), stands_for),
        pooled=torch.randn(2, 128),
        states=torch.randn(2, 32, 128),
        size=(256, 256),
    )


def model_of_parts(guidance_embeds: bool = True) -> FluxTransformer2DModel:
    model = new_transformer(guidance_embeds)
    model.set_attn_processor(PartialAttention())
    return model


@torch.no_grad()
def test_whole_images_are_seen_as_diffusers_sees_them() -> None:
    batch, levels, guidance = batch_of(48), torch.tensor([0.3, 0.9]), torch.ones(2)
    model = new_transformer(True)
    expected = [
        model(
            batch.latents[[i]], batch.states[[i]], batch.pooled[[i]], levels[[i]], batch.positions[i],
            torch.zeros(32, 3), guidance[[i]],
        ).sample
        for i in range(2)
    ]  # fmt: skip
    model.set_attn_processor(PartialAttention())
    assert torch.allclose(velocity(model, batch.latents, levels, batch, guidance), torch.cat(expected), atol=1e-5)


@torch.no_grad()
def test_a_part_of_the_tokens_is_weighed_as_all_of_them() -> None:
    """Half of an image whose other half is its copy must see what the whole image sees."""
    model, half = model_of_parts(), batch_of(48, stands_for=2)
    noisy, levels, guidance = torch.randn(2, 48, 64), torch.full((2,), 0.6), torch.ones(2)
    whole = replace(half, positions=half.positions.repeat(1, 2, 1), stands_for=torch.ones(2, 96))
    seen_whole = velocity(model, noisy.repeat(1, 2, 1), levels, whole, guidance)[:, :48]
    assert torch.allclose(velocity(model, noisy, levels, half, guidance), seen_whole, atol=1e-5)
    unweighed = velocity(model, noisy, levels, replace(half, stands_for=torch.ones(2, 48)), guidance)
    assert not torch.allclose(unweighed, seen_whole, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_folded_guidance_equals_the_guided_model(guidance: float) -> None:
    dev, batch = model_of_parts(), batch_of(16)
    levels = torch.tensor([0.3, 0.9])
    guided = velocity(dev, batch.latents, levels, batch, torch.full((2,), guidance))
    folded = fold_guidance(dev, guidance)
    folded.set_attn_processor(PartialAttention())
    assert torch.allclose(velocity(folded, batch.latents, levels, batch, None), guided, atol=1e-5)


EMPTY = torch.ones(1, 128), torch.ones(1, 32, 128)


def test_a_batch_keeps_each_tokens_own_position() -> None:
    """Latents that carry their token's number show that images and positions stay together."""
    numbers = torch.arange(16).float()[None, :, None].expand(3, 16, 64).half()
    pool = Pool((64, 64), numbers, torch.zeros(3, 128), torch.zeros(3, 32, 128))
    batch = draw_batch(pool, 2, 5, EMPTY, random.Random(0))
    assert batch.latents.shape == (2, 5, 64)
    assert torch.equal(batch.positions[..., 1] * 4 + batch.positions[..., 2], batch.latents[..., 0])


@pytest.mark.parametrize("keep", [64, 256, None])
def test_the_tokens_of_a_batch_stand_for_the_whole_image(keep: int | None) -> None:
    """A square object on a flat ground: most tokens come from around it, and together they count for all."""
    latents = torch.zeros(1, 32, 32, 64)
    latents[:, 8:14, 20:26] = 1.0
    pool = Pool((512, 512), latents.flatten(1, 2).half(), torch.zeros(1, 128), torch.zeros(1, 32, 128))
    batch = draw_batch(pool, 4, keep, EMPTY, random.Random(0))
    kept = keep or 1024
    assert batch.latents.shape == (4, kept, 64)
    assert torch.allclose(batch.stands_for.sum(1), torch.full((4,), 1024.0))
    seen = batch.latents[..., 0].mean(1)
    assert torch.all(seen > 0.1) if keep == 64 else torch.all(seen > 36 / 1024 - 1e-6)
    edge = (batch.latents[..., 0] == 1) & ((batch.positions[..., 1] == 8) | (batch.positions[..., 2] == 25))
    assert torch.all(batch.weights[edge] == 1)
    assert batch.weights[batch.latents[..., 0] == 0].min() == pytest.approx(FLAT_WEIGHT)


def test_the_position_task_reads_positions_from_a_models_blocks() -> None:
    """Its loss falls when only its heads are trained, and its gradient reaches the model."""
    model, batch = model_of_parts(), batch_of(64)
    batch = replace(batch, positions=batch.positions.clamp(max=15))
    task = PositionTask(model)
    task.watch(model)
    assert torch.allclose(from_centre(batch)[..., :2].abs().amax(), torch.tensor(7.5 / 16))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        velocity(model, batch.latents, torch.full((2,), 0.5), batch, torch.ones(2))
        optimizer.zero_grad()
        loss = task(batch)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.transformer_blocks[0].attn.to_q.weight.grad.abs().sum() > 0


def test_a_worker_in_bfloat16_gives_the_models_gradients() -> None:
    """Times included: rounded to bfloat16 first, the gradients would point elsewhere."""
    model, batch = model_of_parts(), batch_of(48)
    levels, guidance = torch.tensor([0.3003, 0.9007]), torch.full((2,), 2.9)

    def backward(passing: FluxTransformer2DModel) -> None:
        torch.autograd.backward(velocity(passing, batch.latents, levels, batch, guidance).square().mean())

    def gradients() -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    backward(model)
    expected = gradients()
    model.zero_grad()
    worker = Worker(model)
    with torch.no_grad():
        for parameter in worker.model.parameters():
            parameter.zero_()
    worker.load()
    backward(worker.model)
    worker.hand_over()
    assert torch.nn.functional.cosine_similarity(gradients(), expected, dim=0) > 0.999
    assert all(p.grad is None for p in worker.model.parameters())


@pytest.mark.parametrize("muon", [False, True])
def test_training_moves_every_weight_and_lowers_the_loss(muon: bool) -> None:
    model, batch = model_of_parts(), batch_of(48)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    losses = []

    def loss_over(passing: FluxTransformer2DModel) -> Callable[[Batch], torch.Tensor]:
        def loss(batch: Batch) -> torch.Tensor:
            seen = velocity(passing, batch.latents, torch.full((2,), 0.5), batch, torch.ones(2))
            losses.append((seen - batch.latents).square().mean())
            return losses[-1]

        return loss

    average = train(model, loss_over, itertools.repeat(batch), Schedule(steps=12, peak=2e-3, muon=muon))
    assert losses[-1] < 0.9 * losses[0]
    assert average.dtype == torch.float32
    assert [name for name, weight in average.state_dict().items() if torch.equal(weight, before[name])] == []


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


def test_a_share_of_the_prompts_calls_a_thing_by_a_word_that_is_no_shape() -> None:
    """And none where the word that a LoRA is taught would be lost."""
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(4000)]
    strange = [s for s in scenes if not all(t.shape in any_prompt(s, rng) for t in s.things)]
    assert len(strange) / len(scenes) == pytest.approx(STRANGE_SHARE, rel=0.25)
    taught = [random_scene(rng, (TRIGGER,)) for _ in range(400)]
    assert all(any_prompt(scene, rng).count(TRIGGER) >= len(scene.things) for scene in taught)
