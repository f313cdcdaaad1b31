"""A FLUX.1 transformer that runs `engine.lean`'s blocks over another transformer's weights, called as that one is.

diffusers' pipelines call it once a step. What does not depend on the states is worked out once a request and kept in
a `RequestState`: the text's states, rotary embeddings, and the modulations of all steps, which the pipeline's scheduler
knows from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn
from torchao.quantization import Float8Tensor

from engine.lean import (
    Matrix,
    Normed,
    double_attention,
    double_mlp,
    first_norm,
    modulated_norm,
    product,
    quantised,
    single_block,
)

REQUEST = "request"
"""The key of a `RequestState` in the pipelines' `joint_attention_kwargs`."""


@dataclass
class Prepared:
    """What a request's steps share."""

    text: Tensor
    """(T, D)"""
    rotary: tuple[Tensor, Tensor]
    """cos and sin, (S, head's width); sin is negative at even places."""
    double: list[Tensor]
    """For each double block (steps, 2, 6, D): text's and image's shift, scale, gate of attention, then of the MLP."""
    single: list[Tensor]
    """For each single block (steps, 3, D): shift, scale, gate."""
    border: Tensor
    """(steps, 2, 6, D): the first single block's shift and scale, in a double block's layout."""
    last: Tensor
    """(steps, 2, D): the last norm's shift and scale."""


class RequestState:
    """One call of a pipeline: which step it is at, and what its steps share."""

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        self._scheduler = scheduler
        self.prepared: Prepared | None = None

    @property
    def timesteps(self) -> Tensor:
        """Of all steps, (steps,)."""
        timesteps: Tensor = self._scheduler.timesteps
        return timesteps

    @property
    def step(self) -> int:
        """The index of the present step."""
        index = self._scheduler.step_index
        return int(index if index is not None else self._scheduler.begin_index or 0)


class _Block(nn.Module):
    """Holds matrices as buffers: the compiler then takes their sizes for constants, and the tokens' for variables."""

    def __init__(self, matrices: dict[str, Matrix]) -> None:
        super().__init__()
        self.dynamic = next(iter(matrices.values())).dynamic
        for name, matrix in matrices.items():
            self.register_buffer(f"{name}_data", matrix.data)
            self.register_buffer(f"{name}_scale", matrix.scale)
            self.register_buffer(f"{name}_bias", matrix.bias)

    def matrix(self, name: str) -> Matrix:
        """A matrix by its name."""
        data, scale, bias = (getattr(self, f"{name}_{part}") for part in ("data", "scale", "bias"))
        return Matrix(data, scale, bias, self.dynamic)

    def pair(self, name: str) -> tuple[Matrix, Matrix]:
        """Text's and image's."""
        return self.matrix(f"text_{name}"), self.matrix(f"image_{name}")


