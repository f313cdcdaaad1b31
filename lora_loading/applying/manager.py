"""The AdapterManager: a model's modules carry exactly the wanted stack of adapters and nothing else.

The pristine weights are never written. In the module tree, an adapted layer is replaced by another one:

    low-rank factors      AdaptedLinear, which shares the weight and keeps the factors beside it
    any other change      a layer with a new weight, pristine + changes, computed in float32

Without adapters the original modules are in place: bit-identical output, no overhead. Every `apply` fills all slots
anew, whatever they held. One that fails puts the original modules back, since the layers that it had made take memory
which others need: after a lack of memory, all of it. While it runs, the state is unknown, so that a second exception or
cancellation leaves nothing that the next `apply` does not repair.

The graphs of compiled modules depend on which layers are adapted, and on their ranks. With `reserved_rank`, all linear
layers are adapted, with that rank, as soon as one is: two graphs then serve all stacks, with and without adapters.
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
from lora_loading.applying.upload import uploaded
from lora_loading.reading.adapter import LoraAdapter, Stack
from lora_loading.shapes import TRANSFORMER, ModelShapes, adaptable_layers, components_of, shapes_of
from lora_loading.updates import Gains, LowRank, Update, merged

StackKey = tuple[tuple[str, float], ...]
"""The digest and scale of each adapter that a component carries."""


@dataclass
class LayerChanges:
    """The changes of one layer with their scales: factors that can stay beside the weight, and changes that cannot."""

    factors: list[tuple[LowRank, float]] = field(default_factory=list)
    weight: list[tuple[Update, float]] = field(default_factory=list)
    bias: list[tuple[Update, float]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """The rank of all factors together."""
        return sum(update.rank for update, _ in self.factors)

    @property
    def merging(self) -> list[tuple[Update, float]]:
        """All changes of the weight, for `updates.merged`."""
        return [*self.factors, *self.weight]


class ComponentAdapters:
    """Owns the adapters in one module; models that share the module share this object."""

    def __init__(
        self, name: str, module: nn.Module, reserved_rank: int = 0, words: BundledEmbeddings | None = None
    ) -> None:
        """Take over a module without adapters.

        Args:
            name: the component's name in diffusers' pipelines.
            module: a module without adapters.
            reserved_rank: 0 for a module that runs eagerly; for a compiled one, the least rank of its adapted layers.
            words: for a text encoder, the trigger words that adapters bring along.
        """
        self.name = name
        self.module = module
        self.words = words
        self._reserved_rank = reserved_rank
        self._slots = {layer: slot_of(module, layer) for layer in adaptable_layers(module)}
        self._active_stack: StackKey | None = ()
        self._gains = Gains()

    @property
    def active_stack(self) -> StackKey | None:
        """What the module carries, None while that is unknown."""
        return self._active_stack

    @torch.no_grad()
    def apply(self, stack: Stack) -> None:
        """Make the module carry exactly this stack, each adapter once; nothing is done where it does already.

        After an exception it carries no adapter.
        """
        own, wanted = own_part(stack, self.name)
        if self._active_stack == wanted:
            return
        self._active_stack = None
        try:
            self._fill(own)
        except BaseException:
            self._fill([])
            self._active_stack = ()
            raise
        self._active_stack = wanted

    def _fill(self, own: Stack) -> None:
        """Fill every slot, and activate the words; without adapters nothing is allocated."""
        device = next(self.module.parameters()).device
        changes = changes_by_layer(own if device.type == "cpu" else uploaded(own, self.name, device), self.name)
        reserved_rank = self._reserved_rank_for(changes.values())
        nothing = LayerChanges()
        for name, slot in self._slots.items():
            slot.put(self._layer_for(slot, changes.get(name, nothing), reserved_rank))
        if self.words is not None:
            self.words.activate([e for adapter, _ in own for e in adapter.embeddings if e.component == self.name])

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
        new = merged(pristine, changes, lambda name: self._slots[name].pristine[0], self._gains)
        return nn.Parameter(new.to(pristine.dtype), requires_grad=False)


class AdaptedComponent(Protocol):
    """Makes one module carry a stack: `ComponentAdapters`, or the owner of a copy that is rewritten."""

    @property
    def name(self) -> str:
        """The component's name in diffusers' pipelines."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    @property
    def words(self) -> BundledEmbeddings | None:
        """For a text encoder, the trigger words that adapters bring along."""

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
        """Make the model carry exactly these adapters, each at its scale, and nothing else.

        The adapters must have been read for this model's `shapes`. An adapter at scale 0 is left out, and one that is
        given twice acts at the sum of its scales. Nothing is done if the model carries the stack already. After an
        exception of any kind, the component where it was raised carries no adapter; should a second one keep it from
        that, the next call restores a known state.

        Raises:
            ValueError: a scale is not finite.
        """
        for _, scale in stack:
            if not math.isfinite(scale):
                raise ValueError(f"the scale of an adapter is {scale}")
        joined = _joined_scales(stack)
        for component in self.components.values():
            component.apply(joined)

    def prompt(self, component: str, prompt: str) -> str:
        """The prompt for a text encoder, with the words that the stack brings along replaced by reserved tokens."""
        owner = self.components.get(component)
        return prompt if owner is None or owner.words is None else owner.words.expand(prompt)

    def active_stack(self, component: str) -> StackKey | None:
        """What a component carries, None while that is unknown; part of the keys under which its results are cached."""
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


