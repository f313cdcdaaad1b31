"""The parts of the embedded model's training that can be right or wrong."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from request import Size
from training.attention import PartialAttention, attended, velocity, weighing
from training.checkpoints import Resumable
from training.data import (
    CONTEXT,
    OBJECT,
    PLAIN,
    SQUARE,
    STYLE,
    Batch,
    Lesson,
    Pool,
    Scenes,
    draw_batch,
    make_pool,
    random_size,
)
from training.distil import flow_loss, fold_guidance
from training.flow_matching import noise_levels
from training.muon import Muon
from training.places import begin_with_places
from training.position import PositionTask, from_centre
from training.prompts import Prompt
from training.text import MARKS, PROMPT_TOKENS, TextEncoders, marks_of, new_encoders
from training.train import Schedule, new_transformer, train
from training.vae import MEAN, SCALE, draw_crops, new_vae
from training.world import ALL_SHAPES, SHAPES, Placement, Scene, Thing, coverage, distances, draw_scene, place


def batch_of(tokens: int) -> Batch:
    """Two images of 256x256, of whose tokens these many are seen, each at positions of its own."""
    torch.manual_seed(0)
    return Batch(
        latents=torch.randn(2, tokens, 64),
        positions=torch.randint(0, 64, (2, tokens, 3)).float(),
        stands_for=torch.ones(2, tokens),
        groups=torch.zeros(tokens, dtype=torch.long),
        tokens=torch.tensor([256.0, 256.0]),
        guidance=torch.tensor([1.0, 3.0]),
        pooled=torch.randn(2, 128),
        states=torch.randn(2, PROMPT_TOKENS, 128),
        from_centre=torch.rand(2, tokens, 2) - 0.5,
        from_thing=torch.rand(2, tokens, 2) - 0.5,
        radius=torch.rand(2, tokens),
        sides=torch.full((2, 2), 16.0),
        things=torch.tensor([[[8.0, 8, 3], [0, 0, 0]], [[4, 8, 3], [12, 8, 3]]]),
        distances=torch.rand(2, tokens, len(ALL_SHAPES)) - 0.5,
    )


def model_of_parts(guidance_embeds: bool = True) -> FluxTransformer2DModel:
    torch.manual_seed(1)
    model = new_transformer(guidance_embeds)
    model.set_attn_processor(PartialAttention())
    return model


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Prompts with the embeddings of encoders that were never trained."""
    return make_pool(new_encoders(0), 64, PLAIN, "tests")


# Attention over a part of the tokens


@torch.no_grad()
def test_whole_images_are_seen_as_diffusers_sees_them() -> None:
    batch, levels, guidance = batch_of(48), torch.tensor([0.3, 0.9]), torch.ones(2)
    model = new_transformer(True)
    expected = [
        model(
            batch.latents[[i]], batch.states[[i]], batch.pooled[[i]], levels[[i]], batch.positions[i],
            torch.zeros(PROMPT_TOKENS, 3), guidance[[i]],
        ).sample
        for i in range(2)
    ]  # fmt: skip
    model.set_attn_processor(PartialAttention())
    assert torch.allclose(velocity(model, batch.latents, levels, batch, guidance), torch.cat(expected), atol=1e-5)


@torch.no_grad()
def test_the_context_counts_as_often_as_it_stands_for() -> None:
    """A token outside the context sees it as it would see all the tokens that it stands for."""
    batch = replace(batch_of(9), groups=torch.tensor([0] * 8 + [1]))
    weighed = replace(batch, stands_for=torch.tensor([3.0] * 8 + [1.0]).expand(2, 9))
    chance = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 1, 9 + PROMPT_TOKENS, 8, generator=chance) for _ in range(3))
    part = attended(query, key, value, weighing(weighed, PROMPT_TOKENS))[:, :, -1]
    repeated = torch.tensor([*range(PROMPT_TOKENS), *([PROMPT_TOKENS + i for i in range(8)] * 3), PROMPT_TOKENS + 8])
    whole = attended(query, key[:, :, repeated], value[:, :, repeated], None)[:, :, -1]
    assert torch.allclose(part, whole, atol=1e-6)
    assert not torch.allclose(attended(query, key, value, weighing(batch, PROMPT_TOKENS))[:, :, -1], whole, atol=1e-3)


