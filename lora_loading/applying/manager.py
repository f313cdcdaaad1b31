"""The AdapterManager: a model's modules carry exactly the wanted stack of adapters and nothing else.

The pristine weights are never written. A layer that carries something gives its slot in the module tree to another
one that shares its weight:

    low-rank factors      stay beside the weight: AdaptedLinear
    any other change      a weight of its own, pristine + changes, worked out in float32

and takes its slot back afterwards, so a model without adapters is the plain model, to the bit and to the microsecond.
Every `apply` writes all slots afresh, whatever was there before; between its beginning and its end the state is
unknown, so what an exception or a cancellation leaves is mended by the next `apply`.

For compiled modules, whose graphs depend on which layers are adapted and on the ranks, `reserved_rank` gives all
linear layers the same room as soon as one of them needs any: two graphs serve all stacks, with and without adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_loading.applying.embeddings import BundledEmbeddings
from lora_loading.applying.slots import AdaptedLinear, ModuleSlot, copy_with, slot_of
from lora_loading.reading.adapter import LoraAdapter
from lora_loading.shapes import TRANSFORMER, ModelShapes, adaptable_layers, components_of, shapes_of
from lora_loading.updates import LowRank, Update, merged

Stack = Sequence[tuple[LoraAdapter, float]]
"""Adapters and their strengths; the order does not matter."""
StackKey = tuple[tuple[str, float], ...]
"""Digests and strengths: what a component carries."""


@dataclass
class LayerChanges:
    """What one layer is to carry, with strengths: factors that can stay beside its weight, and what cannot."""

    factors: list[tuple[LowRank, float]] = field(default_factory=list)
    weight: list[tuple[Update, float]] = field(default_factory=list)
    bias: list[tuple[Update, float]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """The rank of all factors together."""
        return sum(update.rank for update, _ in self.factors)

    @property
    def merging(self) -> list[tuple[Update, float]]:
        """All changes of the weight, for who merges them: see `updates.merged`."""
        return [*self.factors, *self.weight]


class ComponentAdapters:
    """Owns what one module carries; models that share the module share this too."""

    def __init__(
        self, name: str, module: nn.Module, reserved_rank: int = 0, words: BundledEmbeddings | None = None
    ) -> None:
        """Start with a plain module.

        Args:
            name: the component's name in diffusers' pipelines.
            module: a module without adapters.
            reserved_rank: 0 for a module that runs eagerly; else the rank for which a compiled one's graph has room.
            words: a text encoder's slot for the words that adapters bring along.
        """
        self.name = name
        self.module = module
        self.words = words
        self._reserved_rank = reserved_rank
        self._slots = {layer: slot_of(module, layer) for layer in adaptable_layers(module)}
        self._active_stack: StackKey | None = ()

    @property
    def active_stack(self) -> StackKey | None:
        """What the module carries, None while that is unknown."""
        return self._active_stack

    @torch.no_grad()
    def apply(self, stack: Stack) -> None:
        """Make the module carry exactly this stack, each adapter once; nothing is done where it does already."""
        own, wanted = own_part(stack, self.name)
        if self._active_stack == wanted:
            return
        self._active_stack = None
        changes = changes_by_layer(own, self.name)
        reserved_rank = self._reserved_rank_for(changes.values())
        nothing = LayerChanges()
        for name, slot in self._slots.items():
            slot.put(self._layer_for(slot, changes.get(name, nothing), reserved_rank))
        if self.words is not None:
            self.words.activate([e for adapter, _ in own for e in adapter.embeddings if e.component == self.name])
        self._active_stack = wanted

    def _reserved_rank_for(self, changes: Iterable[LayerChanges]) -> int:
        """The rank that every linear layer reserves; 0 where each takes the rank that it needs."""
        most = max((change.rank for change in changes), default=0)
        if not self._reserved_rank or not most:
            return 0
        return max(self._reserved_rank, 1 << (most - 1).bit_length())

    def _layer_for(self, slot: ModuleSlot, changes: LayerChanges, reserved_rank: int) -> nn.Module:
        pristine = weight, bias = slot.pristine
        if changes.weight:
            weight = self._changed(weight, changes.weight)
        if changes.bias and bias is not None:
            bias = self._changed(bias, changes.bias)
        rank = (reserved_rank or changes.rank) if isinstance(slot.plain, nn.Linear) else 0
        if rank:
            adapted = slot.adapted = slot.adapted or AdaptedLinear(slot.plain)
            adapted.activate(weight, bias, *_joined(changes.factors, rank, pristine[0]))
            return adapted
        slot.rest()
        changed = weight is not pristine[0] or bias is not pristine[1]
        return copy_with(slot.plain, weight, bias) if changed else slot.plain

    def _changed(self, pristine: nn.Parameter, changes: list[tuple[Update, float]]) -> nn.Parameter:
        new = merged(pristine, changes, lambda name: self._slots[name].pristine[0])
        return nn.Parameter(new.to(pristine.dtype), requires_grad=False)


class AdaptedComponent(Protocol):
    """Who makes one module carry a stack: `ComponentAdapters`, or the owner of a copy that is rewritten."""

    @property
    def name(self) -> str:
        """The component's name in diffusers' pipelines."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    @property
    def words(self) -> BundledEmbeddings | None:
        """Where a text encoder has the words that adapters bring along."""

    @property
    def active_stack(self) -> StackKey | None:
        """What the module carries, None while that is unknown."""

    def apply(self, stack: Stack) -> None:
        """Make the module carry exactly this stack, each adapter once; nothing is done where it does already."""


