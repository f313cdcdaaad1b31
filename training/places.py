"""Where the training of the transformer begins: its first block reads the place of each image token.

FLUX gives image tokens their row and column by rotary embeddings alone: they act only where two tokens meet. All prompt
tokens are at (0, 0), so how an image token attends to a prompt token can depend on where it stands. Found by training,
that takes a small transformer ten thousand steps. Here the heads of the first block begin with it: the T5 states carry
marks (`training/text.py`), each mark becomes a key of one of the rotations' frequencies in one of four phases, and the
attention is then a table of waves of the row, in the other two heads of the column. With four phases and small scores
it is almost linear: a linear reading of exact marks finds a place among 70 tokens within a fifth of a token; with two
phases and scores three times as large it was off by five. The training goes on from there; nothing is kept fixed.
"""

from __future__ import annotations

import random

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional

from training.prompts import training_prompt
from training.text import MARKS, SHAPES_READ, TextEncoders, one_hot_marks

PROMPTS = 1000
WAVE_GAIN = 0.5
"""Makes the attention's scores for the marks go up and down by 1.2."""
APART_GAIN = 3.0
"""Keeps the sum of what four thousand image tokens get from these heads below a hundredth."""
VALUE_GAIN = 12.0
STILL = 4
"""Dimensions of a head that are not rotated: by them, these heads tell prompt tokens from image tokens."""
PHASES = 4
FREQUENCIES = MARKS // PHASES
"""Of a head. The heads of an axis take the rotations' frequencies in turn, from the highest."""


@torch.no_grad()
def begin_with_places(model: FluxTransformer2DModel, text: TextEncoders) -> None:
    """Set the heads of the first block, and the last channels of the image's states, in an untrained model."""
    block, width, heads = model.transformer_blocks[0], model.inner_dim, model.config.num_attention_heads
    attention, head_width = block.attn, model.config.attention_head_dim
    channels = slice(width - heads * MARKS, width)
    _leave_unmodulated(block.norm1_context.linear, width, parts=(0, 1))  # shift and scale of the prompt's states
    _leave_unmodulated(block.norm1.linear, width, parts=(2,))
    block.norm1.linear.bias[2 * width : 3 * width] = 1  # the gate of the attention
    model.x_embedder.weight[channels] = 0
    model.x_embedder.bias[channels] = 0
    attention.norm_q.weight[:STILL] = APART_GAIN
    attention.norm_q.weight[STILL:] = WAVE_GAIN
    attention.to_out[0].weight[channels] = 0
    reading = _mark_reading(model, text)
    for head in range(heads):
        rows = slice(head * head_width, (head + 1) * head_width)
        axis, turn = divmod(head, heads // 2)
        keys = _keys_of_marks(model.config.axes_dims_rope, axis + 1, turn * FREQUENCIES)
        _set_rows(attention.add_k_proj, rows, keys @ reading)
        _set_rows(attention.add_v_proj, rows, functional.pad(reading, (0, 0, 0, head_width - MARKS)))
        query = torch.zeros(head_width)
        query[:STILL] = 1
        query[keys[:, ::PHASES].sum(1) > 0] = 1  # the phase is 0
        _set_constant(attention.to_q, rows, query)
        _set_constant(attention.to_k, rows, -functional.pad(torch.ones(STILL), (0, head_width - STILL)))
        _set_constant(attention.to_v, rows, torch.zeros(head_width))
        for mark in range(MARKS):
            attention.to_out[0].weight[channels.start + head * MARKS + mark, rows.start + mark] = VALUE_GAIN


def _keys_of_marks(axes: tuple[int, ...], axis: int, first_frequency: int) -> Tensor:
    """(head width, MARKS): mark 4 k + p has this axis's frequency first_frequency + k, with phase p pi / 2."""
    keys = torch.zeros(sum(axes), MARKS)
    for mark in range(MARKS):
        frequency, phase = divmod(mark, PHASES)
        keys[sum(axes[:axis]) + 2 * (first_frequency + frequency) + phase % 2, mark] = 1 if phase < 2 else -1
    return keys


def _mark_reading(model: FluxTransformer2DModel, text: TextEncoders) -> Tensor:
    """(marks, width + 1): what reads the marks from the prompt's states as the block sees them, by least squares."""
    rng = random.Random(0)
    prompts = [training_prompt(rng, SHAPES_READ).text for _ in range(PROMPTS)]
    states = model.context_embedder(text.encode(prompts)[1])
    seen = functional.pad(functional.layer_norm(states, states.shape[-1:]), (0, 1), value=1.0).flatten(0, 1)
    wanted = one_hot_marks(text.t5_ids(prompts)).flatten(0, 1)
    normal = seen.T @ seen + 1e-2 * torch.eye(seen.shape[1])
    return torch.as_tensor(torch.linalg.solve(normal, seen.T @ wanted).T)


def _set_rows(linear: torch.nn.Linear, rows: slice, reading: Tensor) -> None:
    linear.weight[rows] = reading[:, :-1]
    linear.bias[rows] = reading[:, -1]


def _set_constant(linear: torch.nn.Linear, rows: slice, value: Tensor) -> None:
    linear.weight[rows] = 0
    linear.bias[rows] = value


def _leave_unmodulated(linear: torch.nn.Linear, width: int, parts: tuple[int, ...]) -> None:
    """Begin without the prompt's and the noise level's influence on these of the six parts of a modulation."""
    for part in parts:
        linear.weight[part * width : (part + 1) * width] = 0
        linear.bias[part * width : (part + 1) * width] = 0