def _joined_scales(stack: Stack) -> list[tuple[LoraAdapter, float]]:
    """Each adapter once, with the sum of its scales, ordered by digest.

    Sums of floats depend on their order, and the same adapters must give the same bytes in whatever order they come.
    """
    scales: dict[str, float] = {}
    for adapter, scale in stack:
        scales[adapter.digest] = scales.get(adapter.digest, 0.0) + scale
    adapters = {adapter.digest: adapter for adapter, _ in stack}
    return [(adapters[digest], scales[digest]) for digest in sorted(scales)]


def own_part(stack: Stack, component: str) -> tuple[Stack, StackKey]:
    """The adapters of a stack that change a component, and the key of that part of the stack."""
    own = [(adapter, scale) for adapter, scale in stack if scale and component in adapter.components]
    return own, tuple((adapter.digest, scale) for adapter, scale in own)


def changes_by_layer(stack: Stack, component: str) -> dict[str, LayerChanges]:
    """The changes of a component's layers, by the names of the layers that have any."""
    table: dict[str, LayerChanges] = {}
    for adapter, scale in stack:
        for layer in adapter.layers:
            if layer.component != component:
                continue
            changes = table.setdefault(layer.layer, LayerChanges())
            if layer.parameter == "bias":
                changes.bias.append((layer.update, scale))
            elif isinstance(layer.update, LowRank):
                changes.factors.append((layer.update, scale))
            else:
                changes.weight.append((layer.update, scale))
    return table


def _joined(factors: list[tuple[LowRank, float]], rank: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """All factors as one pair, (rank, in) and (out, rank), with the scales in B; unused rank is filled with zeros."""
    device, dtype = weight.device, weight.dtype
    parts_a = [update.a.to(device, dtype) for update, _ in factors]
    parts_b = [_scaled(update.b.to(device), update.scale * scale, dtype) for update, scale in factors]
    spare = rank - sum(part.shape[0] for part in parts_a)
    if spare:
        parts_a.append(weight.new_zeros(spare, weight.shape[1]))
        parts_b.append(weight.new_zeros(weight.shape[0], spare))
    if len(parts_a) == 1:
        return parts_a[0], parts_b[0]
    return torch.cat(parts_a), torch.cat(parts_b, dim=1)


def _scaled(factor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The factor times the scale, multiplied in float32 or better; the given factor is not written."""
    if scale == 1.0:
        return factor.to(dtype)
    return (factor.to(torch.promote_types(dtype, torch.float32)) * scale).to(dtype)
