"""One fp8 copy of the transformers' blocks, rewritten in place for each model and stack of adapters.

The pristine (original) weights are never written. A layer of the working copy is quantise(W + sum of scale * delta), so
a LoRA costs no time per step, every kind of change can be applied, and removing it is exact: the pristine weights are
quantised again. Merging a change into weights that are already fp8 would lose most of it.

All models share one copy of the blocks, because FLUX.1 [dev] and [schnell] differ in shape only in their embedders. A
change of the stack rewrites the layers that either stack touches, a change of the model rewrites all layers. The
tensors keep their addresses, so compiled graphs stay valid.

The linear layers of the blocks are fp8. Embedders, the last projection, biases and norms keep their type. Layers that
`engine.lean_transformer` runs as one lie one after another in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torchao.quantization import Float8Tensor

from engine.factors import Factors, joined_factors
from engine.fp8 import FP8_MULTIPLE, Rewrite, Scheme, write_fp8
from engine.lean_transformer import LeanBlocks, LeanTransformer, joined_layers
from lora_loading.applying.embeddings import BundledEmbeddings
from lora_loading.applying.manager import LayerChanges, StackKey, changes_by_layer, own_part
from lora_loading.applying.upload import uploaded
from lora_loading.reading.adapter import Stack
from lora_loading.shapes import TRANSFORMER, adaptable_layers
from lora_loading.updates import Gains, merged

BLOCKS = ("transformer_blocks", "single_transformer_blocks")
NO_CHANGES = LayerChanges()


@dataclass
class _Layer:
    """A layer of the working copy, and the pristine weight and bias that it is written from."""

    layer: Any
    weight: nn.Parameter
    bias: nn.Parameter | None
    fp8: bool


@dataclass
class _State:
    """The model and stack that the working copy holds, and the layers that differ from the pristine ones."""

    model: str
    stack: StackKey
    touched: frozenset[str] = field(default_factory=frozenset)
    biased: frozenset[str] = field(default_factory=frozenset)
    """Those of them whose biases differ."""


class WorkingCopy:
    """The fp8 blocks that all models share, and a transformer for each model that contains them."""

    def __init__(
        self,
        pristine: Mapping[str, FluxTransformer2DModel],
        scheme: Scheme,
        device: torch.device,
        rewrite: Rewrite | None = None,
    ) -> None:
        """Copy and quantise; the copy then holds the first model without adapters.

        Args:
            pristine: the transformers by model name, without adapters; on any device.
            scheme: how the blocks' weights are stored.
            device: where the copy is made.
            rewrite: what quantises a weight with its low-rank changes at once, where something does: see
                `fp8.choose_rewrite`.

        Raises:
            ValueError: the models' blocks differ in their layers.
        """
        self._scheme = scheme
        self._device = device
        self._rewrite = rewrite
        self.transformers: dict[str, FluxTransformer2DModel] = {}
        """A transformer in fp8 for each model; only the one that was written last has the right weights."""
        self._layers: dict[str, dict[str, _Layer]] = {}
        blocks: dict[str, nn.Module] = {}
        for name, transformer in pristine.items():
            shell = copy.copy(transformer)
            shell.__dict__["_modules"] = {
                part: blocks[part] if part in blocks else self._copied(module, fp8=part in BLOCKS)
                for part, module in transformer.named_children()
            }
            blocks = {part: shell.get_submodule(part) for part in BLOCKS}
            self.transformers[name] = shell
            self._layers[name] = _pairs(shell, transformer)
        for group in joined_layers(next(iter(self.transformers.values()))):
            _lay_out_together(group)
        lean = LeanBlocks(next(iter(self.transformers.values())), scheme.dynamic)
        self.lean: dict[str, LeanTransformer] = {n: LeanTransformer(t, lean) for n, t in self.transformers.items()}
        """What runs the transformers' weights, in few and large steps."""
        self._storages = _storages_of(self._fp8_weights())
        self._state: _State | None = _State(next(iter(pristine)), ())
        self._gains = {name: Gains() for name in pristine}

    def _copied(self, module: nn.Module, *, fp8: bool) -> nn.Module:
        """A copy of a module on the device; with `fp8`, its large linear layers are quantised."""
        matrices = {id(m.weight) for m in module.modules() if fp8 and _fits_fp8(m)}
        memo = {id(p): nn.Parameter(self._copy_of(p, id(p) in matrices), False) for p in module.parameters()}
        return copy.deepcopy(module, memo)

    def _copy_of(self, parameter: nn.Parameter, fp8: bool) -> Tensor:
        here = parameter.detach().to(self._device)
        return self._scheme.quantise(here) if fp8 else here.clone()

    def active_stack(self, model: str) -> StackKey | None:
        """The stack that the copy holds for this model; None if it holds another model, or is unknown."""
        return self._state.stack if self._state is not None and self._state.model == model else None

    def release(self) -> None:
        """Free the fp8 weights' memory; the next `write` allocates it again and writes every layer."""
        self._state = None
        for storage, _ in self._storages:
            storage.resize_(0)

    def _fp8_weights(self) -> Iterator[Float8Tensor]:
        return (pair.layer.weight for pair in next(iter(self._layers.values())).values() if pair.fp8)

    @torch.no_grad()
    def write(self, model: str, stack: Stack, key: StackKey) -> None:
        """Write this model with exactly these adapters into the copy; `key` identifies the stack."""
        if self.active_stack(model) == key:
            return
        layers = self._layers[model]
        if self._rewrite is not None:
            stack = uploaded(stack, TRANSFORMER, self._device)
        changes = changes_by_layer(stack, TRANSFORMER)
        before = self._state
        if before is None:  # the memory may have been released
            for storage, size_bytes in self._storages:
                storage.resize_(size_bytes)
        names = before.touched | changes.keys() if before and before.model == model else layers.keys()
        same_model = before is not None and before.model == model
        biased = frozenset(name for name, change in changes.items() if change.bias)
        biases = before.biased | biased if before and same_model else names
        self._state = None
        quick = joined_factors(changes, self._device) if self._rewrite is not None else None
        copies: list[tuple[Tensor, Tensor]] = []
        for name in names:
            own = changes.get(name, NO_CHANGES)
            if not layers[name].fp8 and not own.merging:
                copies.append((layers[name].layer.weight, layers[name].weight))
            elif not self._write_quickly(layers[name], name, own, quick):
                self._write_weight(layers, name, own, self._gains[model])
            if name in biases and layers[name].bias is not None:
                copies.append((layers[name].layer.bias, self._bias(layers, name, own)))
        if copies:
            ours, theirs = zip(*copies, strict=True)
            torch._foreach_copy_(list(ours), [given.to(self._device, non_blocking=True) for given in theirs])
        self._state = _State(model, key, frozenset(changes), biased)

    def _write_quickly(self, pair: _Layer, name: str, changes: LayerChanges, factors: Factors | None) -> bool:
        """Write a weight in one pass; False where that cannot be done."""
        if self._rewrite is None or factors is None or not pair.fp8 or (changes.merging and name not in factors.rows):
            return False
        target, weight = pair.layer.weight, pair.weight.to(self._device, non_blocking=True)
        self._rewrite(target.qdata, target.scale, weight, *factors.of(name))
        return True

    def _bias(self, layers: Mapping[str, _Layer], name: str, changes: LayerChanges) -> Tensor:
        """A layer's bias with its changes."""
        bias: Any = layers[name].bias
        here: Tensor = bias.detach().to(self._device, non_blocking=True)
        if not changes.bias:
            return here
        changed = merged(here, changes.bias, lambda other: layers[other].weight.to(self._device))
        return changed.to(here.dtype)

    def _write_weight(self, layers: Mapping[str, _Layer], name: str, changes: LayerChanges, gains: Gains) -> None:
        pair = layers[name]

        def weight_of(other: str) -> Tensor:
            return layers[other].weight.to(self._device)

        weight = pair.weight.to(self._device, non_blocking=True)
        if changes.merging:
            weight = merged(weight, changes.merging, weight_of, gains)
        if pair.fp8:
            write_fp8(pair.layer.weight, weight)
        else:
            pair.layer.weight.copy_(weight)


