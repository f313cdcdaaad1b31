"""Train the tiny FLUX transformer by flow matching on the world's latents.

Knows latents, prompts' embeddings and diffusers' FluxTransformer2DModel. The image sizes are mixed from the start,
since a model trained at one size draws broken objects at the others; large images are mostly trained on a
part of their tokens, most of them from around the objects, which keeps a step cheap while the position ids stay those
of the large image and the attention counts every token kept for those that it stands for.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderTiny, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor

from training.text import WIDTH, TextEncoders, any_prompt
from training.vae import to_tensor
from training.world import SHAPES, draw_scene, place, training_scene

logger = logging.getLogger(__name__)

Size = tuple[int, int]
"""(width, height) in pixels, multiples of 16."""
TOKENS_A_STEP = 4096
EMPTY_SHARE = 0.1
NEAR_SHARE = 0.7
"""Share of the kept tokens that come from around the objects."""
FLAT_WEIGHT, INNER_WEIGHT = 0.2, 0.4
"""Loss weights of a token that is all background or all object, beside 1 for one with an edge in it or beside it."""
UNLIKE = 0.15
"""Mean distance over the channels from which on two tokens' latents are held to show different things."""


def new_transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    """An untrained FLUX: 3 double and 3 single blocks, 4 heads of 32."""
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 14, 14),
    )


# Data


@dataclass(frozen=True)
class Pool:
    """Encoded images of one size: packed latents (N, tokens, 64), pooled (N, 128), states (N, 32, 128), half."""

    size: Size
    latents: Tensor
    pooled: Tensor
    states: Tensor


@dataclass(frozen=True)
class Batch:
    """What one step sees: clean latents (B, T, 64), positions (B, T, 3), weights in the loss (B, T), how many tokens
    of the image each stands for (B, T), and the prompts' embeddings (B, 128) and (B, 32, 128)."""

    latents: Tensor
    positions: Tensor
    weights: Tensor
    stands_for: Tensor
    pooled: Tensor
    states: Tensor
    size: Size

    @property
    def full_tokens(self) -> int:
        """How many tokens the whole image has."""
        return self.size[0] // 16 * (self.size[1] // 16)


