"""What a name in a file stands for: one layer of the model, or several that the file keeps as one. Knows no keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_loading.shapes import LayerShape, ModelShapes, Rows


@dataclass(frozen=True)
class Piece:
    """A layer of the model, and the rows of the file's layer that belong to it."""

    layer: LayerShape
    rows: Rows


@dataclass(frozen=True)
class Target:
    """A layer as a file sees it."""

    name: str
    """The same for every spelling of a layer; shown in messages."""
    pieces: tuple[Piece, ...]

    @property
    def component(self) -> str:
        """The component that the layer is in, the same for all pieces."""
        return self.pieces[0].layer.component

    @property
    def rows(self) -> int:
        """The size of the output, summed over the pieces."""
        return sum(piece.layer.rows for piece in self.pieces)

    @property
    def weight(self) -> tuple[int, ...]:
        """The shape of the weight as the file sees it."""
        return (self.rows, *self.pieces[0].layer.weight[1:])

    @property
    def bias(self) -> bool:
        """Whether the layer has a bias; for several pieces, whether all have."""
        return all(piece.layer.bias for piece in self.pieces)


Locate = Callable[[str, ModelShapes], Target | None]
"""A function from a path to its target in this model; None if the path is not of its family."""


@dataclass(frozen=True)
class Family:
    """One convention of naming layers: its name for the log, and how a path is looked up."""

    name: str
    locate: Locate


def whole(layer: LayerShape) -> Target:
    """The target that is one whole layer of the model."""
    return Target(layer.name, (Piece(layer, ((0, layer.rows),)),))


def fused(name: str, layers: tuple[LayerShape, ...]) -> Target:
    """The target that holds the rows of several layers, one after the other."""
    pieces, start = [], 0
    for layer in layers:
        pieces.append(Piece(layer, ((start, start + layer.rows),)))
        start += layer.rows
    return Target(name, tuple(pieces))


def swapped(name: str, layer: LayerShape) -> Target:
    """The target whose two halves are exchanged in the model's layer."""
    half = layer.rows // 2
    return Target(name, (Piece(layer, ((half, layer.rows), (0, half))),))
