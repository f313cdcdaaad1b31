"""Compile the transformers' blocks and the VAE's decoder, once for all sizes, models and LoRAs; keep the graphs.

The blocks are compiled, not the whole transformer: FLUX's 57 blocks are of two classes, so few graphs serve them all,
at the same speed and in a sixth of the time (published: 9.6 s instead of 67 s). In the original precision there are
three: double block, first single block (separate inputs), other single blocks (views of one tensor); go_fast's forward
has five, one for each module of `lean_transformer.LeanBlocks`. Weights are inputs of a graph, so it is
shared by models of the same widths, by transformers that share blocks, and by the three modes. fp8 weights, and
adapters beside the weights, need graphs of their own: see `reserved_rank` in `lora_loading.applying.manager`. The modes
that record CUDA graphs ("reduce-overhead", "max-autotune") are not used: a recording holds for one size and one thread.

`dynamic=True` makes sizes variables at the first call. Three things make a graph too narrow, so that a later size is
compiled again:
- Dynamo gives dimensions that are equal at the first call one symbol, and recompiles when they differ later. So the
  numbers of image tokens, of text tokens, of both together, the width and a head's width must all differ in the
  warm-up, and an image's height and width. One of 1024x1008 gives 4032, 512, 4544, 3072 and 128.
- A dimension of 1 is never a variable: an image of 16x16 (one token) compiles graphs of its own at its first request.
- A graph is valid for the grad mode of its first call. Warm up through the engine, which runs in
  `torch.inference_mode`.

A graph that cannot be compiled runs eagerly, with one line in the log: slower, and the same images.

Knows no requests, precisions or adapters.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from torch._dynamo.exc import RestartAnalysis

from errors import SettingsError
from fetching.files import private_folder, require_private, write_atomically
from request import Size

logger = logging.getLogger(__name__)

WARM_UP_SIZE = Size(1024, 1008)
"""The size of the warm-up image. Its graphs serve all sizes; kernels are tuned for it, next to the most requested."""
MAX_GRAPHS = 64
"""The limit of graphs for one class of blocks. torch's default of 8 is reached by three kinds of weights, two layouts
and one-token images, and with `fullgraph=True` going beyond the limit is an error."""
INDUCTOR_OPTIONS = {"loop_ordering_after_fusion": False}
"""With torch's default of True, inductor 2.13 finds no common loops for the kernels of the fp8 single block, where the
number of text and image tokens is a sum, and raises CantSplit. `script/dry-run` shows whether it still does."""
LONGEST_ROW = 16384
"""See `_rows_in_registers`. FLUX.1's longest is 15360; with it a thread has 32 numbers."""
PACKAGES = ("triton", "diffusers", "torchao")
"""Packages whose versions, besides torch's, decide whether kept graphs can be used."""
SEAL_BYTES = hashlib.sha256().digest_size


def should_compile(setting: str, device: torch.device) -> bool:
    """Whether to compile, from `Settings.compile`: `auto` compiles on CUDA alone."""
    return setting == "on" or (setting == "auto" and device.type == "cuda")


