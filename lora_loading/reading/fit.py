"""What the parts of one layer make together, and whether they fit the model: decided from names and shapes alone.

Needs neither torch nor the file's data, so a file that does not fit is refused before its data is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from errors import LoraFormatError
from lora_loading.reading.formats.spelling import MAX_SPLITS
from lora_loading.reading.formats.targets import Target
from lora_loading.reading.header import Shape

MAX_RANK = 2048
"""What converters make of rank 512 when they join q, k, v and the MLP into `linear1` and split it again."""
CONTROL_CHANNELS = {2: "Canny or Depth", 6: "Fill"}
"""How many times wider the input of FLUX.1's control models is."""


@dataclass(frozen=True)
class Change:
    """One change of the weight or the bias of a file's layer."""

    kind: str
    """ "LoRA", "LoHa", "LoKr", "OFT", "BOFT", "full difference", "norm" or "bias"."""
    parameter: str
    """ "weight" or "bias"."""
    parts: frozenset[str]
    rank: int = 0
    """By which alpha is divided; 0 if this kind has no alpha, or its tensors no rank."""
    magnitude: bool = False
    """Whether it is a DoRA."""

    @property
    def label(self) -> str:
        """The kind for people."""
        return f"DoRA {self.kind}" if self.magnitude else self.kind


@dataclass(frozen=True)
class _Layer:
    """A layer of a file: what it stands for, and the shape of each part (see `formats.spelling`)."""

    target: Target
    shapes: Mapping[str, Shape]


def changes_in(target: Target, shapes: Mapping[str, Shape]) -> tuple[Change, ...]:
    """The changes that the parts of these shapes make of a layer.

    Raises:
        LoraFormatError: parts are missing or left over, or do not fit the model.
    """
    layer = _Layer(target, shapes)
    found = [change for check in _CHECKS if (change := check(layer)) is not None]
    extra = set(shapes).difference(*(change.parts for change in found))
    if extra or not found:
        _refuse(layer, f"its parts {_listed(shapes)} make no whole change")
    if sum(change.parameter == "weight" for change in found) > 1:
        _refuse(layer, f"its parts {_listed(shapes)} make more than one change")
    return tuple(found)


# A check for each kind: None if its parts are not there


def _low_rank(layer: _Layer) -> Change | None:
    a, b = layer.shapes.get("a"), layer.shapes.get("b")
    if a is None and b is None:
        return None
    if a is None or b is None:
        _refuse(layer, f"it has only {'A' if b is None else 'B'} of the two factors")
    rows, columns = _linear_shape(layer)
    _expect(layer, "A", a, (None, columns))
    rank = _checked_rank(layer, a[0])
    _expect(layer, "B", b, (rows, rank))
    return _with_magnitude(layer, "LoRA", {"a", "b", "alpha"}, rank)


def _loha(layer: _Layer) -> Change | None:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    if not any(name in layer.shapes for name in names):
        return None
    missing = [name for name in names if name not in layer.shapes]
    if missing:
        _refuse(layer, f"{', '.join(missing)} is missing")
    rows, columns = _linear_shape(layer)
    for side in ("w1", "w2"):
        right = layer.shapes[f"hada_{side}_b"]
        _expect(layer, f"hada_{side}_b", right, (None, columns))
        _expect(layer, f"hada_{side}_a", layer.shapes[f"hada_{side}_a"], (rows, _checked_rank(layer, right[0])))
    return _with_magnitude(layer, "LoHa", {*names, "alpha"}, layer.shapes["hada_w1_b"][0])


def _lokr(layer: _Layer) -> Change | None:
    used = {part for part in layer.shapes if part.startswith("lokr_")}
    if not used:
        return None
    w1, w2 = _lokr_side(layer, "w1"), _lokr_side(layer, "w2")
    product, wanted = (w1[0] * w2[0], w1[1] * w2[1]), _linear_shape(layer)
    if product != wanted:
        found = f"its Kronecker product is {sizes(product)}, and the layer of this model {sizes(wanted)}"
        _refuse(layer, found)
    # The rank is that of the factored side. Two whole matrices have none: LyCORIS does not scale them, so the alpha
    # that it writes means nothing, and PEFT divides alpha by the rank in its settings
    return _with_magnitude(layer, "LoKr", {*used, "alpha"}, w1[2] or w2[2])


