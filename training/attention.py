"""FLUX's attention for batches whose images have different positions, and the model's velocity with it."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor

from training.data import Batch


class PartialAttention(FluxAttnProcessor):
    """FLUX's attention with different positions for every image of a batch, which diffusers' does not allow.

    `rotation` is (cos, sin) of (B, S, 1, head width); `attention_mask` (B, 1, S, S) is added to the scores.
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
        """Attend; `image_rotary_emb` is ignored, `rotation` is used in its place."""
        parts = [_heads(attn, hidden_states, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))]
        prompt_tokens = 0
        if encoder_hidden_states is not None:
            prompt_tokens = encoder_hidden_states.shape[1]
            names, norms = ("add_q_proj", "add_k_proj", "add_v_proj"), (attn.norm_added_q, attn.norm_added_k)
            parts.insert(0, _heads(attn, encoder_hidden_states, names, norms))
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
        query, key = _rotated(query, rotation), _rotated(key, rotation)
        seen = attended(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attention_mask)
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


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot product attention by matrix products. At a hundred tokens on a CPU, the backward pass of torch's own
    takes ten times as long: two fifths of a training step."""
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    seen: Tensor = (scores if mask is None else scores + mask).softmax(-1) @ value
    return seen


def _rotated(states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    turned = torch.stack([-states[..., 1::2], states[..., 0::2]], dim=-1).flatten(-2)
    return states * rotation[0] + turned * rotation[1]


def weighing(batch: Batch, prompt_tokens: int) -> Tensor:
    """(B, 1, S, S): how often each query counts each key, as a logarithm; every one sees itself once."""
    keys = torch.nn.functional.pad(batch.stands_for.log(), (prompt_tokens, 0))
    groups = torch.nn.functional.pad(batch.groups, (prompt_tokens, 0))
    hidden = (groups > 0) & (groups != groups[:, None])
    weights = keys[:, None].masked_fill(hidden, -torch.inf)
    return weights.masked_fill(torch.eye(len(groups), dtype=torch.bool), 0.0)[:, None]


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
    mask = weighing(batch, prompt_tokens)
    (predicted,) = model(
        hidden_states=noisy.to(dtype),
        timestep=levels,
        guidance=guidance,
        pooled_projections=batch.pooled.to(dtype),
        encoder_hidden_states=batch.states.to(dtype),
        txt_ids=torch.zeros(prompt_tokens, 3),
        img_ids=batch.positions[0],
        joint_attention_kwargs={"rotation": tuple(rotation), "attention_mask": mask.to(dtype)},
        return_dict=False,
    )
    return torch.as_tensor(predicted).float()