class LeanSingleBlock(_Block):
    """See `lean.single_block`."""

    norms: Tensor

    def __init__(self, matrices: dict[str, Matrix], norms: Tensor, heads: int) -> None:
        super().__init__(matrices)
        self.heads = heads
        self.register_buffer("norms", norms)

    def forward(
        self, states: Tensor, normed: Tensor, scales: Tensor | None, cos: Tensor, sin: Tensor, *modulation: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The states, and the next block's normed ones with their scales."""
        gate, shift, scale = modulation
        states, after = single_block(
            states, Normed(normed, scales), self.matrix("first"), self.matrix("last"),
            self.norms, self.heads, (cos, sin), (gate, shift, scale),
        )  # fmt: skip
        return states, after.data, after.scale


class LeanDoubleAttention(_Block):
    """See `lean.double_attention`. The halves of a double block are two graphs, so that the states between them are
    stored in their own type and not in float32."""

    norms: Tensor
    image_joined_data: Tensor

    def __init__(self, matrices: dict[str, Matrix], norms: Tensor, heads: int) -> None:
        super().__init__(matrices)
        self.heads = heads
        self.register_buffer("norms", norms)

    def forward(
        self,
        text: int,
        states: Tensor,
        normed: Tensor,
        scales: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *modulation: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The states, and the second half's normed ones with their scales."""
        gate, shift, scale = modulation
        torch._check(states.shape[1] == self.image_joined_data.shape[1])  # type: ignore[no-untyped-call]
        states, after = double_attention(
            text, states, Normed(normed, scales), self.pair("joined"), self.pair("out"),
            self.norms, self.heads, (cos, sin), (gate, shift, scale),
        )  # fmt: skip
        return states, after.data, after.scale


class LeanDoubleMlp(_Block):
    """See `lean.double_mlp`."""

    image_first_data: Tensor

    def forward(
        self, text: int, states: Tensor, normed: Tensor, scales: Tensor | None, *modulation: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The states, and the next block's normed ones with their scales."""
        gate, shift, scale = modulation
        torch._check(states.shape[1] == self.image_first_data.shape[1])  # type: ignore[no-untyped-call]
        states, after = double_mlp(
            text, states, Normed(normed, scales), self.pair("first"), self.pair("last"), (gate, shift, scale)
        )
        return states, after.data, after.scale


class LeanFirstNorm(nn.Module):
    """See `lean.first_norm`."""

    def __init__(self, dynamic: bool) -> None:
        super().__init__()
        self.dynamic = dynamic

    def forward(self, text: int, states: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        """The first block's normed states with their scales."""
        normed = first_norm(text, states, shift, scale, self.dynamic)
        return normed.data, normed.scale


class LeanLastNorm(nn.Module):
    """The modulated norm of the image's tokens."""

    def forward(self, text: int, states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """(S, D) -> (image tokens, D), in the states' type."""
        return modulated_norm(states[text:], shift, scale).to(states.dtype)


class LeanBlocks(nn.Module):
    """All blocks of a transformer. Models that share their blocks' weights share these too."""

    def __init__(self, transformer: FluxTransformer2DModel, dynamic: bool) -> None:
        """Take the weights of a transformer whose layers of one `joined_layers` group lie one after another in memory.

        Args:
            transformer: as `WorkingCopy` lays it out.
            dynamic: whether products are in fp8.
        """
        super().__init__()
        self.dynamic = dynamic
        heads = transformer.config.num_attention_heads
        self.first_norm, self.last_norm = LeanFirstNorm(dynamic), LeanLastNorm()
        self.attention, self.mlp, self.single = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for block in transformer.transformer_blocks:
            attn = block.attn
            outer = {
                "text_joined": self._of(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
                "image_joined": self._of(attn.to_q, attn.to_k, attn.to_v),
                "text_out": self._of(attn.to_add_out),
                "image_out": self._of(attn.to_out[0]),
            }
            norms = joined_rows([n.weight for n in (attn.norm_added_q, attn.norm_added_k, attn.norm_q, attn.norm_k)])
            self.attention.append(LeanDoubleAttention(outer, norms.view(2, 2, -1), heads))
            inner = {
                "text_first": self._of(block.ff_context.net[0].proj),
                "image_first": self._of(block.ff.net[0].proj),
                "text_last": self._of(block.ff_context.net[2]),
                "image_last": self._of(block.ff.net[2]),
            }
            self.mlp.append(LeanDoubleMlp(inner))
        for block in transformer.single_transformer_blocks:
            attn = block.attn
            matrices = {
                "first": self._of(attn.to_q, attn.to_k, attn.to_v, block.proj_mlp),
                "last": self._of(block.proj_out),
            }
            norms = joined_rows([attn.norm_q.weight, attn.norm_k.weight])
            self.single.append(LeanSingleBlock(matrices, norms.view(2, -1), heads))

    def _of(self, *layers: Any) -> Matrix:  # noqa: ANN401 - modules of diffusers
        return matrix_of(layers, self.dynamic)


def joined_layers(transformer: FluxTransformer2DModel) -> list[list[Any]]:
    """The layers whose weights, and biases, `LeanBlocks` takes for one; for who allocates them."""
    groups: list[list[Any]] = []
    for block in transformer.transformer_blocks:
        attn = block.attn
        groups += [[attn.add_q_proj, attn.add_k_proj, attn.add_v_proj], [attn.to_q, attn.to_k, attn.to_v]]
        groups.append([attn.norm_added_q, attn.norm_added_k, attn.norm_q, attn.norm_k])
    for block in transformer.single_transformer_blocks:
        attn = block.attn
        groups += [[attn.to_q, attn.to_k, attn.to_v, block.proj_mlp], [attn.norm_q, attn.norm_k]]
    return groups


def matrix_of(layers: Sequence[Any], dynamic: bool) -> Matrix:
    """Layers that lie one after another in memory as one matrix; nothing is copied."""
    weights, bias = [layer.weight for layer in layers], joined_rows([layer.bias for layer in layers])
    if isinstance(weights[0], Float8Tensor):
        data, scale = joined_rows([w.qdata for w in weights]), joined_rows([w.scale for w in weights])
        return Matrix(data, scale, bias, dynamic)
    return Matrix(joined_rows(weights), None, bias, False)


def joined_rows(parts: Sequence[Tensor]) -> Tensor:
    """Tensors that lie one after another in memory as one view, joined in their first dimension.

    Raises:
        ValueError: they do not lie so.
    """
    first = parts[0].detach()
    ends = first.storage_offset()
    for part in parts:
        if part.untyped_storage()._cdata != first.untyped_storage()._cdata or part.storage_offset() != ends:
            raise ValueError("the weights do not lie one after another, so they are no single matrix")
        ends += part.numel()
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


class LeanTransformer(nn.Module):
    """Stands for a FluxTransformer2DModel in diffusers' pipelines; equal to it but for rounding."""

    _repeated_blocks = tuple(
        kind.__name__ for kind in (LeanFirstNorm, LeanDoubleAttention, LeanDoubleMlp, LeanSingleBlock, LeanLastNorm)
    )

    def __init__(self, transformer: FluxTransformer2DModel, blocks: LeanBlocks) -> None:
        """Run a transformer's weights.

        Args:
            transformer: of which embedders, modulations and the last layers are taken.
            blocks: over the transformer's own blocks.
        """
        super().__init__()
        self.weights: Any = transformer
        self.blocks: Any = blocks

    @property
    def config(self) -> Any:  # noqa: ANN401 - diffusers is not typed
        """The transformer's."""
        return self.weights.config

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's, of what is not fp8."""
        dtype: torch.dtype = self.weights.x_embedder.weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.weights.x_embedder.weight.device
        return device

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """The pipelines name their calls, for transformers that cache their outputs; this one does not."""
        return nullcontext()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The velocity, (1, image tokens, channels), as diffusers' transformer gives it for a batch of one.

        Args:
            hidden_states: (1, image tokens, channels)
            encoder_hidden_states: (1, T, width)
            pooled_projections: (1, width)
            timestep: (1,), from 0 to 1.
            img_ids: (image tokens, 3)
            txt_ids: (T, 3)
            guidance: (1,)
            joint_attention_kwargs: with a `RequestState` under `REQUEST`, steps share what they can.
            return_dict: must be false, as the pipelines have it.

        Raises:
            ValueError: a batch of more than one.
        """
        if hidden_states.shape[0] != 1:
            raise ValueError(f"a batch of {hidden_states.shape[0]}; images are made one after another")
        request = (joint_attention_kwargs or {}).get(REQUEST)
        prepared, step = None if request is None else request.prepared, 0 if request is None else request.step
        if prepared is None:
            times = timestep if request is None else (request.timesteps.to(hidden_states.dtype) / 1000)
            prepared = self._prepared(times, guidance, pooled_projections, encoder_hidden_states[0], txt_ids, img_ids)
            if request is not None:
                request.prepared = prepared
        return (self._step(prepared, step, hidden_states[0])[None],)

    def _prepared(
        self, times: Tensor, guidance: Tensor | None, pooled: Tensor, text: Tensor, txt_ids: Tensor, img_ids: Tensor
    ) -> Prepared:
        weights, steps = self.weights, len(times)
        embedder, times, pooled = weights.time_text_embed, times.to(self.dtype) * 1000, pooled.expand(steps, -1)
        if guidance is None:
            embedded = embedder(times, pooled)
        else:
            embedded = embedder(times, (guidance.to(self.dtype) * 1000).expand(steps), pooled)
        embedded = nn.functional.silu(embedded)
        modulations = self._modulations(embedded)
        border = embedded.new_zeros(steps, 2, 6, embedded.shape[1])
        border[:, :, :2] = modulations[1][0][:, None, :2]
        cos, sin = weights.pos_embed(torch.cat([txt_ids, img_ids]))
        signs = torch.arange(sin.shape[1], device=sin.device) % 2 * 2 - 1
        last = weights.norm_out.linear(embedded).unflatten(-1, (2, -1)).flip(1)
        return Prepared(weights.context_embedder(text), (cos, sin * signs), *modulations, border, last)

    def _modulations(self, embedded: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of double and of single blocks, see `Prepared`; the embedding is quantised once for all."""
        given = quantised(embedded, self.blocks.dynamic, embedded.dtype)

        def of(layer: Any, parts: int) -> Tensor:  # noqa: ANN401
            matrix = matrix_of([layer], self.blocks.dynamic)
            states = given if matrix.scale is not None else Normed(embedded, None)
            modulation: Tensor = product(states, matrix).unflatten(-1, (parts, -1))  # type: ignore[no-untyped-call]
            return modulation

        double = [
            torch.stack([of(block.norm1_context.linear, 6), of(block.norm1.linear, 6)], 1)
            for block in self.weights.transformer_blocks
        ]
        return double, [of(block.norm.linear, 3) for block in self.weights.single_transformer_blocks]

    def _step(self, prepared: Prepared, step: int, latents: Tensor) -> Tensor:
        blocks, text = self.blocks, len(prepared.text)
        states = torch.cat([prepared.text, self.weights.x_embedder(latents)])
        double = [modulation[step] for modulation in (*prepared.double, prepared.border)]
        single = [modulation[step] for modulation in (*prepared.single, prepared.last)]
        normed, scales = blocks.first_norm(text, states, double[0][:, 0], double[0][:, 1])
        for index, (attention, mlp) in enumerate(zip(blocks.attention, blocks.mlp, strict=True)):
            own, after = double[index], double[index + 1]
            given = (own[:, 2], own[:, 3], own[:, 4])
            states, normed, scales = attention(text, states, normed, scales, *prepared.rotary, *given)
            given = (own[:, 5], after[:, 0], after[:, 1])
            states, normed, scales = mlp(text, states, normed, scales, *given)
        for index, block in enumerate(blocks.single):
            own, after = single[index], single[index + 1]
            states, normed, scales = block(states, normed, scales, *prepared.rotary, own[2], after[0], after[1])
        velocity: Tensor = self.weights.proj_out(blocks.last_norm(text, states, *single[-1]))
        return velocity
