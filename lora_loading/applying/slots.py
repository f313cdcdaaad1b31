"""Places in a module tree, and the layers that stand in for plain ones. Knows no adapters, files or names of parts.

A plain layer is never written: another layer that shares its tensors, or has others, takes its place and leaves it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_NO_FACTORS = (torch.empty(0, 0), torch.empty(0, 0))


class AdaptedLinear(nn.Linear):
    """W x + bias + B (A x), over the weight and bias of the layer that it stands for.

    Its factors are no part of the state dict. Adding them to the product in one call saves a pass over the output.
    """

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.register_buffer("lora_a", _NO_FACTORS[0], persistent=False)
        self.register_buffer("lora_b", _NO_FACTORS[1], persistent=False)
        self.train(base.training)

    def activate(self, weight: nn.Parameter, bias: nn.Parameter | None, lora_a: Tensor, lora_b: Tensor) -> None:
        """Take these tensors as they are: (out, in), (out,), (rank, in) and (out, rank).

        They are written where nn.Module keeps them, past its checks, which would take half of a swap's time.
        """
        self._parameters["weight"], self._parameters["bias"] = weight, bias
        self._buffers["lora_a"], self._buffers["lora_b"] = lora_a, lora_b

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = functional.linear(x, self.weight, self.bias)
        beside = functional.linear(x, self.lora_a)  # (..., rank)
        y.view(-1, self.out_features).addmm_(beside.reshape(-1, beside.shape[-1]), self.lora_b.t())
        return y


@dataclass
class ModuleSlot:
    """A place in the module tree: who holds it, the plain layer, and the one that stands for it with factors."""

    parent: nn.Module
    child: str
    plain: Any
    adapted: AdaptedLinear | None = None

    def put(self, layer: nn.Module) -> None:
        """Give the place to a layer."""
        if self.parent._modules[self.child] is not layer:
            self.parent.register_module(self.child, layer)

    def rest(self) -> None:
        """Free what the layer with factors holds; the layer itself is kept, since making 500 of them takes 10 ms."""
        if self.adapted is not None:
            self.adapted.activate(*self.pristine, *_NO_FACTORS)

    @property
    def pristine(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """The plain layer's weight and bias; some norms have no such thing as a bias."""
        parameters = self.plain._parameters
        return parameters["weight"], parameters.get("bias")


def slot_of(module: nn.Module, name: str) -> ModuleSlot:
    """The place of the layer that has this name now; it counts as the plain one."""
    parent, _, child = name.rpartition(".")
    holder = module.get_submodule(parent)
    return ModuleSlot(holder, child, holder.get_submodule(child))


def copy_with(layer: Any, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:  # noqa: ANN401 - any norm
    """A layer of the same class with another weight; `bias` is None for norms that have no such thing."""
    other: nn.Module = copy.copy(layer)
    other.__dict__["_parameters"] = dict(layer._parameters) | {"weight": weight}
    if "bias" in layer._parameters:
        other.__dict__["_parameters"]["bias"] = bias
    return other
