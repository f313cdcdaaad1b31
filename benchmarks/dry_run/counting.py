"""Count what eager code asks of the device: kernels, bytes, FLOP, waits, copies, and the most memory at any time."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.plan import RANK

NUMBERS = count(1)
ATTENTION, CONVOLUTION, FP8, BF16 = "attention", "convolution", "fp8", "bf16"
VIEWS = frozenset(
    [
        "view",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "split",
        "split_with_sizes",
        "unbind",
        "detach",
        "alias",
        "as_strided",
        "_unsafe_view",
        "unflatten",
        "chunk",
        "lift_fresh",
        "empty",
        "empty_strided",
        "empty_like",
        "new_empty",
        "new_empty_strided",
        "_reshape_alias",
        "reshape",
        "view_as",
        "diagonal",
        "unfold",
        "narrow",
        "movedim",
        "size",
        "sym_size",
        "stride",
        "is_pinned",
        "device",
    ]
)
"""Operators that start no kernel."""
CACHED_ROW = 3072
"""Numbers of a row of a weight that is read twice, the second time from the cache: 16 rows are 98 KB then. Were they
read from memory, a change of all layers would move 17 GB more."""
TENSORS_A_LAUNCH = 128
"""Of a `_foreach` operator over pairs: 64 pairs."""
TENSOR_PATHS = ("/torch/", "benchmarks/dry_run", "<", "contextlib", "torchao")
"""Parts of the paths of code that is not called a caller."""


@dataclass(frozen=True)
class Product:
    """A matrix product, a convolution or an attention, as the model of time takes it."""

    kind: str
    flop: float
    moved_bytes: int


@dataclass
class Counts:
    """What was counted. Callers are named as `file:function`."""

    kernels: int = 0
    """All launches, products among them."""
    products: Counter[Product] = field(default_factory=Counter)
    elementwise_bytes: int = 0
    """Read and written by kernels that are no products."""
    syncs: Counter[str] = field(default_factory=Counter)
    """Waits for the device, by caller."""
    copies: Counter[str] = field(default_factory=Counter)
    """Copies between host and device, by direction and caller."""
    copied_bytes: int = 0
    peak_bytes: int = 0
    """The most that was allocated on the device."""

    @property
    def flop(self) -> float:
        """Of all products."""
        return sum(product.flop * count for product, count in self.products.items())

    @property
    def moved_bytes(self) -> int:
        """Read and written by all kernels."""
        return self.elementwise_bytes + sum(p.moved_bytes * count for p, count in self.products.items())

    @property
    def launches_beside_products(self) -> int:
        """Kernels that are no products."""
        return self.kernels - sum(self.products.values())


class DeviceCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operator on device tensors while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.most_bytes = 0
        """Since the beginning; `Counts.peak_bytes` is since `restart`."""
        self.counts = Counts()
        self._paused = 0
        self._numbers = WeakIdKeyDictionary()
        self._sizes: dict[int, int] = {}
        """Bytes of the live storages, by their numbers."""

    def restart(self) -> Counts:
        """Begin to count anew; returns the counts that grow from now on."""
        self.counts = Counts(peak_bytes=self.live_bytes)
        return self.counts

    def on_sync(self, what: str) -> None:
        """Note a wait for the device that no operator shows."""
        self.counts.syncs[f"{what} in {_caller()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on fake tensors, and count it."""
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name == "_local_scalar_dense":
            return self._scalar(args[0])
        if name == "scaled_dot_product_attention" and args[0].device.type == "cuda":
            return self._attention(*args[:3])
        if _has_parts(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        for tensor in outputs:
            self._note_memory(tensor)
        self._note_copy(name, inputs, outputs)
        written = outputs or (inputs if func._schema.is_mutable else [])
        if any(tensor.device.type == "cuda" for tensor in written) and _starts_a_kernel(func, name):
            self._note_kernel(func, name, args, kwargs, inputs, result)
        return result

    def _scalar(self, tensor: Tensor) -> bool | float | int:
        """A value on the host: true, 0.5 or 0."""
        if tensor.device.type == "cuda":
            self.counts.syncs[_caller()] += 1
        return True if tensor.dtype == torch.bool else 0.5 if tensor.is_floating_point() else 0

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One kernel, as cuDNN's: scores are not stored."""
        out = torch.empty_like(query)
        self._note_memory(out)
        flop = 4.0 * query.numel() * key.shape[2]
        moved = 4 * query.numel() * query.element_size()
        self._add(Product(ATTENTION, flop, moved))
        return out

    def _note_memory(self, tensor: Tensor) -> None:
        for part in _plain(tensor):
            storage = part.untyped_storage()
            if part.device.type == "cuda" and storage not in self._numbers:
                number = self._numbers[storage] = next(NUMBERS)
                weakref.finalize(storage, self._resized, number, 0)
                self._resized(number, storage.nbytes())

    def _resized(self, number: int, size_bytes: int) -> None:
        self.live_bytes += size_bytes - self._sizes.pop(number, 0)
        if size_bytes:
            self._sizes[number] = size_bytes
        self.counts.peak_bytes = max(self.counts.peak_bytes, self.live_bytes)
        self.most_bytes = max(self.most_bytes, self.live_bytes)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, count, and note storages that are resized, which no operator shows."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size_bytes: int) -> Any:
            if storage in self._numbers:
                self._resized(self._numbers[storage], size_bytes)
            return resize(storage, size_bytes)

        with mock.patch.object(torch.UntypedStorage, "resize_", resize_), self:
            yield

    @contextmanager
    def paused_within(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Within, what these modules do is not counted, but for their products."""

        def pause(*_: Any) -> None:
            self._paused += 1

        def resume(*_: Any) -> None:
            self._paused -= 1

        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_pre_hook(pause).remove)
                stack.callback(module.register_forward_hook(resume).remove)
            yield

    def _note_copy(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if name not in ("_to_copy", "copy_", "_copy_from") or not outputs:
            return
        source, target = inputs[0 if name == "_to_copy" else 1], outputs[0]
        if source.device.type != target.device.type:
            direction = "to the device" if target.device.type == "cuda" else "to the host"
            self.counts.copies[f"{direction} in {_caller()}"] += 1
            self.counts.copied_bytes += source.numel() * source.element_size()

    def _note_kernel(self, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], result: Any) -> None:
        moved = sum(map(_touched_bytes, [*inputs, *_tensors(result)]))
        if name == "requantise":  # reads long rows twice, and of all factors a layer's
            weight, factors, table = args[2], args[3], args[4]
            moved += _touched_bytes(weight) * (weight.shape[1] > CACHED_ROW) - _touched_bytes(factors)
            moved += 2 * len(table) * RANK * sum(weight.shape) * factors.element_size()
        formula = flop_registry.get(func._overloadpacket)
        if name == "_scaled_mm":
            self._add(Product(FP8, 2.0 * inputs[0].numel() * inputs[1].shape[1], moved))
        elif name == "two_products":  # `engine.lean`'s operator: text's and image's rows, each with its matrix
            self._add_two(args)
        elif formula is not None:
            flop = float(formula(*args, **kwargs, out_val=result))
            self._add(Product(CONVOLUTION if "convolution" in name else BF16, flop, moved))
        elif not self._paused:
            self.counts.kernels += -(-len(inputs) // TENSORS_A_LAUNCH) if name.startswith("_foreach") else 1
            self.counts.elementwise_bytes += moved

    def _add_two(self, args: Any) -> None:
        states, text, matrices = args[0], args[2], (args[3], args[6])
        for rows, matrix in zip((text, len(states) - text), matrices, strict=True):
            outer, inner = matrix.shape
            moved = rows * inner + matrix.numel() + 2 * rows * outer
            self._add(Product(FP8, 2.0 * rows * inner * outer, moved))

    def _add(self, product: Product) -> None:
        self.counts.kernels += not self._paused
        self.counts.products[product] += 1


def _has_parts(func: Any) -> bool:
    """In inference mode an operator that is made of others arrives whole, unlike on a device's way."""
    known = func in flop_registry or func._overloadpacket in flop_registry
    return torch.is_inference_mode_enabled() and func is not torch.ops.prim.device.default and not known


def _starts_a_kernel(func: Any, name: str) -> bool:
    only_views = all(r.alias_info is not None for r in func._schema.returns) and not func._schema.is_mutable
    return name not in VIEWS and not only_views


def _tensors(tree: Any) -> list[Tensor]:
    return [item for item in tree_iter(tree) if isinstance(item, Tensor)]


def _touched_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _plain(tensor: Any) -> Iterator[Tensor]:
    """The tensor, or those that an fp8 weight is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def _caller() -> str:
    """The innermost function outside torch and this package, as `file:function`."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename.replace("\\", "/")
        if not any(part in path for part in TENSOR_PATHS):
            return f"{'/'.join(path.split('/')[-2:])}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
