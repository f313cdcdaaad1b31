"""The tensors of one layer of a file become updates of the model's layers. The shapes have been checked (see `fit`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import LoraFormatError
from lora_loading.reading.fit import Change, block_size
from lora_loading.reading.formats.targets import Target
from lora_loading.reading.metadata import PeftSettings
from lora_loading.rotations import ColumnRotation, RowRotation
from lora_loading.shapes import Rows
from lora_loading.updates import Dora, Full, LoHa, LoKr, LowRank, Update, Value


@dataclass(frozen=True)
class LayerUpdate:
    """A change of one parameter, "weight" or "bias", of one layer."""

    component: str
    layer: str
    parameter: str
    update: Update


@dataclass(frozen=True)
class FileLayer:
    """A layer as the file has it: what it stands for, its tensors by part, and what the file says of its scale."""

    target: Target
    parts: Mapping[str, Tensor]
    names: tuple[str, ...]
    """What the layer is called in PEFT's settings: in the file's own names and in diffusers'."""
    settings: PeftSettings

    def alpha_over_rank(self, rank: int) -> float | None:
        """The scale: from the tensor alpha, else from PEFT's settings, None if neither says anything.

        A LoKr of two whole matrices has rank 0: there LyCORIS' alpha, the tensor, means nothing, and PEFT's still does.
        """
        alpha = self.parts.get("alpha")
        if alpha is None:
            return self.settings.scale(self.names, rank)
        return float(alpha.double().reshape(())) / rank if rank else 1.0


def layer_updates(layer: FileLayer, change: Change) -> list[LayerUpdate]:
    """The updates of the model's layers, one for each layer that the file's layer holds.

    Raises:
        LoraFormatError: alpha is not finite.
    """
    target = layer.target
    split = "oft_blocks.1" in change.parts
    updates = _split_rotations(layer, change) if split else _cut(target, _built(layer, change))
    pieces = (piece.layer.name for piece in target.pieces)
    return [
        LayerUpdate(target.component, piece, change.parameter, update)
        for piece, update in zip(pieces, updates, strict=True)
    ]


def _built(layer: FileLayer, change: Change) -> Update:
    built = _BUILDERS[change.kind](layer, change)
    if not change.magnitude:
        return built
    magnitude = layer.parts["magnitude"]
    return Dora(built, magnitude.reshape(-1, 1) if magnitude.ndim == 1 else magnitude)


def _cut(target: Target, update: Update) -> list[Update]:
    """The updates of the model's single layers, each with its own rows."""
    if isinstance(update, Dora) and update.magnitude.shape[0] == 1 and target.rows > 1:
        column = tuple((piece.layer.name, update.inner.take_rows(piece.rows)) for piece in target.pieces)
        update = Dora(update.inner, update.magnitude, column)
    return [update if piece.rows == ((0, target.rows),) else update.take_rows(piece.rows) for piece in target.pieces]


def _scale(layer: FileLayer, rank: int) -> float:
    """alpha / rank; 1 if the file says nothing, as all readers of such files assume."""
    scale = layer.alpha_over_rank(rank)
    if scale is None:
        return 1.0
    _expect_finite(layer, scale * rank)
    return scale


def _expect_finite(layer: FileLayer, alpha: float) -> None:
    if not math.isfinite(alpha):
        raise LoraFormatError(
            f'at "{layer.target.name}": its alpha is {alpha}, which is not finite. '
            "Train it again, or save its alpha in float32."
        )


# A builder for each kind


def _low_rank(layer: FileLayer, change: Change) -> Update:
    return LowRank(layer.parts["a"], layer.parts["b"], _scale(layer, change.rank))


