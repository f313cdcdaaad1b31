"""Slots of a module tree, and the layers that replace the original ones there. Knows no adapters or files.

An original layer is never written. While it is adapted, another layer is in its slot, which shares its tensors or has
others.
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
    """W x + bias + B (A x), with the weight and bias of the layer that it replaces.

    The factors are not in the state dict. Adding their product to W x in place saves a pass over the output.
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
        """Use these tensors, without copies: (out, in), (out,), (rank, in) and (out, rank).

        They are stored directly in nn.Module's dictionaries, since its checks would take half the time of a swap.
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
    """A slot of the module tree: the parent and the child's name, the original layer, and its adapted replacement."""

    parent: nn.Module
    child: str
    plain: Any
    adapted: AdaptedLinear | None = None

    def put(self, layer: nn.Module) -> None:
        """Put a layer into the slot."""
        if self.parent._modules[self.child] is not layer:
            self.parent.register_module(self.child, layer)

    def rest(self) -> None:
        """Free the factors of the adapted layer; the layer itself is kept, since making 500 of them takes 10 ms."""
        if self.adapted is not None:
            self.adapted.activate(*self.pristine, *_NO_FACTORS)

    @property
    def pristine(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """The original layer's weight and bias; the bias is None where there is none."""
        parameters = self.plain._parameters
        return parameters["weight"], parameters.get("bias")


def slot_of(module: nn.Module, name: str) -> ModuleSlot:
    """The slot of this name; the layer in it counts as the original one."""
    parent, _, child = name.rpartition(".")
    holder = module.get_submodule(parent)
    return ModuleSlot(holder, child, holder.get_submodule(child))


def copy_with(layer: Any, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:  # noqa: ANN401 - any norm
    """A layer of the same class with another weight and bias; `bias` is None for layers without one."""
    other: nn.Module = copy.copy(layer)
    other.__dict__["_parameters"] = dict(layer._parameters) | {"weight": weight}
    if "bias" in layer._parameters:
        other.__dict__["_parameters"]["bias"] = bias
    return other
