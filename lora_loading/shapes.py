"""The names and sizes of a model's layers, which an adapter must fit. Holds no weights; only models need torch.

A component is named by its attribute in diffusers' pipelines, a layer by its path in the component.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

TRANSFORMER = "transformer"
CLIP = "text_encoder"
T5 = "text_encoder_2"
COMPONENTS = (TRANSFORMER, CLIP, T5)
Rows = tuple[tuple[int, int], ...]
"""Ranges of rows of a file's layer, first and one past the last, in the order in which a model's layer takes them."""


@dataclass(frozen=True)
class LayerShape:
    """A layer that an adapter may change: a linear layer, (out, in), or a norm, (size,)."""

    component: str
    name: str
    weight: tuple[int, ...]
    bias: bool

    @property
    def rows(self) -> int:
        """The size of the output."""
        return self.weight[0]


@dataclass(frozen=True)
class ModelShapes:
    """All layers of a model that adapters may change."""

    layers: tuple[LayerShape, ...]

    def __hash__(self) -> int:
        """Computed once, because the tables of names are cached by the shapes and looked up for each key of a file."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.layers)

    @cached_property
    def by_component(self) -> Mapping[str, Mapping[str, LayerShape]]:
        """The layers by component and name; every component has an entry."""
        table: dict[str, dict[str, LayerShape]] = {component: {} for component in COMPONENTS}
        for layer in self.layers:
            table[layer.component][layer.name] = layer
        return table

    def width(self, component: str) -> int | None:
        """The width of a component's embeddings, None if the model has no such component."""
        linear = (layer.weight[1] for layer in self.by_component[component].values() if len(layer.weight) == 2)
        return next(linear, None)


def components_of(pipeline: Any) -> dict[str, nn.Module]:  # noqa: ANN401 - diffusers ships no types
    """The parts of a FLUX pipeline that adapters may change, as far as it has them."""
    from torch import nn

    parts = {component: getattr(pipeline, component, None) for component in COMPONENTS}
    return {component: part for component, part in parts.items() if isinstance(part, nn.Module)}


def shapes_of(components: Mapping[str, nn.Module]) -> ModelShapes:
    """The shapes of all linear layers and norms of the components; `components_of` gives a pipeline's."""
    return ModelShapes(
        tuple(
            LayerShape(component, name, tuple(layer.weight.shape), getattr(layer, "bias", None) is not None)
            for component, module in components.items()
            for name, layer in adaptable_layers(module).items()
        )
    )


def adaptable_layers(module: nn.Module) -> dict[str, Any]:
    """The layers of a module that an adapter may change, by name: linear layers, and norms with a weight.

    A norm is recognised by its one-dimensional weight, because diffusers, transformers and torch have classes of their
    own for norms.
    """
    from torch import nn  # imported here, since it takes seconds

    def is_adaptable(layer: nn.Module) -> bool:
        if isinstance(layer, nn.Linear):
            return True
        weight = getattr(layer, "weight", None)
        return isinstance(weight, nn.Parameter) and weight.ndim == 1

    return {name: layer for name, layer in module.named_modules() if is_adaptable(layer)}