def _lokr_side(layer: _Layer, side: str) -> tuple[int, int, int]:
    """Rows, columns and rank of a side of the product; the rank is 0 where the side is one matrix."""
    whole, left, right = (layer.shapes.get(f"lokr_{side}{end}") for end in ("", "_a", "_b"))
    if whole is not None and left is None and right is None:
        _expect(layer, f"lokr_{side}", whole, (None, None))
        return whole[0], whole[1], 0
    if whole is not None or left is None or right is None:
        _refuse(layer, f"lokr_{side} must be one matrix or two factors")
    _expect(layer, f"lokr_{side}_b", right, (None, None))
    rank = _checked_rank(layer, right[0])
    _expect(layer, f"lokr_{side}_a", left, (None, rank))
    return left[0], right[1], rank


def _difference(layer: _Layer) -> Change | None:
    if "diff" not in layer.shapes:
        return None
    _expect(layer, "diff", layer.shapes["diff"], layer.target.weight)
    return _with_magnitude(layer, "full difference", {"diff", "alpha"})


def _value(layer: _Layer) -> Change | None:
    if "value" not in layer.shapes:
        return None
    if len(layer.target.weight) != 1:
        _refuse(layer, "it holds a whole weight, as checkpoints and control LoRAs do")
    _expect(layer, "weight", layer.shapes["value"], layer.target.weight)
    return Change("norm", "weight", frozenset({"value"}))


def _bias_difference(layer: _Layer) -> Change | None:
    return _bias(layer, "diff_b") if "diff_b" in layer.shapes else None


def _factor_bias(layer: _Layer) -> Change | None:
    """PEFT's `lora_bias`: factor B has a bias of its own, under the same scale."""
    if "bias" not in layer.shapes or "a" not in layer.shapes:
        return None
    return _bias(layer, "bias", layer.shapes["a"][0])


def _bias(layer: _Layer, part: str, rank: int = 0) -> Change:
    if not layer.target.bias:
        _refuse(layer, "it changes a bias, and the layer of this model has none")
    _expect(layer, part, layer.shapes[part], (layer.target.rows,))
    return Change("bias", "bias", frozenset({part}), rank)


def _row_rotation(layer: _Layer) -> Change | None:
    """LyCORIS' OFT, (blocks, size, size), or its BOFT, (stages, blocks, size, size)."""
    blocks = layer.shapes.get("oft_blocks")
    if blocks is None:
        return None
    rows, _ = _linear_shape(layer)
    _expect_blocks(layer, blocks if len(blocks) == 4 else (1, *blocks), rows, len(blocks) == 4)
    rescale = layer.shapes.get("rescale")
    if rescale is not None and rescale not in ((rows,), (rows, 1)):
        _refuse(layer, f"its rescale is {sizes(rescale)}, and the layer of this model has {rows} rows")
    _expect_one(layer, "alpha")
    kind = "BOFT" if len(blocks) == 4 else "OFT"
    return Change(kind, "weight", frozenset({"oft_blocks", "rescale", "alpha"}))


def _split_row_rotation(layer: _Layer) -> Change | None:
    """kohya's OFT: blocks for the layer, or for each of the layers that it fuses."""
    parts = [part for index in range(MAX_SPLITS) if (part := f"oft_blocks.{index}") in layer.shapes]
    if not parts:
        return None
    _linear_shape(layer)
    pieces = [piece.layer.rows for piece in layer.target.pieces]
    rows = pieces if len(parts) > 1 else [layer.target.rows]
    if len(parts) != len(rows):
        _refuse(layer, f"its parts {_listed(layer.shapes)} are for {len(parts)} layers, and it has {len(rows)}")
    for part, own in zip(parts, rows, strict=True):
        _expect_blocks(layer, (1, *layer.shapes[part]), own, False)
    _expect_one(layer, "alpha")
    return Change("OFT", "weight", frozenset({*parts, "alpha"}))


def _column_rotation(layer: _Layer) -> Change | None:
    """PEFT's OFT: the upper triangles of the blocks, (blocks, size * (size - 1) / 2); one block if they are shared.

    OneTrainer writes the same, with a marker where it is scaled.
    """
    triangles = layer.shapes.get("oft_R")
    if triangles is None:
        return None
    _, columns = _linear_shape(layer)
    _expect(layer, "oft_R", triangles, (None, None))
    size = block_size(triangles[1])
    if size * (size - 1) // 2 != triangles[1] or columns % size or triangles[0] not in (1, columns // size):
        _refuse(layer, f"oft_R is {sizes(triangles)}, and the layer of this model has {columns} columns")
    _expect_one(layer, "scaled_oft")
    return Change("OFT", "weight", frozenset({"oft_R", "scaled_oft"}))