def _loha(layer: FileLayer, change: Change) -> Update:
    w1_a, w1_b, w2_a, w2_b = (layer.parts[f"hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    return LoHa(w1_a, w1_b, w2_a, w2_b, _scale(layer, change.rank))


def _lokr(layer: FileLayer, change: Change) -> Update:
    w1, w2 = (
        tuple(layer.parts[part] for end in ("", "_a", "_b") if (part := f"lokr_{side}{end}") in layer.parts)
        for side in ("w1", "w2")
    )
    return LoKr(w1, w2, _scale(layer, change.rank))


def _difference(layer: FileLayer, change: Change) -> Update:
    return Full(layer.parts["diff"])


def _value(layer: FileLayer, change: Change) -> Update:
    return Value(layer.parts["value"])


def _bias(layer: FileLayer, change: Change) -> Update:
    (part,) = change.parts
    difference = layer.parts[part]
    return Full(difference.float() * _scale(layer, change.rank) if change.rank else difference)


def _oft(layer: FileLayer, change: Change) -> Update:
    if "oft_R" in change.parts:
        return _column_rotation(layer)
    if "oft_blocks" in change.parts:
        return _row_rotation(layer, layer.parts["oft_blocks"][None])
    blocks = layer.parts["oft_blocks.0"][None]
    return RowRotation(blocks, _constraint(layer, layer.target.rows), butterfly=False, sources=_sources(layer.target))


def _split_rotations(layer: FileLayer, change: Change) -> list[Update]:
    """kohya's OFT of a fused layer: a rotation for each of the model's layers."""
    parts = sorted(change.parts - {"alpha"})
    return [
        RowRotation(layer.parts[part][None], _constraint(layer, piece.layer.rows), butterfly=False)
        for part, piece in zip(parts, layer.target.pieces, strict=True)
    ]


def _boft(layer: FileLayer, change: Change) -> Update:
    if "oft_blocks" in change.parts:
        return _row_rotation(layer, layer.parts["oft_blocks"])
    blocks = layer.parts["boft_R"].float()
    return ColumnRotation((blocks - blocks.mT) / 2, None, layer.parts["boft_s"])


def _row_rotation(layer: FileLayer, blocks: Tensor) -> Update:
    rescale = layer.parts.get("rescale")
    return RowRotation(
        blocks=blocks,
        constraint=_constraint(layer, layer.target.rows) or None,  # for LyCORIS, 0 is no limit
        butterfly=layer.parts["oft_blocks"].ndim == 4,
        rescale=None if rescale is None else rescale.reshape(-1, 1),
        sources=_sources(layer.target),
    )


def _constraint(layer: FileLayer, rows: int) -> float:
    """The greatest norm of the blocks: in OFT, alpha is that limit for each row."""
    alpha = layer.parts.get("alpha")
    value = 0.0 if alpha is None else float(alpha.double().reshape(()))
    _expect_finite(layer, value)
    return value * rows


def _sources(target: Target) -> tuple[tuple[str, Rows], ...]:
    """The layers whose rows the rotation mixes; none where the file's layer is one layer of the model."""
    if target.pieces[0].rows == ((0, target.rows),):
        return ()
    return tuple((piece.layer.name, piece.rows) for piece in target.pieces)


def _column_rotation(layer: FileLayer) -> Update:
    """PEFT's OFT, and OneTrainer's Scaled OFT: a marker beside it divides Q by 2 sqrt(size - 1)."""
    triangles = layer.parts["oft_R"].float()
    size = block_size(triangles.shape[1])
    if "scaled_oft" in layer.parts and layer.parts["scaled_oft"].any():
        triangles = triangles / (2 * math.sqrt(size - 1))
    blocks = triangles.new_zeros(triangles.shape[0], size, size)
    upper = torch.triu_indices(size, size, 1)
    blocks[:, upper[0], upper[1]] = triangles
    return ColumnRotation((blocks - blocks.mT)[None], layer.settings.neumann_terms, None)


_BUILDERS: Mapping[str, Callable[[FileLayer, Change], Update]] = {
    "LoRA": _low_rank,
    "LoHa": _loha,
    "LoKr": _lokr,
    "full difference": _difference,
    "norm": _value,
    "bias": _bias,
    "OFT": _oft,
    "BOFT": _boft,
}
