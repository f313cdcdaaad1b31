"""A CUDA device that is not there: torch answers as if it were, and tensors on it have shapes and types but no memory.

Within `fake_device` real code runs at full size in seconds. What it cannot show: numbers, speed, failures of launches,
workspaces of cuBLAS and cuDNN, fragmentation, threads.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils._triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.cpp_extension import include_paths

DEVICE = torch.device("cuda", 0)
HERE = Path(__file__).parent
BUILT = HERE.parents[1] / "build" / "dry-run"
CUDA = "13.0"
GENERATOR = torch.Generator


@dataclass(frozen=True)
class Card:
    """A device as torch describes it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    processors: int


H100 = Card("NVIDIA H100 80GB HBM3", 85_024_112_640, (9, 0), 132)
L40S = Card("NVIDIA L40S", 47_700_000_000, (8, 9), 142)
RTX_4090 = Card("NVIDIA GeForce RTX 4090", 25_200_000_000, (8, 9), 128)
CARDS = (H100, L40S, RTX_4090)


class HostGenerator:
    """Stands for `torch.Generator`: the fake device has none, so random numbers are drawn by the CPU's."""

    def __new__(cls, device: object = "cpu") -> Any:
        """A generator of the CPU."""
        return GENERATOR("cpu")


class HostValues(TorchFunctionMode):
    """Gives some values where a tensor's are asked for, and tells `on_sync` of calls that would wait for the device."""

    def __init__(self, on_sync: Callable[[str], None]) -> None:
        super().__init__()
        self._on_sync = on_sync

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer for `torch.tensor` of tensors, and for `Tensor.numpy`."""
        if func is torch.tensor and isinstance(args[0], list) and any(isinstance(item, Tensor) for item in args[0]):
            if any(item.device.type == "cuda" for item in args[0]):
                self._on_sync("torch.tensor of device tensors")
            return torch.zeros(len(args[0]), dtype=args[0][0].dtype)
        if func is Tensor.numpy:
            return np.zeros(tuple(args[0].shape), np.uint8)
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_device(card: Card = H100) -> Iterator[None]:
    """Within, torch has one CUDA device, `card`. Weights and inputs have to be made inside `fake_tensors`."""
    _load_guard()
    with ExitStack() as stack:
        for name, value in _answers(card).items():
            stack.enter_context(mock.patch(name, value))
        for name, value in _for_the_compiler(card).items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(value)))
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        worker = CudaInterface.Worker
        stack.enter_context(
            mock.patch.object(worker, "get_device_properties", staticmethod(lambda _=None: _properties(card)))
        )
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        _forget_answers()
        stack.callback(_forget_answers)
        yield


@contextmanager
def fake_tensors(on_sync: Callable[[str], None] | None = None) -> Iterator[None]:
    """Within, new tensors are fake. With `on_sync`, `HostValues` are given too, which torch.compile cannot trace."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if on_sync is not None:
            stack.enter_context(HostValues(on_sync))
        yield


def _load_guard() -> None:
    """Compile and load `guard.cpp`, once; builds of torch for CUDA have a guard of their own."""
    if torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return
    library = BUILT / f"guard-{torch.__version__}-{sys.version_info.minor}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        torch_libraries = Path(torch.__file__).parent / "lib"
        options = ["-O1", "-shared", "-fPIC", "-std=c++20", *(f"-I{folder}" for folder in include_paths())]
        links = [f"-L{torch_libraries}", "-lc10", f"-Wl,-rpath,{torch_libraries}", "-o", str(library)]
        subprocess.run(["g++", *options, str(HERE / "guard.cpp"), *links], check=True)
    ctypes.CDLL(str(library))


def _properties(card: Card) -> SimpleNamespace:
    return SimpleNamespace(
        name=card.name, major=card.capability[0], minor=card.capability[1], total_memory=card.memory_bytes,
        multi_processor_count=card.processors, warp_size=32, max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536, gcnArchName="", L2_cache_size=50 * 2**20, shared_memory_per_block_optin=232448,
    )  # fmt: skip


def _answers(card: Card) -> dict[str, Any]:
    """What torch says of the device. Random numbers come from the CPU's generator."""
    return {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.set_device": lambda _: None,
        "torch.cuda._exchange_device": lambda _: 0,
        "torch.cuda._maybe_exchange_device": lambda _: 0,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.get_device_capability": lambda _=None: card.capability,
        "torch.cuda.get_device_properties": lambda _=None: _properties(card),
        "torch.cuda.get_device_name": lambda _=None: card.name,
        "torch.cuda.get_rng_state": lambda _=None: torch.empty(16, dtype=torch.uint8, device="cpu"),
        "torch.cuda.set_rng_state": lambda *_, **__: None,
        "torch.cuda.synchronize": lambda _=None: None,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.memory_allocated": lambda _=None: 0,
        "torch.cuda.mem_get_info": lambda _=None: (card.memory_bytes, card.memory_bytes),
        "torch.version.cuda": CUDA,
        "torch.Generator": HostGenerator,
    }


def _for_the_compiler(card: Card) -> dict[str, Callable[..., Any]]:
    return {
        "get_device_properties": lambda _=None: _properties(card),
        "get_compute_capability": lambda _=None: 10 * card.capability[0] + card.capability[1],
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "set_device": lambda _: None,
        "exchange_device": lambda _: 0,
        "maybe_exchange_device": lambda _: 0,
        "synchronize": lambda _=None: None,
        "get_raw_stream": lambda _: 0,
        "memory_allocated": lambda _=None: 0,
        "is_bf16_supported": lambda *_, **__: True,
    }


def _forget_answers() -> None:
    """torch keeps whether there is Triton and a device for it; within and after, that is another answer."""
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