@torch.no_grad()
def test_no_token_sees_a_square_but_those_of_it() -> None:
    """Else a token could tell from what is there why it was chosen."""
    model, batch = model_of_parts(), replace(batch_of(20), groups=torch.tensor([0] * 8 + [1] * 6 + [2] * 6))
    levels, guidance = torch.full((2,), 0.6), torch.ones(2)
    before = velocity(model, batch.latents, levels, batch, guidance)
    moved = (velocity(model, _changed(batch.latents, 9), levels, batch, guidance) - before).abs().amax((0, 2)) > 1e-4
    assert moved.tolist() == [False] * 8 + [True] * 6 + [False] * 6
    moved = (velocity(model, _changed(batch.latents, 2), levels, batch, guidance) - before).abs().amax((0, 2)) > 1e-4
    assert moved.all()


def _changed(latents: Tensor, token: int) -> Tensor:
    return torch.cat([latents[:, :token], latents[:, [token]] + 1, latents[:, token + 1 :]], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_folded_guidance_equals_the_guided_model(guidance: float) -> None:
    dev, batch = model_of_parts(), batch_of(16)
    levels = torch.tensor([0.3, 0.9])
    guided = velocity(dev, batch.latents, levels, batch, torch.full((2,), guidance))
    folded = fold_guidance(dev, guidance)
    folded.set_attn_processor(PartialAttention())
    assert torch.allclose(velocity(folded, batch.latents, levels, batch, None), guided, atol=1e-5)


# The images that a step sees


@pytest.mark.parametrize("striped", [False, True])
@pytest.mark.parametrize("size", [Size(512, 512), Size(768, 320), Size(256, 1024)], ids=str)
def test_computed_tokens_are_those_of_the_drawn_and_encoded_image(size: Size, striped: bool) -> None:
    things = (Thing("star", "blue"), Thing("ring", "red", "large"))
    prompt, lesson = Prompt("", Scene("yellow", things)), Lesson(SHAPES, striped)
    scenes = Scenes.of([prompt], [size], [2.0], lesson, random.Random(1))
    rows, columns = size.height // 16, size.width // 16
    kept = np.stack(np.divmod(np.arange(rows * columns), columns), axis=-1)[None]
    tokens = scenes.tokens(kept, striped)[0]
    places = place(prompt.scene, size.width, size.height, random.Random(1), 2.0)
    image = draw_scene(prompt.scene, size.width, size.height, places, striped)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        latents = (new_vae().encode(pixels).latents - MEAN) * SCALE
    packed = FluxPipeline._pack_latents(latents, 1, 16, *latents.shape[2:])[0].numpy()
    assert np.abs(tokens - packed).mean() < 0.001
    assert np.abs(tokens - packed).max() < 0.3  # of 2.75: an average of 4 x 4 pixels at a corner


def test_a_batch_depends_on_its_seed_alone(pool: Pool) -> None:
    first, again, other = (draw_batch(pool, 3, 2, PLAIN, seed) for seed in ("a", "a", "b"))
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in vars(first))
    assert not torch.equal(first.latents, other.latents)


def test_the_context_stands_for_the_whole_image(pool: Pool) -> None:
    """Its middle is the image's, and it is spread evenly: hardly a token is there twice, a quarter in each quarter."""
    batch = draw_batch(pool, 16, 2, PLAIN, "x")
    stands_for, places = batch.stands_for[:, :CONTEXT], batch.from_centre[:, :CONTEXT]
    assert torch.allclose(stands_for.sum(1), batch.tokens)
    assert places.mean(1).abs().max() < 1e-5
    assert ((places > 0).float().mean(1) - 0.5).abs().max() < 0.1
    spread = places.std(1, correction=0) / (batch.sides / batch.sides.amin(1, keepdim=True))
    assert spread.mean() == pytest.approx(12**-0.5, abs=0.01)  # of places anywhere in a range of 1
    assert all(len(set(map(tuple, rows.tolist()))) > 0.8 * CONTEXT for rows in batch.positions[:, :CONTEXT])


def test_squares_are_neighbours_and_most_are_at_edges(pool: Pool) -> None:
    batch = draw_batch(pool, 16, 7, PLAIN, "x")
    assert batch.latents.shape == (16, CONTEXT + 7 * SQUARE**2, 64)
    assert batch.groups.bincount().tolist() == [CONTEXT] + 7 * [SQUARE**2]
    places = batch.positions[:, CONTEXT:].reshape(16, 7, SQUARE**2, 3)
    assert (places.amax(2) - places.amin(2) == torch.tensor([0, SQUARE - 1, SQUARE - 1])).all()
    cells = batch.latents[:, CONTEXT:, :48].reshape(16, 7, SQUARE**2, 4, 3, 4)
    edges = (cells.amax((3, 5)) - cells.amin((3, 5)) > 0.1).any(-1).any(-1)
    assert 0.6 < edges.float().mean() < 0.9


