"""FLUX.1's blocks with little traffic: the same mathematics as diffusers' blocks, arranged in fewer and larger steps.

What differs from diffusers' arrangement:
- Text and image tokens are one matrix of states all along, text first: nothing is joined or cut in a block.
- The weights of query, key and value, in single blocks those of the MLP's input too, are one matrix.
- The norm, modulation and quantisation at a block's end are those of the next one's input: so a block is given states
  and their quantised norm, and returns both. Compiled, that is one kernel for each border between products.
- Modulations and rotary embeddings come in ready, since they do not depend on the states.

Free functions over tensors without a batch, for the modules in `engine.lean_transformer`. Knows no diffusers and no
models. Sizes: S tokens of which the first T are text, D wide, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

FP8_MAX = 448
"""The largest number in float8_e4m3fn. An integer and a literal: other globals become inputs of a compiled graph."""


@dataclass(frozen=True)
class Matrix:
    """The weight and bias of a linear layer, or of several as one."""

    data: Tensor
    """(out, in): fp8 with scales, else a plain type."""
    scale: Tensor | None
    """(out, 1), float32, for fp8."""
    bias: Tensor
    """(out,)"""
    dynamic: bool
    """Whether products are in fp8; else an fp8 weight is widened before the product."""


@dataclass(frozen=True)
class Normed:
    """The modulated norm of the states, as products take it."""

    data: Tensor
    """(S, D): fp8 with scales, else of the states' type."""
    scale: Tensor | None
    """(S, 1), float32, for fp8."""

    def part(self, rows: slice) -> Normed:
        """Some tokens of it."""
        return Normed(self.data[rows], None if self.scale is None else self.scale[rows])


