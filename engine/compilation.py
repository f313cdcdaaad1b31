"""Compile the transformers' blocks once, for every size, model and LoRA, and keep the result between starts.

Blocks are compiled, not the whole: FLUX's 57 are of two classes, so three graphs serve all of them, in a sixth of the
time and at the same speed (published figures: 67 s became 9.6 s). Three, since the first single block reads its states
from two tensors and the others from two parts of one. `dynamic=True` makes sizes variables from the first call on.
A graph belongs to the class and takes weights as inputs: models of the same widths, transformers that share blocks and
the three modes share it. Other graphs come of other types of weights (fp8), and of adapters beside the weights: see
`reserved_rank` in `lora_loading.applying.manager`. CUDA graphs, the modes "reduce-overhead" and "max-autotune", are no
choice: they hold one size each, and not between threads.

What makes a graph too narrow, so that another size compiles anew:
- Two sizes that are equal in the first call are taken for one variable. Image tokens, text tokens, both together,
  the width and a head's width must all differ there. An image of 1024x1024 gives 4096, 512, 4608, 3072 and 128: the
  one shape to warm up with, of each precision, with and without adapters beside the weights. A second one adds nothing.
- A size of 1 is never a variable: an image of 16x16, one token, gets graphs of its own at its first request.
- Graphs hold under the grad mode of their first call: warm up by way of the engine, that is in `torch.inference_mode`.

Knows no requests, precisions or adapters.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from request import Size

logger = logging.getLogger(__name__)

WARM_UP_SIZE = Size(1024, 1024)
"""The image to make first: its graphs serve all sizes, and are tuned for the size that is asked for most."""
MAX_GRAPHS = 64
"""Of one class of blocks. torch's own limit of 8 is met by three kinds of weights, two layouts and one-token images,
and to go beyond the limit is an error where the whole block has to be one graph."""
PACKAGES = ("triton", "diffusers", "torchao")
"""Whose versions the kept graphs depend on, besides torch's."""
SEAL_BYTES = hashlib.sha256().digest_size


def should_compile(setting: str, device: torch.device) -> bool:
    """Whether to compile, by `Settings.compile`: auto is on with CUDA, where a graph pays after some images."""
    return setting == "on" or (setting == "auto" and device.type == "cuda")


def compile_blocks(transformer: FluxTransformer2DModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have the transformer's blocks compiled at their first call; blocks that are so already are left alone.

    Set what the graphs depend on before the first call: the attention backend, and the types of the weights.

    Args:
        transformer: its blocks may be those of another one too.
        backend: as `torch.compile` takes it.
    """
    limit = _graph_limit(MAX_GRAPHS)
    for block in transformer.modules():
        if type(block).__name__ in transformer._repeated_blocks and block._compiled_call_impl is None:
            block.compile(fullgraph=True, dynamic=True, backend=backend, **limit)


def _graph_limit(count: int) -> dict[str, Any]:
    """The arguments of `torch.compile` that allow this many graphs.

    torch 2.11 has no argument for it, but a setting of the process. In 2.13 the setting is one of the thread, so it
    would be lost on predictions in another thread than the setup's. Only the argument is needed from torch 2.13 on.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": count}
    torch._dynamo.config.recompile_limit = count
    return {}


class CompileCache:
    """The graphs compiled by this process, kept in one file for the next: one per stack of versions and device.

    The file is made anew where it does not fit, is damaged or cannot be written, and a line in the log says so: no
    error comes from here. It holds pickles, which torch runs, so the folder is the owner's alone.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Make nothing yet; the folder holds nothing else, and is made when there is something to save."""
        self._file = folder / f"{_digest(_facts(device))}.graphs"
        self._loaded: Mapping[str, Iterable[str]] = {}

    def load(self) -> bool:
        """Take over what another process compiled; call it before the first compilation. Whether there was anything."""
        started = time.monotonic()
        try:
            kept = self._file.read_bytes()
            artifacts = kept[SEAL_BYTES:]
            sound = kept[:SEAL_BYTES] == _seal(artifacts)
            info = torch.compiler.load_cache_artifacts(artifacts) if sound else None
        except FileNotFoundError:
            logger.info("compiled graphs: none are kept for this device and these versions, so they are made now")
            return False
        except OSError as error:
            logger.warning("compiled graphs: cannot be loaded, so they are made anew: %s", error)
            return False
        if info is None:
            logger.warning("compiled graphs: %s is damaged, so they are made anew", self._file.name)
            return False
        self._loaded = info.artifacts
        megabytes, seconds = len(artifacts) / 1e6, time.monotonic() - started
        logger.info("compiled graphs: %.1f MB loaded in %.1f s", megabytes, seconds)
        return True

    def save(self) -> None:
        """Keep what was compiled or loaded so far; call it after the warm-up. Does nothing where nothing is new."""
        made = torch.compiler.save_cache_artifacts()
        if made is None or _holds(self._loaded, made[1].artifacts):
            return
        artifacts, info = made
        try:
            _write_whole(self._file, _seal(artifacts) + artifacts)
            for other in {*self._file.parent.glob("*.graphs"), *self._file.parent.glob("*.partial")} - {self._file}:
                other.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("compiled graphs: cannot be kept, so the next start makes them anew: %s", error)
            return
        self._loaded = info.artifacts
        logger.info("compiled graphs: %.1f MB kept for the next start", len(artifacts) / 1e6)


def _holds(loaded: Mapping[str, Iterable[str]], made: Mapping[str, Iterable[str]]) -> bool:
    return all(set(names) <= set(loaded.get(kind, ())) for kind, names in made.items())


def _seal(artifacts: bytes) -> bytes:
    return hashlib.sha256(artifacts).digest()


def _facts(device: torch.device) -> dict[str, str]:
    """What kept graphs depend on: versions, and the device's kind."""
    facts = {"torch": torch.__version__} | {package: _version(package) for package in PACKAGES}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return facts | {"device": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}
    return facts | {"device": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _digest(facts: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:16]


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that its name never stands for a part of it.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(suffix=".partial", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
