"""The layers that a file's names mean: one layer of the model, or several that the file keeps as one. Knows no keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_loading.shapes import LayerShape, ModelShapes
from lora_loading.updates import Rows


@dataclass(frozen=True)
class Piece:
    """A layer of the model, and the rows of the file's layer that it takes."""

    layer: LayerShape
    rows: Rows


@dataclass(frozen=True)
class Target:
    """A layer as a file sees it."""

    name: str
    """For messages, and one for every spelling of the same layer."""
    pieces: tuple[Piece, ...]

    @property
    def component(self) -> str:
        """The component that all pieces belong to."""
        return self.pieces[0].layer.component

    @property
    def rows(self) -> int:
        """The size of the output, of all pieces together."""
        return sum(piece.layer.rows for piece in self.pieces)

    @property
    def weight(self) -> tuple[int, ...]:
        """The shape of the weight as the file sees it."""
        return (self.rows, *self.pieces[0].layer.weight[1:])

    @property
    def bias(self) -> bool:
        """Whether there is one."""
        return all(piece.layer.bias for piece in self.pieces)


Locate = Callable[[str, ModelShapes], Target | None]
"""What a path means in this model, None where the path is another family's."""


@dataclass(frozen=True)
class Family:
    """One way to name layers."""

    name: str
    locate: Locate


def whole(layer: LayerShape) -> Target:
    """The target that is one layer."""
    return Target(layer.name, (Piece(layer, ((0, layer.rows),)),))


def fused(name: str, layers: tuple[LayerShape, ...]) -> Target:
    """The target whose rows are those of several layers, one after the other."""
    pieces, start = [], 0
    for layer in layers:
        pieces.append(Piece(layer, ((start, start + layer.rows),)))
        start += layer.rows
    return Target(name, tuple(pieces))


def swapped(name: str, layer: LayerShape) -> Target:
    """The target whose halves stand the other way round."""
    half = layer.rows // 2
    return Target(name, (Piece(layer, ((half, layer.rows), (0, half))),))