def quantised(states: Tensor, dynamic: bool, dtype: torch.dtype) -> Normed:
    """(S, D) in float32 or narrower -> as products take it: fp8 with a scale a row, or in `dtype`."""
    if not dynamic:
        return Normed(states.to(dtype), None)
    states = states.float()
    scale = states.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return Normed((states / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale)


def product(states: Normed, matrix: Matrix) -> Tensor:
    """states @ matrix.T + bias: (S, in) -> (S, out); from fp8 in bf16."""
    if states.scale is not None and matrix.scale is not None:
        return torch._scaled_mm(
            states.data,
            matrix.data.t(),
            scale_a=states.scale,
            scale_b=matrix.scale.t(),
            bias=matrix.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return nn.functional.linear(states.data, widened(matrix, states.data.dtype), matrix.bias)


def widened(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`."""
    return matrix.data if matrix.scale is None else matrix.data.to(dtype) * matrix.scale.to(dtype)


@torch.library.custom_op("flux::two_products", mutates_args=())
def two_products(
    states: Tensor, scale: Tensor, text: int,
    text_data: Tensor, text_scale: Tensor, text_bias: Tensor,
    image_data: Tensor, image_scale: Tensor, image_bias: Tensor,
) -> Tensor:  # fmt: skip
    """Text rows times one fp8 matrix and image rows times another, written into one tensor: joining would copy both."""
    out = torch.empty(len(states), len(text_data), dtype=torch.bfloat16, device=states.device)
    for rows, data, row_scale, bias in (
        (slice(0, text), text_data, text_scale, text_bias),
        (slice(text, None), image_data, image_scale, image_bias),
    ):
        torch._scaled_mm(
            states[rows],
            data.t(),
            scale_a=scale[rows],
            scale_b=row_scale.t(),
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
            out=out[rows],
        )
    return out


@two_products.register_fake
def _(
    states: Tensor, scale: Tensor, text: int,
    text_data: Tensor, text_scale: Tensor, text_bias: Tensor,
    image_data: Tensor, image_scale: Tensor, image_bias: Tensor,
) -> Tensor:  # fmt: skip
    return states.new_empty(states.shape[0], text_data.shape[0], dtype=torch.bfloat16)


def product_by_stream(text: int, states: Normed, for_text: Matrix, for_image: Matrix) -> Tensor:
    """The first `text` tokens times one matrix, the others times another: (S, in) -> (S, out)."""
    if states.scale is not None and for_text.scale is not None and for_image.scale is not None:
        # A constant for the compiler, which the operator itself does not tell it.
        torch._check(states.data.shape[1] == for_text.data.shape[1])  # type: ignore[no-untyped-call]
        result: Tensor = torch.ops.flux.two_products(
            states.data, states.scale, text,
            for_text.data, for_text.scale, for_text.bias, for_image.data, for_image.scale, for_image.bias,
        )  # fmt: skip
        return result
    parts = (states.part(slice(0, text)), for_text), (states.part(slice(text, None)), for_image)
    return torch.cat([product(part, matrix) for part, matrix in parts])


def by_stream(text: int, tokens: int, rows: Tensor) -> Tensor:
    """(2, ...), text's and image's -> (tokens, ...), each token its stream's."""
    # Or the compiled code asserts on the device that the index is in range.
    torch._check(rows.shape[0] == 2)  # type: ignore[no-untyped-call]
    return rows[(torch.arange(tokens, device=rows.device) >= text).long()]


def modulated_norm(states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then * (1 + scale) + shift; in float32, for what follows in the same kernel."""
    return nn.functional.layer_norm(states.float(), (states.shape[-1],), eps=1e-6) * (1 + scale.float()) + shift.float()


def first_norm(text: int, states: Tensor, shift: Tensor, scale: Tensor, dynamic: bool) -> Normed:
    """The modulated norm of the first block's states, (S, D); shift and scale are text's and image's, (2, D)."""
    tokens = states.shape[0]
    normed = modulated_norm(states, by_stream(text, tokens, shift), by_stream(text, tokens, scale))
    return quantised(normed, dynamic, states.dtype)


def partners(values: Tensor) -> Tensor:
    """Each value's partner in its pair: (..., D) -> (..., D), neighbours swapped."""
    swapped: Tensor = values.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # type: ignore[no-untyped-call]
    return swapped


def rotated(heads: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm of each head, then the rotary embedding.

    The partner of a value is read again, not stacked from halves: so the mean of squares, the norm and the rotation are
    one kernel.

    Args:
        heads: (S, 2, H, width), queries and keys.
        weight: (S or 1, 2, 1, width), of their norms.
        cos: (S, width)
        sin: (S, width), negative at even places.
    """
    root = torch.rsqrt(heads.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    straight = heads.float() * weight.float() * cos[:, None, None]
    crossed = partners(heads).float() * partners(weight).float() * sin[:, None, None]
    return ((straight + crossed) * root).to(heads.dtype)


def attention(joined: Tensor, weight: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Attention over all tokens: (S, 3 * D), the queries, keys and values of `heads` heads -> (S, D)."""
    width = joined.shape[-1] // 3
    turned = rotated(joined[:, : 2 * width].unflatten(-1, (2, heads, -1)), weight, cos, sin)  # type: ignore[no-untyped-call]
    values = joined[:, 2 * width :].unflatten(-1, (heads, -1))  # type: ignore[no-untyped-call]
    query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (turned[:, 0], turned[:, 1], values))
    return nn.functional.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1).flatten(-2)


def single_block(
    states: Tensor,
    normed: Normed,
    first: Matrix,
    last: Matrix,
    norms: Tensor,
    heads: int,
    rotary: tuple[Tensor, Tensor],
    modulation: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Normed]:
    """Attention and MLP side by side.

    Args:
        states: (S, D)
        normed: their modulated norm.
        first: of queries, keys, values and the MLP's input, (3 * D + MLP, D).
        last: of attention and MLP together, (D, D + MLP).
        norms: (2, head's width), of queries and keys.
        heads: H
        rotary: cos and sin, as `rotated` takes them.
        modulation: this block's gate, the next norm's shift and scale, each (D,).

    Returns:
        The states, and the next block's normed ones.
    """
    gate, shift, scale = modulation
    width = states.shape[1]
    joined = product(normed, first)
    attended = attention(joined[:, : 3 * width], norms[None, :, None], heads, *rotary)
    inner = torch.cat([attended, nn.functional.gelu(joined[:, 3 * width :], approximate="tanh")], -1)
    states = states + gate * product(quantised(inner, first.dynamic, states.dtype), last)
    return states, quantised(modulated_norm(states, shift, scale), first.dynamic, states.dtype)


def double_attention(
    text: int,
    states: Tensor,
    normed: Normed,
    joined: tuple[Matrix, Matrix],
    out: tuple[Matrix, Matrix],
    norms: Tensor,
    heads: int,
    rotary: tuple[Tensor, Tensor],
    modulation: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Normed]:
    """The first half of a double block. Pairs, and the first dimension of what is (2, ...), are text's and image's.

    Args:
        text: T
        states: (S, D)
        normed: their modulated norm.
        joined: of queries, keys and values, (3 * D, D).
        out: of the attention's output.
        norms: (2, 2, head's width): by stream, of queries and keys.
        heads: H
        rotary: cos and sin, as `rotated` takes them.
        modulation: gate, and the MLP's shift and scale, each (2, D).
    """
    tokens = states.shape[0]
    gate, shift, scale = (by_stream(text, tokens, part) for part in modulation)
    projected = product_by_stream(text, normed, *joined)
    attended = attention(projected, by_stream(text, tokens, norms)[:, :, None], heads, *rotary)
    dynamic = joined[0].dynamic
    states = states + gate * product_by_stream(text, quantised(attended, dynamic, states.dtype), *out)
    return states, quantised(modulated_norm(states, shift, scale), dynamic, states.dtype)


def double_mlp(
    text: int,
    states: Tensor,
    normed: Normed,
    first: tuple[Matrix, Matrix],
    last: tuple[Matrix, Matrix],
    modulation: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Normed]:
    """The second half of a double block; `modulation` is its gate and the next block's shift and scale, each (2, D)."""
    tokens = states.shape[0]
    gate, shift, scale = (by_stream(text, tokens, part) for part in modulation)
    inner = nn.functional.gelu(product_by_stream(text, normed, *first), approximate="tanh")
    dynamic = first[0].dynamic
    states = states + gate * product_by_stream(text, quantised(inner, dynamic, states.dtype), *last)
    return states, quantised(modulated_norm(states, shift, scale), dynamic, states.dtype)