def compiled_or_eager(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph with inductor; one that cannot be compiled is logged in one line and returned as it is.

    A backend for `torch.compile`. It never stops a prediction or the setup: a machine without a working compiler, or a
    graph that inductor cannot handle, costs speed alone.
    """
    from torch._inductor.compile_fx import compile_fx  # seconds of imports, for who compiles
    from torch._inductor.virtualized import V

    try:
        with V.set_choices_handler(_rows_in_registers()):
            return compile_fx(graph, inputs, config_patches=INDUCTOR_OPTIONS)  # type: ignore[return-value]
    except (RestartAnalysis, torch.OutOfMemoryError):  # of Dynamo's own working, and not of the compiler's
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("compiling a graph failed, so it runs uncompiled and slower: %s", reason)
        return graph.forward


def _rows_in_registers() -> Any:  # noqa: ANN401 - of inductor
    """Inductor's choices, but for rows of up to `LONGEST_ROW` numbers, which a kernel then reads once and keeps.

    By itself it keeps 1024 of them. Norm and quantisation of a row of 3072 are then three passes, with the row in
    float32 in memory between them. The way to change choices is the one that `InductorChoices` describes.
    """
    from torch._inductor.choices import InductorChoices

    class RowsInRegisters(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:  # noqa: ANN401
            numbers = features.reduction_numel
            return bool(numbers.is_number and int(numbers) <= LONGEST_ROW)

    return RowsInRegisters()


def compiled_parts(transformer: FluxTransformer2DModel) -> list[nn.Module]:
    """The modules of a transformer that are compiled, each by itself: its blocks."""
    return [block for block in transformer.modules() if type(block).__name__ in transformer._repeated_blocks]


def compile_blocks(transformer: FluxTransformer2DModel, backend: str | Callable[..., Any] = compiled_or_eager) -> None:
    """Mark the transformer's blocks for compilation at their first call; blocks that are marked already are left alone.

    The attention backend and the types of the weights must be final by the first call.

    Args:
        transformer: may share its blocks with another transformer.
        backend: as in `torch.compile`.
    """
    for block in compiled_parts(transformer):
        _mark(block, backend)


def compile_decoder(vae: Any, backend: str | Callable[..., Any] = compiled_or_eager) -> None:  # noqa: ANN401
    """Mark the VAE's decoder likewise. Norms and activations between its convolutions are then few kernels."""
    _mark(vae.decoder, backend)


def _mark(module: nn.Module, backend: str | Callable[..., Any]) -> None:
    if module._compiled_call_impl is None:
        module.compile(fullgraph=True, dynamic=True, backend=backend, recompile_limit=MAX_GRAPHS)


def run_uncompiled(modules: Iterable[nn.Module]) -> None:
    """Take back what marked these modules for compilation."""
    for module in modules:
        module._compiled_call_impl = None


def lay_out_channels_last(vae: nn.Module) -> None:
    """Store the weights of convolutions as tensor cores read them, so that nothing is turned around at each one.

    Their outputs then have this layout too. It is for CUDA: on a CPU it would change the last bits of images.
    """
    for parameter in vae.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def torch_folder(named: str | None, cache_dir: Path) -> Path:
    """The folder in which torch keeps and finds the code that it compiles; only this user can write to it.

    torch's own default is /tmp/torchinductor_<user>, which another user may have made first, with code in it.

    Args:
        named: the operator's TORCHINDUCTOR_CACHE_DIR.
        cache_dir: where the folder is made otherwise.

    Raises:
        SettingsError: other users can write to it, or it cannot be made.
    """
    folder = Path(named) if named else cache_dir.expanduser() / "torch"
    try:
        return private_folder(folder)
    except OSError as error:
        raise SettingsError(
            f"torch cannot keep compiled code in {folder}: {error.strerror}. Set TORCHINDUCTOR_CACHE_DIR to a folder "
            "that only this user can write to."
        ) from error


class CompileCache:
    """Compiled graphs in one file, for the next process; one file for each combination of versions and device.

    A missing or damaged file, or one that cannot be read or written, is logged in one line and the graphs are compiled
    again: this class raises nothing. The file holds pickles, which torch executes, so it is read from a private folder
    alone, one that no other user can write to.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Choose the file's name. The first `save` makes the folder; `save` also removes other graph files from it."""
        self._file = folder / f"{_digest(_facts(device))}.graphs"
        self._loaded: Mapping[str, Iterable[str]] = {}

    def load(self) -> bool:
        """Load what another process compiled, before the first compilation. Returns whether a file was loaded."""
        started = time.monotonic()
        try:
            require_private(self._file.parent)
            kept = self._file.read_bytes()
            artifacts = kept[SEAL_BYTES:]
            sound = kept[:SEAL_BYTES] == _seal(artifacts)
            info = torch.compiler.load_cache_artifacts(artifacts) if sound else None
        except FileNotFoundError:
            logger.info("compiled graphs: no file for this device and these versions, so they are compiled now")
            return False
        except Exception as error:  # of the disk, a folder that others can write to, and whatever unpickling raises
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            logger.warning("compiled graphs: cannot be loaded, so they are compiled again: %s", reason)
            return False
        if info is None:
            logger.warning("compiled graphs: %s is damaged, so they are compiled again", self._file.name)
            return False
        self._loaded = info.artifacts
        megabytes, seconds = len(artifacts) / 1e6, time.monotonic() - started
        logger.info("compiled graphs: %.1f MB loaded in %.1f s", megabytes, seconds)
        return True

    def save(self) -> None:
        """Write what was compiled or loaded so far, if anything is new; call it after the warm-up."""
        made = torch.compiler.save_cache_artifacts()
        if made is None or _holds(self._loaded, made[1].artifacts):
            return
        artifacts, info = made
        try:
            write_atomically(private_folder(self._file.parent) / self._file.name, _seal(artifacts) + artifacts)
            for other in {*self._file.parent.glob("*.graphs"), *self._file.parent.glob("*.partial")} - {self._file}:
                other.unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            logger.warning("compiled graphs: cannot be written, so the next start compiles them again: %s", reason)
            return
        self._loaded = info.artifacts
        logger.info("compiled graphs: %.1f MB written for the next start", len(artifacts) / 1e6)


def _holds(loaded: Mapping[str, Iterable[str]], made: Mapping[str, Iterable[str]]) -> bool:
    return all(set(names) <= set(loaded.get(kind, ())) for kind, names in made.items())


def _seal(artifacts: bytes) -> bytes:
    return hashlib.sha256(artifacts).digest()


def _facts(device: torch.device) -> dict[str, str]:
    """What decides whether a graph can be used: versions, and the kind of device."""
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