def _lay_out_together(layers: Sequence[Any]) -> None:
    """Move the weights and biases of layers into one tensor each, one after another; the layers keep views."""
    weights = [layer.weight for layer in layers]
    if isinstance(weights[0], Float8Tensor):
        joined = zip(weights, _joined([w.qdata for w in weights]), _joined([w.scale for w in weights]), strict=True)
        for weight, data, scale in joined:
            weight.qdata, weight.scale = data, scale
    else:
        _move(weights)
    if getattr(layers[0], "bias", None) is not None:
        _move([layer.bias for layer in layers])


def _move(parameters: Sequence[nn.Parameter]) -> None:
    for parameter, part in zip(parameters, _joined([p.data for p in parameters]), strict=True):
        parameter.data = part


def _joined(parts: Sequence[Tensor]) -> list[Tensor]:
    """The parts as views of one new tensor, joined in the first dimension."""
    rows = [part.shape[0] for part in parts]
    whole = torch.empty(sum(rows), *parts[0].shape[1:], dtype=parts[0].dtype, device=parts[0].device)
    views = list(torch.split(whole, rows))
    for view, part in zip(views, parts, strict=True):
        view.copy_(part)
    return views


def _storages_of(weights: Iterable[Float8Tensor]) -> list[tuple[torch.UntypedStorage, int]]:
    """The memory of fp8 weights, each with its bytes; what several share comes once."""
    storages = {s._cdata: s for s in (weight.qdata.untyped_storage() for weight in weights)}
    return [(storage, storage.nbytes()) for storage in storages.values()]


def _fits_fp8(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and not any(side % FP8_MULTIPLE for side in layer.weight.shape)


def _pairs(shell: nn.Module, pristine: nn.Module) -> dict[str, _Layer]:
    ours, theirs = adaptable_layers(shell), adaptable_layers(pristine)
    if [(n, layer.weight.shape) for n, layer in ours.items()] != [
        (n, layer.weight.shape) for n, layer in theirs.items()
    ]:
        raise ValueError("the models' blocks differ in their layers, so they cannot share one working copy")
    return {
        name: _Layer(
            ours[name],
            layer.weight,
            getattr(layer, "bias", None),
            name.startswith(BLOCKS) and _fits_fp8(layer),
        )
        for name, layer in theirs.items()
    }


class WorkingCopyAdapters:
    """One model's view of the working copy: an `AdaptedComponent` for its `AdapterManager`."""

    def __init__(self, model: str, working_copy: WorkingCopy) -> None:
        self.name = TRANSFORMER
        self.module: nn.Module = working_copy.transformers[model]
        self.words: BundledEmbeddings | None = None
        self._model = model
        self._copy = working_copy

    @property
    def active_stack(self) -> StackKey | None:
        """The stack that the copy holds for this model; None if it holds another model, or is unknown."""
        return self._copy.active_stack(self._model)

    def apply(self, stack: Stack) -> None:
        """Write this model with exactly this stack into the copy, if it does not hold it already."""
        self._copy.write(self._model, *own_part(stack, self.name))