def test_sizes_are_those_of_the_contract_and_any_other() -> None:
    rng = random.Random(0)
    sizes = {(size.width, size.height) for size in (random_size(rng) for _ in range(3000))}
    assert {(1024, 1024), (512, 512), (1344, 768), (320, 768)} <= sizes
    assert min(map(min, sizes)) == 256
    assert len(sizes) > 500


def test_a_word_of_the_loras_means_nothing_to_the_model_itself() -> None:
    assert (PLAIN.drawn("TOK"), STYLE.drawn("star"), OBJECT.drawn("TOK")) == ("circle", "star", "TOK")


# Shapes


def test_a_circles_distances_are_those_of_a_circle() -> None:
    x, y = np.meshgrid(np.linspace(-3, 3, 31, dtype=np.float32), np.linspace(-3, 3, 31, dtype=np.float32))
    seen = distances(np.asarray(ALL_SHAPES.index("circle")), x, y)
    inside_tables = np.maximum(np.abs(x), np.abs(y)) <= 2
    assert np.abs(seen - (np.hypot(x, y) - 1))[inside_tables].max() < 0.01
    assert (seen[~inside_tables] > 0.9).all()


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_a_shape_covers_the_same_at_every_size(shape: str) -> None:
    at = Placement(0.5, 0.5, 0.3)
    small, large = (coverage(shape, at, side, side) for side in (128, 512))
    assert np.abs(large.reshape(128, 4, 128, 4).mean((1, 3)) - small).max() < 0.35
    assert large.mean() == pytest.approx(small.mean(), rel=0.01)


# The VAE


def test_the_set_encoder_keeps_averages_of_four_pixels() -> None:
    images, latents = draw_crops(0, 0)
    with torch.no_grad():
        encoded = new_vae().encoder(images)
    cells = torch.nn.functional.avg_pool2d((images + 1) / 2, 4)
    assert torch.allclose(encoded[:, 0:3], cells[:, :, 0::2, 0::2], atol=1e-5)
    assert torch.allclose(encoded[:, 9:12], cells[:, :, 1::2, 1::2], atol=1e-5)
    assert torch.allclose(encoded[:, 12:], torch.tensor(MEAN), atol=1e-6)
    assert encoded.shape == latents.shape


# Losses and the loop


def test_the_position_task_reads_positions_from_a_models_blocks() -> None:
    """Its loss falls when only its heads are trained, and its gradient reaches the model."""
    model, batch = model_of_parts(), batch_of(64)
    batch = replace(batch, positions=batch.positions.clamp(max=15))
    task = PositionTask(model)
    task.watch(model)
    assert torch.equal(from_centre(batch)[..., :2], batch.from_centre)
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


class MarkedText(TextEncoders):
    """Encoders whose T5 states are a random one for the word and one for the mark, as trained ones have them."""

    def __init__(self, untrained: TextEncoders) -> None:
        super().__init__(**vars(untrained))

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """As `TextEncoders.encode`."""
        chance = torch.Generator().manual_seed(0)
        ids = self.t5_ids(prompts)
        words, marks = (torch.randn(count, 128, generator=chance) for count in (len(self.tokenizer_2), MARKS))
        return torch.zeros(len(prompts), 128), words[ids] + marks[marks_of(ids)]