@torch.no_grad()
def make_pool(
    vae: AutoencoderTiny,
    text: TextEncoders,
    size: Size,
    count: int,
    rng: random.Random,
    shapes: tuple[str, ...] = SHAPES,
    striped: bool = False,
    paired: float = 0.4,
) -> Pool:
    """Draw and encode `count` training scenes at one size."""
    encoder = copy.deepcopy(vae.encoder).to(torch.bfloat16, memory_format=torch.channels_last)  # 4 times as fast
    width, height = size
    chunk = max(1, 16 * 128 * 128 // (width * height))
    latents, prompts = [], []
    for start in range(0, count, chunk):
        scenes = [training_scene(rng, shapes, paired) for _ in range(min(chunk, count - start))]
        images = [draw_scene(s, width, height, place(s, width, height, rng), striped) for s in scenes]
        prompts += [any_prompt(s, rng) for s in scenes]
        pixels = torch.stack([to_tensor(image) for image in images])
        encoded = encoder(pixels.to(torch.bfloat16, memory_format=torch.channels_last)).float()
        encoded = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
        latents.append(pack(encoded).half())
    pairs = [text.encode(prompts[i : i + 256]) for i in range(0, len(prompts), 256)]
    pooled, states = (torch.cat(parts).half() for parts in zip(*pairs, strict=True))
    return Pool(size, torch.cat(latents), pooled, states)


def pack(latents: Tensor) -> Tensor:
    """(B, 16, H/8, W/8) -> (B, H/16 * W/16, 64), as the pipelines do."""
    batch, channels, height, width = latents.shape
    packed: Tensor = FluxPipeline._pack_latents(latents, batch, channels, height, width)
    return packed


def draw_batch(pool: Pool, batch: int, keep: int | None, empty: tuple[Tensor, Tensor], rng: random.Random) -> Batch:
    """A batch of one pool; with `keep`, only that many tokens of each image; one prompt in ten is empty."""
    chosen = torch.tensor(rng.choices(range(len(pool.latents)), k=batch))
    width, height = pool.size
    latents = pool.latents[chosen].float()
    weights, near = _attention_to_detail(latents, height // 16, width // 16, rng)
    full_tokens = latents.shape[1]
    kept, stands_for = _choose(near, min(keep or full_tokens, full_tokens))
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 16, width // 16, "cpu", torch.float32)
    pooled, states = pool.pooled[chosen].float(), pool.states[chosen].float()
    dropped = torch.tensor([rng.random() < EMPTY_SHARE for _ in range(batch)])
    pooled = torch.where(dropped[:, None], empty[0], pooled)
    states = torch.where(dropped[:, None, None], empty[1], states)
    rows = torch.arange(batch)[:, None]
    return Batch(latents[rows, kept], ids[kept], weights[rows, kept], stands_for, pooled, states, pool.size)


def _attention_to_detail(latents: Tensor, rows: int, columns: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Loss weights (B, T), and which tokens lie in a box around the objects, a random bit larger than they are."""
    grid = latents.view(len(latents), rows, columns, -1)
    edges = torch.zeros(grid.shape[:3], dtype=torch.bool)
    down = (grid[:, 1:] - grid[:, :-1]).abs().mean(-1) > UNLIKE
    across = (grid[:, :, 1:] - grid[:, :, :-1]).abs().mean(-1) > UNLIKE
    edges[:, 1:] |= down
    edges[:, :-1] |= down
    edges[:, :, 1:] |= across
    edges[:, :, :-1] |= across
    thing = (grid - grid[:, :1, :1]).abs().mean(-1) > UNLIKE
    weights = torch.where(edges, 1.0, torch.where(thing, INNER_WEIGHT, FLAT_WEIGHT))
    margins = [rng.uniform(0.02, 0.15) * min(rows, columns) for _ in range(2)]
    tall = _widened(thing.any(2), margins[0])
    wide = _widened(thing.any(1), margins[1])
    return weights.flatten(1), (tall[:, :, None] & wide[:, None, :]).flatten(1)


def _widened(flags: Tensor, margin: float) -> Tensor:
    """(B, N) flags, with all those within `margin` of a set one set too."""
    reach = max(1, round(margin))
    pooled = torch.nn.functional.max_pool1d(flags[:, None].float(), 2 * reach + 1, 1, reach)
    return pooled[:, 0] > 0


def _choose(near: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Which `keep` of the tokens (B, T) to see and for how many each stands: (B, keep) both."""
    total = near.shape[1]
    if keep == total:
        return torch.arange(total).expand(len(near), -1), torch.ones(len(near), total)
    order = torch.rand(near.shape)
    around = near.sum(1)
    from_near = around.clamp(max=int(NEAR_SHARE * keep)).maximum(keep - (total - around))
    rank_near = torch.where(near, order, 2.0).argsort(1).argsort(1)
    rank_far = torch.where(near, 2.0, order).argsort(1).argsort(1)
    seen = torch.where(near, rank_near < from_near[:, None], rank_far < keep - from_near[:, None])
    kept = seen.nonzero()[:, 1].view(len(near), keep)
    near_share = (around / from_near.clamp(min=1))[:, None]
    far_share = ((total - around) / (keep - from_near).clamp(min=1))[:, None]
    share = torch.where(near, near_share, far_share)
    return kept, share.gather(1, kept)


# The loss


def shift_for(tokens: int) -> float:
    """The time shift of FLUX.1 [dev] for this many image tokens: exp of a line through 0.5 at 256 and 1.15 at 4096."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def noise_levels(batch: int, tokens: int, emphasis: float) -> Tensor:
    """(B,) levels in (0, 1), stratified, shifted up as the scheduler will and `emphasis` times more.

    High levels decide what stands where, low ones the edges: early training wants an emphasis above 1.
    """
    uniform = (torch.arange(batch) + torch.rand(batch)) / batch
    shift = emphasis * shift_for(tokens)
    return shift * uniform / (1 + (shift - 1) * uniform)


class PartialAttention(FluxAttnProcessor):
    """FLUX's attention where every image of a batch has positions of its own, which diffusers' does not know.

    `rotation` is (cos, sin) of (B, S, 1, head width); `attention_mask` (B, 1, 1, S) is added to the scores of the keys.
    """

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: object = None,
        *,
        rotation: tuple[Tensor, Tensor],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend; `image_rotary_emb` is diffusers' own, which `rotation` takes the place of."""
        parts = [_heads(attn, hidden_states, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))]
        prompt_tokens = 0
        if encoder_hidden_states is not None:
            prompt_tokens = encoder_hidden_states.shape[1]
            names, norms = ("add_q_proj", "add_k_proj", "add_v_proj"), (attn.norm_added_q, attn.norm_added_k)
            parts.insert(0, _heads(attn, encoder_hidden_states, names, norms))
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
        query, key = _rotated(query, rotation), _rotated(key, rotation)
        seen = _attended(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attention_mask)
        seen = seen.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return seen
        image = attn.to_out[1](attn.to_out[0](seen[:, prompt_tokens:]))
        return image, attn.to_add_out(seen[:, :prompt_tokens])


def _heads(
    attn: FluxAttention, states: Tensor, names: tuple[str, ...], norms: tuple[torch.nn.Module, torch.nn.Module]
) -> list[Tensor]:
    query, key, value = (getattr(attn, name)(states).reshape(*states.shape[:2], -1, attn.head_dim) for name in names)
    return [norms[0](query), norms[1](key), value]


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot product attention in matrix products: on a CPU, at a hundred tokens, torch's own takes ten times as
    long backwards, two fifths of a step."""
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    seen: Tensor = (scores if mask is None else scores + mask).softmax(-1) @ value
    return seen


def _rotated(states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    turned = torch.stack([-states[..., 1::2], states[..., 0::2]], dim=-1).flatten(-2)
    return states * rotation[0] + turned * rotation[1]


def velocity(
    model: FluxTransformer2DModel, noisy: Tensor, levels: Tensor, batch: Batch, guidance: Tensor | None
) -> Tensor:
    """The model's velocity (B, T, 64) at noise levels (B,) and, for dev, guidance (B,); float32 for any model.

    The model's attention must be `PartialAttention`.
    """
    count, prompt_tokens = batch.states.shape[:2]
    dtype = model.dtype
    positions = torch.cat([torch.zeros(count, prompt_tokens, 3), batch.positions], dim=1)
    rotation = [part.view(count, -1, 1, part.shape[-1]).to(dtype) for part in model.pos_embed(positions.flatten(0, 1))]
    weighing = torch.nn.functional.pad(batch.stands_for.log(), (prompt_tokens, 0))[:, None, None]
    (predicted,) = model(
        hidden_states=noisy.to(dtype),
        timestep=levels,
        guidance=guidance,
        pooled_projections=batch.pooled.to(dtype),
        encoder_hidden_states=batch.states.to(dtype),
        txt_ids=torch.zeros(prompt_tokens, 3),
        img_ids=batch.positions[0],
        joint_attention_kwargs={"rotation": tuple(rotation), "attention_mask": weighing.to(dtype)},
        return_dict=False,
    )
    return torch.as_tensor(predicted).float()


def mix(batch: Batch, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (noisy latents at these levels, the velocity noise - latents that leads there)."""
    noise = torch.randn_like(batch.latents)
    level = levels[:, None, None]
    return (1 - level) * batch.latents + level * noise, noise - batch.latents


def weighted_error(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean squared error over channels, weighted over tokens."""
    return ((predicted - target).square().mean(-1) * weights).sum() / weights.sum()


# The loop


@dataclass(frozen=True)
class Bucket:
    """A size, its share of the steps, how many of its tokens a step sees, and how many images to draw."""

    size: Size
    share: float
    images: int
    keep: int | None = None


@dataclass(frozen=True)
class Schedule:
    """Learning rate: linear warm-up to `peak`, flat, then linear down to a twentieth over the last `decay` share.

    With `muon` the blocks' matrices are trained by Muon, at AdamW's size of a step, and only the rest by AdamW.
    """

    steps: int
    peak: float
    warmup: int = 0
    decay: float = 0.0
    muon: bool = False

    def rate(self, step: int) -> float:
        """The learning rate at a step, counted from 0."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        tail = self.decay * self.steps
        falling = 1.0 if tail == 0 else min(1.0, max(0.05, (self.steps - step) / tail))
        return self.peak * min(rising, falling)


class Ema:
    """A moving average of a model's weights, shorter at the beginning; its `model` is the one to keep."""

    def __init__(self, model: torch.nn.Module, decay: float = 0.998) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Move the average a little towards `model`."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


def batches(
    pools: list[Pool], buckets: list[Bucket], text: TextEncoders, rng: random.Random, tokens: int = TOKENS_A_STEP
) -> Iterator[Batch]:
    """Batches without end, of about the same cost each, sizes drawn by their shares."""
    with torch.no_grad():
        empty = text.encode([""])
    while True:
        index = rng.choices(range(len(buckets)), [bucket.share for bucket in buckets])[0]
        bucket = buckets[index]
        seen = min(bucket.keep or 1 << 30, pools[index].latents.shape[1])
        yield draw_batch(pools[index], max(1, tokens // (seen + 32)), bucket.keep, empty, rng)


class Worker:
    """A model's copy in bfloat16 that does the passes; the model itself stays in float32 and is what is trained.

    On a CPU that multiplies in bfloat16 a step takes two thirds of the time.
    """

    def __init__(self, model: FluxTransformer2DModel) -> None:
        self.model = copy.deepcopy(model).to(torch.bfloat16)
        _keep_times_exact(self.model)
        both = zip(model.parameters(), self.model.parameters(), strict=True)
        self._pairs = [(theirs, ours) for theirs, ours in both if theirs.requires_grad]

    @torch.no_grad()
    def load(self) -> None:
        """Take over the model's weights."""
        for theirs, ours in self._pairs:
            ours.copy_(theirs)

    def hand_over(self) -> None:
        """Give the gradients of the last pass to the model, and forget them."""
        for theirs, ours in self._pairs:
            theirs.grad = None if ours.grad is None else ours.grad.float()
            ours.grad = None


def _keep_times_exact(model: FluxTransformer2DModel) -> None:
    """Embed noise level and guidance as they were given: the model rounds them to its own precision first, and of a
    thousand times a level bfloat16 keeps two or three digits."""
    given: list[Tensor] = []

    def remember(module: torch.nn.Module, inputs: object, named: dict[str, Tensor | None]) -> None:
        given[:] = [1000 * value for name in ("timestep", "guidance") if (value := named[name]) is not None]

    def restore(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return *given, inputs[-1]

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.time_text_embed.register_forward_pre_hook(restore)


def train(
    model: FluxTransformer2DModel,
    loss_over: Callable[[FluxTransformer2DModel], Callable[[Batch], Tensor]],
    stream: Iterator[Batch],
    schedule: Schedule,
    after: Callable[[int, FluxTransformer2DModel], None] | None = None,
    helper: torch.nn.Module | None = None,
) -> FluxTransformer2DModel:
    """Run the schedule on `model` and return its moving average.

    Args:
        model: trained where its parameters require a gradient, float32.
        loss_over: gives the loss of a batch for the copy of the model that does the passes.
        stream: batches without end.
        schedule: steps and learning rates.
        after: called now and then with the step and the average.
        helper: a part of the loss with parameters of its own, trained beside the model.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    parameters += [] if helper is None else list(helper.parameters())
    optimizers = _optimizers(model, parameters, schedule)
    worker = Worker(model)
    loss_of = loss_over(worker.model)
    ema, seen, started = Ema(model), 0.0, time.monotonic()
    for step in range(schedule.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            optimizer.zero_grad()
        worker.load()
        loss = loss_of(next(stream))
        torch.autograd.backward(loss)
        worker.hand_over()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(model)
        seen = loss.item() if step == 0 else 0.98 * seen + 0.02 * loss.item()
        if step % 50 == 49:
            rate = (time.monotonic() - started) / (step + 1)
            logger.info("step %d of %d: loss %.4f, %.2f s a step", step + 1, schedule.steps, seen, rate)
        if after is not None and step % 500 == 499:
            after(step + 1, ema.model)
    return ema.model


def _optimizers(
    model: FluxTransformer2DModel, parameters: list[torch.nn.Parameter], schedule: Schedule
) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if schedule.muon and p.ndim == 2 and "blocks." in name]
    by_muon = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in by_muon]
    adamw = torch.optim.AdamW(rest, lr=schedule.peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    if not matrices:
        return [adamw]
    return [torch.optim.Muon(matrices, lr=schedule.peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), adamw]