class AdapterManager:
    """The adapters of one model: its transformer's, and those of the text encoders that other models may share."""

    def __init__(self, components: Sequence[AdaptedComponent]) -> None:
        self.components = {component.name: component for component in components}
        self.shapes: ModelShapes = shapes_of({component.name: component.module for component in components})
        """What an adapter has to fit; for `read_adapter`."""

    def apply(self, stack: Stack) -> None:
        """Make the model carry exactly these adapters, each at its strength, and nothing else.

        The adapters must have been read for this model's `shapes`. A strength of 0 is none, and an adapter that stands
        there twice acts with the sum. Does nothing where the model carries the stack already. After an exception, of
        whatever kind, the next call puts everything right.

        Raises:
            ValueError: a strength is not finite.
        """
        for _, strength in stack:
            if not math.isfinite(strength):
                raise ValueError(f"the strength of an adapter is {strength}")
        joined = _joined_strengths(stack)
        for component in self.components.values():
            component.apply(joined)

    def prompt(self, component: str, prompt: str) -> str:
        """The prompt as a text encoder has to read it: with the words that the stack brings along made its tokens."""
        owner = self.components.get(component)
        return prompt if owner is None or owner.words is None else owner.words.expand(prompt)

    def active_stack(self, component: str) -> StackKey | None:
        """What a component carries, None while that is unknown; for keys of caches of its results."""
        return self.components[component].active_stack


def adapter_managers(pipelines: Mapping[str, Any], reserved_rank: int = 0) -> dict[str, AdapterManager]:
    """A manager for each model, by the names of the models' pipelines; modules that models share are managed once.

    Args:
        pipelines: a FLUX pipeline of each model, without adapters.
        reserved_rank: see `ComponentAdapters`; for the transformers, since text encoders are not compiled.
    """
    owners: dict[int, ComponentAdapters] = {}
    managers = {}
    for model, pipeline in pipelines.items():
        own = []
        for name, module in components_of(pipeline).items():
            if id(module) not in owners:
                owners[id(module)] = _owner(name, module, pipeline, reserved_rank)
            own.append(owners[id(module)])
        managers[model] = AdapterManager(own)
    return managers


def _owner(name: str, module: nn.Module, pipeline: Any, reserved_rank: int) -> ComponentAdapters:  # noqa: ANN401
    if name == TRANSFORMER:
        return ComponentAdapters(name, module, reserved_rank)
    tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
    return ComponentAdapters(name, module, words=BundledEmbeddings(module, tokenizer))


def _joined_strengths(stack: Stack) -> list[tuple[LoraAdapter, float]]:
    """The same adapter once, with the sum of its strengths; in an order of their own.

    Sums of floats depend on the order, and the same stack must give the same bytes whatever order was carried before.
    """
    strengths: dict[str, float] = {}
    for adapter, strength in stack:
        strengths[adapter.digest] = strengths.get(adapter.digest, 0.0) + strength
    adapters = {adapter.digest: adapter for adapter, _ in stack}
    return [(adapters[digest], strengths[digest]) for digest in sorted(strengths)]


def own_part(stack: Stack, component: str) -> tuple[Stack, StackKey]:
    """The adapters of a stack that change a component, and what names them."""
    own = [(adapter, strength) for adapter, strength in stack if strength and component in adapter.components]
    return own, tuple((adapter.digest, strength) for adapter, strength in own)


def changes_by_layer(stack: Stack, component: str) -> dict[str, LayerChanges]:
    """What the layers of a component are to carry, by the names of those that carry anything."""
    table: dict[str, LayerChanges] = {}
    for adapter, strength in stack:
        for layer in adapter.layers:
            if layer.component != component:
                continue
            changes = table.setdefault(layer.layer, LayerChanges())
            if layer.parameter == "bias":
                changes.bias.append((layer.update, strength))
            elif isinstance(layer.update, LowRank):
                changes.factors.append((layer.update, strength))
            else:
                changes.weight.append((layer.update, strength))
    return table


def _joined(factors: list[tuple[LowRank, float]], rank: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """All factors as one pair, (rank, in) and (out, rank), their strengths in B; room to spare holds zeros."""
    device, dtype = weight.device, weight.dtype
    parts_a = [update.a.to(device, dtype) for update, _ in factors]
    parts_b = [_scaled(update.b.to(device), update.scale * strength, dtype) for update, strength in factors]
    spare = rank - sum(part.shape[0] for part in parts_a)
    if spare:
        parts_a.append(weight.new_zeros(spare, weight.shape[1]))
        parts_b.append(weight.new_zeros(weight.shape[0], spare))
    if len(parts_a) == 1:
        return parts_a[0], parts_b[0]
    return torch.cat(parts_a), torch.cat(parts_b, dim=1)


def _scaled(factor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The factor times the scale, multiplied in float32 at least; the given factor is not written."""
    if scale == 1.0:
        return factor.to(dtype)
    return (factor.to(torch.promote_types(dtype, torch.float32)) * scale).to(dtype)