def test_the_training_begins_with_a_block_that_reads_places() -> None:
    """Waves of each token's row and column are there before a single step, and are not without this beginning."""
    text = MarkedText(new_encoders(0))
    pool = make_pool(text, 64, PLAIN, "places")

    def states(model: FluxTransformer2DModel, seed: str) -> tuple[Tensor, Tensor]:
        batch = draw_batch(pool, 32, 3, PLAIN, seed)
        with torch.no_grad():
            seen: list[Tensor] = []
            model.transformer_blocks[0].register_forward_hook(lambda block, given, made: seen.append(made[1]))
            velocity(model, torch.randn_like(batch.latents), torch.full((32,), 0.8), batch, batch.guidance)
        frequencies = 10000 ** (-torch.arange(0, 8, 2) / 14)
        angles = (batch.positions[..., 1:, None] * frequencies).flatten(2)
        return seen[0].flatten(0, 1), torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(0, 1)

    explained = []
    for begun in (False, True):
        model = model_of_parts()
        if begun:
            begin_with_places(model, text)
        known, wanted = states(model, "a")
        normal = known.T @ known + torch.eye(known.shape[1])
        reading = torch.linalg.solve(normal, known.T @ (wanted - wanted.mean(0)))
        known, wanted = states(model, "b")
        explained.append(1 - (known @ reading - (wanted - wanted.mean(0))).square().mean() / wanted.var(0).mean())
    assert explained[0] < 0.3
    assert explained[1] > 0.9


def test_muon_takes_the_steps_of_torchs_own() -> None:
    torch.manual_seed(0)
    shapes = ((32, 64), (32, 32), (96, 32), (32, 64))
    ours, theirs = ([(torch.randn(shape) * 0.05).requires_grad_() for shape in shapes] for _ in range(2))
    with torch.no_grad():
        for one, other in zip(ours, theirs, strict=True):
            other.copy_(one)
    begun = [weight.detach().clone() for weight in ours]
    optimizers = (
        Muon(ours, lr=0.01, weight_decay=0.01, ns_steps=4),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.01, ns_steps=4, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, before in zip(ours, theirs, begun, strict=True):
        moved, expected = ((after.detach() - before).flatten() for after in (one, other))
        assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.999  # theirs is in bfloat16
        assert moved.norm() == pytest.approx(expected.norm().item(), rel=0.01)


def trained(folder: Path, pool: Pool, steps: int, muon: bool = True) -> dict[str, Tensor]:
    """The weights after these steps of the real loss, going on from the folder's checkpoint where there is one."""
    model = model_of_parts()
    task = PositionTask(model)
    task.watch(model)
    flow = flow_loss(model, 1.5)
    schedule = Schedule(steps, 2e-3, muon=muon)

    def loss(batch: Batch) -> Tensor:
        return torch.as_tensor(flow(batch) + task(batch))

    def batch_at(step: int) -> Batch:
        return draw_batch(pool, 2, 2, PLAIN, str(step))

    average = train(model, loss, batch_at, schedule, folder / "checkpoint.safetensors", task, keep_every=3)
    return dict(average.state_dict())


@pytest.mark.parametrize("muon", [False, True])
def test_training_moves_every_weight(pool: Pool, tmp_path: Path, muon: bool) -> None:
    before = model_of_parts().state_dict()
    after = trained(tmp_path, pool, 2, muon)
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert [name for name, weight in after.items() if torch.equal(weight, before[name])] == []


def test_an_interrupted_training_goes_on_to_the_same_weights(pool: Pool, tmp_path: Path) -> None:
    """Stopped after 5 steps, it goes on from the checkpoint of step 3."""
    (tmp_path / "whole").mkdir()
    whole = trained(tmp_path / "whole", pool, 7)
    trained(tmp_path, pool, 5)
    resumed = trained(tmp_path, pool, 7)
    assert [name for name, weight in whole.items() if not torch.equal(weight, resumed[name])] == []


def test_a_checkpoint_is_whole_or_absent(tmp_path: Path) -> None:
    """A run that dies while it writes leaves the checkpoint before, and what it left does no harm."""
    module = torch.nn.Linear(2, 2)
    resumable = Resumable(tmp_path / "a.safetensors", {"module": module}, [])
    assert resumable.load() == 0
    resumable.save(3)
    (tmp_path / "a.partial").write_bytes(b"half a file")
    assert resumable.load() == 3


def levels_of(tokens: int, emphasis: float) -> Tensor:
    return noise_levels(torch.full((1000,), float(tokens)), emphasis)


@pytest.mark.parametrize("emphasis", [1.0, 2.0])
@pytest.mark.parametrize("tokens", [64, 4096])
def test_noise_levels_lie_between_none_and_all(emphasis: float, tokens: int) -> None:
    levels = levels_of(tokens, emphasis)
    assert 0 < levels.min() < levels.max() < 1
    assert levels.mean() > levels_of(tokens, emphasis / 2).mean()


def test_the_learning_rate_rises_stays_and_falls() -> None:
    schedule = Schedule(steps=100, peak=1.0, warmup=9, decay=0.5)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)