def _column_butterfly(layer: _Layer) -> Change | None:
    """PEFT's BOFT: (stages, blocks, size, size) over the columns, and a scale for each row."""
    blocks = layer.shapes.get("boft_R")
    if blocks is None:
        return None
    rows, columns = _linear_shape(layer)
    _expect(layer, "boft_R", blocks, (None, None, None, None))
    _expect_blocks(layer, blocks, columns, blocks[0] > 1)
    _expect(layer, "boft_s", layer.shapes.get("boft_s", ()), (rows, 1))
    return Change("BOFT", "weight", frozenset({"boft_R", "boft_s"}))


_CHECKS: tuple[Callable[[_Layer], Change | None], ...] = (
    _low_rank,
    _loha,
    _lokr,
    _difference,
    _value,
    _bias_difference,
    _factor_bias,
    _row_rotation,
    _split_row_rotation,
    _column_rotation,
    _column_butterfly,
)


# Shared by the checks


def block_size(triangle: int) -> int:
    """The size of a square block whose upper triangle, without the diagonal, has this many numbers."""
    return (1 + math.isqrt(1 + 8 * triangle)) // 2


def _with_magnitude(layer: _Layer, kind: str, parts: set[str], rank: int = 0) -> Change:
    """The change of a weight; a DoRA if the layer has a magnitude, (out,), (out, 1) or (1, in)."""
    if rank:
        _expect_one(layer, "alpha")
    magnitude = layer.shapes.get("magnitude")
    if magnitude is None:
        return Change(kind, "weight", frozenset(parts), rank)
    rows, columns = _linear_shape(layer)
    if magnitude not in {(rows,), (rows, 1), (1, columns)}:
        found = f"its magnitude is {sizes(magnitude)}"
        _refuse(layer, f"{found}, and the layer of this model takes {rows} rows or {columns} columns")
    return Change(kind, "weight", frozenset({*parts, "magnitude"}), rank, magnitude=True)


def _linear_shape(layer: _Layer) -> tuple[int, int]:
    shape = layer.target.weight
    if len(shape) != 2:
        _refuse(layer, "it has factors, and the layer of this model is a norm")
    return shape[0], shape[1]


def _expect(layer: _Layer, part: str, found: Shape, shape: tuple[int | None, ...]) -> None:
    fits = len(found) == len(shape) and all(want in (None, size) for want, size in zip(shape, found, strict=True))
    if fits and all(found):
        return
    if layer.target.name in ("x_embedder", "img_in") and len(found) == len(shape) and found[-1] > (shape[-1] or 0):
        _refuse_control(shape[-1] or 1, found[-1])
    wanted = sizes(tuple("any" if size is None else size for size in shape))
    _refuse(layer, f"{part} is {sizes(found)}, and this model's layer takes {wanted}")


def _refuse_control(channels: int, found: int) -> NoReturn:
    kind = CONTROL_CHANNELS.get(found // channels if found % channels == 0 else 0, "Canny, Depth, Fill or their kin")
    raise LoraFormatError(
        f"it is a control LoRA ({kind}): it widens the model's input from {channels} to {found} channels. "
        "Use a LoRA that keeps the input as it is."
    )


def _expect_blocks(layer: _Layer, blocks: Shape, size: int, butterfly: bool) -> None:
    """(stages, blocks, n, n): square blocks that cover `size` in each stage; a butterfly's reach doubles each time."""
    fits = len(blocks) == 4 and blocks[2] == blocks[3] > 0 and blocks[1] * blocks[2] == size and 0 < blocks[0] <= 16
    if fits and butterfly:
        fits = blocks[2] % 2 == 0 and size % (2 ** (blocks[0] - 1) * blocks[2]) == 0
    if not fits:
        _refuse(layer, f"its blocks are {sizes(blocks)}, and the layer of this model has {size} rows or columns")


def _checked_rank(layer: _Layer, rank: int) -> int:
    if not 1 <= rank <= MAX_RANK:
        _refuse(layer, f"its rank is {rank}, and ranks from 1 to {MAX_RANK} are taken")
    return rank


def _expect_one(layer: _Layer, part: str) -> None:
    """Refuse a part that is there and is not a single number."""
    shape: Shape = layer.shapes.get(part, ())
    if any(size != 1 for size in shape):
        _refuse(layer, f"its {part} is {sizes(shape)} numbers instead of one")


def _refuse(layer: _Layer, found: str) -> NoReturn:
    raise LoraFormatError(f'at "{layer.target.name}": {found}. Check that it is a whole LoRA for FLUX.1.')


def sizes(shape: tuple[object, ...]) -> str:
    """A shape for people: "32x4"."""
    return "x".join(map(str, shape)) or "a single number"


def _listed(parts: Mapping[str, Shape]) -> str:
    return ", ".join(sorted(parts))
