"""One layer of a file: its tensors by part -> checked updates. Knows parts and targets; no files, no families.

What can be checked without the model's weights is checked here: pairs, shapes, ranks, numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from errors import LoraFormatError
from lora_loading.reading.formats.targets import Target
from lora_loading.updates import Dora, Full, LoHa, LoKr, LowRank, Update, Value

MAX_RANK = 512
ScaleOf = Callable[[str, int], float | None]
"""What the file's notes say of a layer's scale at a rank: alpha / rank."""


@dataclass(frozen=True)
class LayerUpdate:
    """A change of one parameter, "weight" or "bias", of one layer."""

    component: str
    layer: str
    parameter: str
    update: Update


@dataclass(frozen=True)
class FileLayer:
    """A layer as the file has it: what it means, and its tensors by part (see `formats.spelling`)."""

    target: Target
    parts: Mapping[str, Tensor]
    scale_of: ScaleOf


@dataclass(frozen=True)
class _Built:
    """A change of the file's layer before it is cut, and the parts that it took."""

    kind: str
    parameter: str
    update: Update
    used: frozenset[str]


def layer_updates(layer: FileLayer) -> tuple[str, list[LayerUpdate]]:
    """The kind of the layer's change, LoRA, LoHa, LoKr and so on, and the updates of the model's layers.

    Raises:
        LoraFormatError: parts are missing or left over, or do not fit.
    """
    built = [found for build in _BUILDERS if (found := build(layer)) is not None]
    extra = set(layer.parts).difference(*(found.used for found in built))
    if extra or not built:
        _refuse(layer, f"its parts {_listed(layer.parts)} make no whole change")
    if sum(found.parameter == "weight" for found in built) > 1:
        _refuse(layer, f"its parts {_listed(layer.parts)} make more than one change")
    kind = next((found.kind for found in built if found.parameter == "weight"), built[0].kind)
    return kind, [update for found in built for update in _cut(layer.target, found)]


def _cut(target: Target, built: _Built) -> list[LayerUpdate]:
    """The updates of the single layers, each with its own rows."""
    update = built.update
    if isinstance(update, Dora) and update.magnitude.shape[0] == 1 and target.rows > 1:
        column = tuple((piece.layer.name, update.inner.take_rows(piece.rows)) for piece in target.pieces)
        update = Dora(update.inner, update.magnitude, column)
    return [
        LayerUpdate(
            target.component,
            piece.layer.name,
            built.parameter,
            update if piece.rows == ((0, target.rows),) else update.take_rows(piece.rows),
        )
        for piece in target.pieces
    ]


# The builders: each takes the parts that it knows, and is None where they are not there


def _low_rank(layer: FileLayer) -> _Built | None:
    a, b = layer.parts.get("a"), layer.parts.get("b")
    if a is None and b is None:
        return None
    if a is None or b is None:
        _refuse(layer, f"it has only {'A' if b is None else 'B'} of the two factors")
    rows, columns = _linear_shape(layer)
    _expect(layer, "A", a, (None, columns))
    rank = _checked_rank(layer, a.shape[0])
    _expect(layer, "B", b, (rows, rank))
    return _with_magnitude(layer, "LoRA", LowRank(a, b, _scale(layer, rank)), {"a", "b", "alpha"})


def _loha(layer: FileLayer) -> _Built | None:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    if not any(name in layer.parts for name in names):
        return None
    w1_a, w1_b, w2_a, w2_b = _all_of(layer, names)
    rows, columns = _linear_shape(layer)
    for side, left, right in (("w1", w1_a, w1_b), ("w2", w2_a, w2_b)):
        _expect(layer, f"hada_{side}_b", right, (None, columns))
        _expect(layer, f"hada_{side}_a", left, (rows, _checked_rank(layer, right.shape[0])))
    update = LoHa(w1_a, w1_b, w2_a, w2_b, _scale(layer, w1_b.shape[0]))
    return _with_magnitude(layer, "LoHa", update, {*names, "alpha"})


def _lokr(layer: FileLayer) -> _Built | None:
    used = {part for part in layer.parts if part.startswith("lokr_")}
    if not used:
        return None
    w1, w2 = _lokr_side(layer, "w1"), _lokr_side(layer, "w2")
    rows, columns = _linear_shape(layer)
    shape = (w1[0].shape[0] * w2[0].shape[0], w1[-1].shape[1] * w2[-1].shape[1])
    if shape != (rows, columns):
        _refuse(
            layer, f"its Kronecker product is {_sizes(shape)}, and the layer of this model {_sizes((rows, columns))}"
        )
    # LyCORIS: the rank is that of the factored side, and two whole matrices have no scale
    factored = next((side for side in (w1, w2) if len(side) == 2), None)
    scale = 1.0 if factored is None else _scale(layer, factored[1].shape[0])
    return _with_magnitude(layer, "LoKr", LoKr(w1, w2, scale), {*used, "alpha"})


