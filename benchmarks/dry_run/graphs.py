"""Let inductor write the kernels of a CUDA device that is not there, and assemble them with Triton's own ptxas.

Within `recording`, torch.compile goes on as far as a graph's finished code, which is kept; what runs then is the traced
graph. `assembled` compiles the kernels in that code to cubins and asks cuobjdump for their registers and spills.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.compile_fx
import torch._inductor.config
import triton
from torch import Tensor
from torch._dynamo.exc import RestartAnalysis
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Graph:
    """One graph that torch.compile handed to inductor."""

    name: str
    """Of the module that was compiled."""
    launches: int = 0
    """Of Triton kernels, a call."""
    products: int = 0
    """Launches of library kernels, such as cuBLAS's."""
    triton_bytes: int = 0
    """Read and written by the Triton kernels, a call, at the sizes of the first call."""
    calls: int = 0
    code: str = ""
    error: str = ""
    """Why inductor could not write the code."""


@dataclass(frozen=True)
class Kernel:
    """One configuration of a Triton kernel, assembled."""

    graph: str
    name: str
    configuration: str
    registers: int
    spilled_bytes: int
    error: str = ""


@dataclass
class Recorder:
    """The graphs that were compiled while it recorded."""

    graphs: list[Graph] = field(default_factory=list)
    is_compiling: bool = False

    def restart_calls(self) -> None:
        """Set the calls of all graphs to 0."""
        for graph in self.graphs:
            graph.calls = 0


class _WrittenSignal(Exception):  # noqa: N818 - no error
    """Raised in place of loading a graph's finished code."""


class _Target:
    """Triton's driver for a device that is not there."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@contextmanager
def triton_target(capability: tuple[int, int]) -> Iterator[None]:
    """Within, Triton compiles for this compute capability."""
    with mock.patch.object(driver, "_active", _Target(capability)):
        yield


@contextmanager
def recording(recorder: Recorder, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Within, graphs are recorded and not run; what inductor cannot handle raises in `compile_fx`, as without this."""
    compiler = torch._inductor.compile_fx.compile_fx

    def compile_fx(module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        if recorder.is_compiling:  # compile_fx calls itself once its options are set
            return compiler(module, inputs, **options)  # type: ignore[return-value]
        graph = Graph(_name_of_the_compiled())
        recorder.is_compiling = True
        try:
            compiler(module, inputs, **options)
        except RestartAnalysis:
            raise
        except Exception as error:
            recorder.graphs.append(graph)
            written = _written(error)
            if written is None:
                graph.error = f"{type(error).__name__}: {error}".splitlines()[0]
                raise
            _describe(graph, written)
        finally:
            recorder.is_compiling = False

        def run(*arguments: Any) -> Any:
            graph.calls += 1
            return module.forward(*arguments)

        return run

    with ExitStack() as stack:
        stack.enter_context(triton_target(capability))
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        stack.enter_context(mock.patch("torch._inductor.compile_fx.compile_fx", compile_fx))
        stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", staticmethod(_stop)))
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", _cudnn_attention))
        yield


def _stop(code: str) -> None:
    """In the place of loading a graph's code: end here with it, and with the bytes of its Triton kernels."""
    nodes = [node for node in V.graph.scheduler.nodes if not re.match("Extern|Nop", type(node).__name__)]
    raise _WrittenSignal(code, sum(_touched_bytes(node) for node in nodes))


def _touched_bytes(node: Any) -> int:
    """What a kernel reads and writes, each number once.

    Inductor's own count takes a buffer of which a part is read for a whole one. Here each access has its own size;
    those that begin at neighbouring places, as the two of a rotation do, are of one part.
    """
    parts: dict[str, dict[tuple[bool, int], int]] = {}
    for written, accesses in ((False, node.read_writes.reads), (True, node.read_writes.writes)):
        for access in accesses:
            part = (written, _begin(access) // 2)
            sizes = parts.setdefault(access.name, {})
            sizes[part] = max(sizes.get(part, 0), _bytes_of(access))
    counted = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    return sum(min(size, sum(parts[name].values())) for name, size in counted.items() if name in parts)


def _bytes_of(access: Any) -> int:
    """At the sizes of the graph's first call."""
    numbers = V.graph.sizevars.optimization_hint(access.get_numel(), fallback=0)
    return int(numbers) * V.graph.get_dtype(access.name).itemsize


def _begin(access: Any) -> int:
    """The first place of an access in its buffer."""
    index = getattr(access, "index", None)
    if index is None:
        return 0
    try:
        return int(index.subs(dict.fromkeys(access.var_names, 0)).doit())
    except TypeError:  # it depends on a size
        return 0


def _describe(graph: Graph, written: _WrittenSignal) -> None:
    graph.code, graph.triton_bytes = written.args
    calls = graph.code[graph.code.index("def call(") :]
    graph.launches = len(re.findall(r"triton_\w+\.run\(", calls))
    library = re.findall(r"(?:extern_kernels\.\w+|torch\.ops\.\w+\.\w+)[.\w]*\(", calls)
    graph.products = len(library) + sum("two_products" in call for call in library)


def _written(error: BaseException | None) -> _WrittenSignal | None:
    while error is not None and not isinstance(error, _WrittenSignal):
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    return error


def _name_of_the_compiled() -> str:
    """The class or function that Dynamo compiles, from its own frame; a graph does not know it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_locals.get("code") if frame.f_code.co_name == "_compile" else None
        if isinstance(code, CodeType):
            return code.co_qualname.removesuffix(".forward")
        frame = frame.f_back
    return "graph"


def _cudnn_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """What torch chooses on an H100; the fake device has no chooser."""
    result: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, attn_mask, False)[0]
    return result


def assembled(graphs: list[Graph], capability: tuple[int, int] = (9, 0)) -> list[Kernel]:
    """Every configuration of every Triton kernel in the graphs' code as a cubin for this compute capability."""
    kernels: list[Kernel] = []
    with ExitStack() as stack:
        stack.enter_context(triton_target(capability))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(mock.patch.dict("os.environ", {"TRITON_CACHE_DIR": str(folder / "triton")}))
        stack.enter_context(torch._inductor.config.patch(use_static_triton_launcher=False))
        for graph in graphs:
            for name, source in _sources(graph.code):
                kernels += _assembled(graph.name, name, source, folder)
    return kernels


def _sources(code: str) -> list[tuple[str, str]]:
    """Names and modules of the Triton kernels in a graph's code."""
    found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.DOTALL)
    return [(name, source.replace("\\\\", "\\")) for name, source in found]


def _assembled(graph: str, name: str, source: str, folder: Path) -> Iterator[Kernel]:
    file = folder / f"{graph}_{name[-60:]}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    tuner = getattr(module, name)
    for configuration in tuner.configs:
        text = f"{configuration.kwargs} warps {configuration.num_warps}"
        try:
            kernel = tuner._precompile_config(configuration).kernel
            compiled = kernel if hasattr(kernel, "asm") else kernel.kernel
            registers, spilled = resources(compiled.asm["cubin"])
        except Exception as error:
            yield Kernel(graph, name, text, 0, 0, f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            yield Kernel(graph, name, text, registers, spilled)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes that it spills to memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]