def _lokr_side(layer: FileLayer, side: str) -> tuple[Tensor, ...]:
    """A side of the product: a matrix, or its two factors."""
    whole, left, right = (layer.parts.get(f"lokr_{side}{end}") for end in ("", "_a", "_b"))
    if whole is not None and left is None and right is None:
        _expect(layer, f"lokr_{side}", whole, (None, None))
        return (whole,)
    if whole is not None or left is None or right is None:
        _refuse(layer, f"lokr_{side} must be one matrix or two factors")
    _expect(layer, f"lokr_{side}_b", right, (None, None))
    _expect(layer, f"lokr_{side}_a", left, (None, _checked_rank(layer, right.shape[0])))
    return left, right


def _difference(layer: FileLayer) -> _Built | None:
    diff = layer.parts.get("diff")
    if diff is None:
        return None
    _expect(layer, "diff", diff, layer.target.weight)
    return _with_magnitude(layer, "full difference", Full(diff), {"diff", "alpha"})


def _value(layer: FileLayer) -> _Built | None:
    value = layer.parts.get("value")
    if value is None:
        return None
    if len(layer.target.weight) != 1:
        _refuse(layer, "it holds a whole weight, as checkpoints do")
    _expect(layer, "weight", value, layer.target.weight)
    return _Built("norm", "weight", Value(value), frozenset({"value"}))


def _bias_difference(layer: FileLayer) -> _Built | None:
    difference = layer.parts.get("diff_b")
    return None if difference is None else _bias(layer, difference, "diff_b")


def _factor_bias(layer: FileLayer) -> _Built | None:
    """PEFT's lora_bias: the second factor has a bias of its own, under the same scale."""
    bias, a = layer.parts.get("bias"), layer.parts.get("a")
    return None if bias is None or a is None else _bias(layer, bias.float() * _scale(layer, a.shape[0]), "bias")


def _bias(layer: FileLayer, difference: Tensor, part: str) -> _Built:
    if not layer.target.bias:
        _refuse(layer, "it changes a bias, and the layer of this model has none")
    _expect(layer, part, difference, (layer.target.rows,))
    return _Built("bias", "bias", Full(difference), frozenset({part}))


_BUILDERS: tuple[Callable[[FileLayer], _Built | None], ...] = (
    _low_rank,
    _loha,
    _lokr,
    _difference,
    _value,
    _bias_difference,
    _factor_bias,
)


# Checks


def _with_magnitude(layer: FileLayer, kind: str, update: Update, used: set[str]) -> _Built:
    """The change of a weight; DoRA's where the layer has a magnitude, (out,), (out, 1) or (1, in)."""
    magnitude = layer.parts.get("magnitude")
    if magnitude is None:
        return _Built(kind, "weight", update, frozenset(used))
    rows, columns = _linear_shape(layer)
    if tuple(magnitude.shape) not in {(rows,), (rows, 1), (1, columns)}:
        found = f"its magnitude is {_sizes(tuple(magnitude.shape))}"
        _refuse(layer, f"{found}, and the layer of this model takes {rows} rows or {columns} columns")
    column = magnitude.reshape(-1, 1) if magnitude.ndim == 1 else magnitude
    return _Built(f"DoRA {kind}", "weight", Dora(update, column), frozenset({*used, "magnitude"}))


def _linear_shape(layer: FileLayer) -> tuple[int, int]:
    shape = layer.target.weight
    if len(shape) != 2:
        _refuse(layer, "it has factors, and the layer of this model is a norm")
    return shape[0], shape[1]


def _expect(layer: FileLayer, part: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    found = tuple(tensor.shape)
    fits = len(found) == len(shape) and all(want in (None, size) for want, size in zip(shape, found, strict=True))
    if fits and tensor.numel():
        return
    if layer.target.name in ("x_embedder", "img_in") and len(found) == len(shape) and found[-1] > (shape[-1] or 0):
        raise LoraFormatError(
            f"it is a control LoRA (Canny, Depth, Fill or Kontext kin): it widens the model's input from {shape[-1]} "
            f"to {found[-1]} channels. Use a LoRA that keeps the input as it is."
        )
    wanted = _sizes(tuple("any" if size is None else size for size in shape))
    _refuse(layer, f"{part} is {_sizes(found)}, and this model's layer takes {wanted}")


def _checked_rank(layer: FileLayer, rank: int) -> int:
    if not 1 <= rank <= MAX_RANK:
        _refuse(layer, f"its rank is {rank}, and ranks from 1 to {MAX_RANK} are taken")
    return rank


def _scale(layer: FileLayer, rank: int) -> float:
    """alpha / rank: the tensor's alpha, else what the notes say, else 1."""
    alpha = layer.parts.get("alpha")
    if alpha is None:
        said = layer.scale_of(layer.target.pieces[0].layer.name, rank)
        return 1.0 if said is None else said
    if alpha.numel() != 1:
        _refuse(layer, f"its alpha holds {alpha.numel()} numbers instead of one")
    return float(alpha.to(torch.float64).reshape(())) / rank


def _all_of(layer: FileLayer, names: tuple[str, ...]) -> list[Tensor]:
    missing = [name for name in names if name not in layer.parts]
    if missing:
        _refuse(layer, f"{', '.join(missing)} is missing")
    return [layer.parts[name] for name in names]


def _refuse(layer: FileLayer, found: str) -> NoReturn:
    raise LoraFormatError(f'at "{layer.target.name}": {found}. Check that it is a whole LoRA for FLUX.1.')


def _sizes(shape: tuple[object, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _listed(parts: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted(parts))
