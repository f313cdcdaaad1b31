"""Faults to inject into a running predictor: what is raised, and at which stage of a prediction.

`FaultyPredictor` is the real predictor with a trip-wire at each stage. A file names the stage and the fault; without
the file nothing happens. Cog's server runs it as `tests/faults.py:FaultyPredictor`.
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import lora_loading.applying.manager
import lora_loading.reading.adapter_cache
import predict
import request
import weights
from errors import DiskError, DownloadError, InputError, LoraFormatError, ModelError
from lora_loading.finding.resolve import Resolver
from request import Mode

FAULT_FILE = "FLUX_TEST_FAULT"
"""The environment variable that names the file."""
MARK = "an injected fault"

RAISED: dict[str, Callable[[], BaseException]] = {
    "memory": lambda: MemoryError(MARK),
    "device memory": lambda: torch.OutOfMemoryError(f"CUDA out of memory: {MARK}"),
    "disk full": lambda: OSError(errno.ENOSPC, MARK),
    "disk quota": lambda: OSError(errno.EDQUOT, MARK),
    "disk error": lambda: OSError(errno.EIO, MARK),
    "read-only disk": lambda: OSError(errno.EROFS, MARK),
    "no permission": lambda: PermissionError(errno.EACCES, MARK),
    "missing file": lambda: FileNotFoundError(errno.ENOENT, MARK),
    "too many files": lambda: OSError(errno.EMFILE, MARK),
    "no more threads": lambda: RuntimeError(f"can't start new thread: {MARK}"),
    "timeout": lambda: TimeoutError(MARK),
    "connection reset": lambda: ConnectionResetError(errno.ECONNRESET, MARK),
    "broken pipe": lambda: BrokenPipeError(errno.EPIPE, MARK),
    "unknown host": lambda: socket.gaierror(socket.EAI_NONAME, MARK),
    "tls": lambda: ssl.SSLError(1, MARK),
    "runtime": lambda: RuntimeError(MARK),
    "cuda": lambda: RuntimeError(f"CUDA error: device-side assert triggered, {MARK}"),
    "value": lambda: ValueError(MARK),
    "key": lambda: KeyError(MARK),
    "index": lambda: IndexError(MARK),
    "type": lambda: TypeError(MARK),
    "attribute": lambda: AttributeError(MARK),
    "assertion": lambda: AssertionError(MARK),
    "zero division": lambda: ZeroDivisionError(MARK),
    "overflow": lambda: OverflowError(MARK),
    "recursion": lambda: RecursionError(MARK),
    "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, MARK),
    "stop iteration": lambda: StopIteration(MARK),
    "not implemented": lambda: NotImplementedError(MARK),
    "safetensors": lambda: SafetensorError(MARK),
    "json": lambda: json.JSONDecodeError(MARK, "", 0),
    "group": lambda: ExceptionGroup(MARK, [ValueError(MARK)]),
    "own: input": lambda: InputError(MARK),
    "own: format": lambda: LoraFormatError(MARK),
    "own: download": lambda: DownloadError(MARK),
    "own: disk": lambda: DiskError(MARK),
    "own: model": lambda: ModelError(MARK),
    "exit": lambda: SystemExit(MARK),
    "interrupt": lambda: KeyboardInterrupt(MARK),
    "generator exit": lambda: GeneratorExit(MARK),
}
HANG, NOT_FINITE = "hang", "not finite"
"""Further faults: Python that runs until it is cancelled, and numbers that are not finite."""

STAGES = (
    "parse", "resolve", "download", "verify", "load", "apply", "encode the prompt", "denoise", "decode", "check",
    "encode the image", "write",
)  # fmt: skip
WITH_NUMBERS = ("encode the prompt", "denoise", "decode")


def asked_for(stage: str) -> str | None:
    """The fault that is to happen at this stage now."""
    try:
        asked = json.loads(Path(os.environ[FAULT_FILE]).read_text())
    except (OSError, ValueError):
        return None
    return asked["fault"] if asked["stage"] == stage else None


def strike(stage: str) -> None:
    """Raise what the file asks for at this stage."""
    fault = asked_for(stage)
    if fault == HANG:
        Path(os.environ[FAULT_FILE] + ".hanging").touch()
    while fault == HANG and asked_for(stage) == HANG:
        time.sleep(0.01)
    if fault in RAISED:
        raise RAISED[fault]()


def wire(owner: Any, name: str, stage: str, call: int = 1) -> None:
    """Let a function strike first, at its n-th call of each fault."""
    original = getattr(owner, name)
    calls = 0

    def wired(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls = calls + 1 if asked_for(stage) else 0
        if calls >= call:
            strike(stage)
        return original(*arguments, **named)

    setattr(owner, name, wired)


def wire_module(module: torch.nn.Module, stage: str) -> None:
    """Let a module strike before it runs, and spoil its result where that is asked."""

    def spoil(module: torch.nn.Module, arguments: Any, result: Any) -> None:
        if asked_for(stage) == NOT_FINITE:
            tensor = result if isinstance(result, torch.Tensor) else result[0]
            tensor.fill_(float("nan"))

    module.register_forward_pre_hook(lambda module, arguments: strike(stage))
    module.register_forward_hook(spoil)


class FaultyPredictor(predict.Predictor):
    """The predictor, with a trip-wire at each stage."""

    def setup(self) -> None:
        super().setup()
        wire(request, "parse", "parse")
        wire(Resolver, "resolve", "resolve")
        wire(weights, "download", "download")
        wire(weights, "check_safetensors", "verify")
        wire(lora_loading.reading.adapter_cache, "read_adapter", "load")
        wire(lora_loading.applying.manager, "_joined", "apply", call=10)  # with nine layers changed already
        pipeline = self.engine.exact.models["dev"].pipelines[Mode.TXT2IMG]
        wire_module(pipeline.text_encoder_2, "encode the prompt")
        wire_module(pipeline.transformer.single_transformer_blocks[0], "denoise")
        wire_module(pipeline.vae.decoder, "decode")
        wire(self.checker._detector, "check", "check")
        wire(predict, "encode", "encode the image")
        self._note_threads()
        written = pathlib.Path.write_bytes

        def write_bytes(path: pathlib.Path, content: Any) -> int:
            if path.parent.name.startswith("flux-"):
                strike("write")
            return written(path, content)

        pathlib.Path.write_bytes = write_bytes  # type: ignore[assignment,method-assign]

    def _note_threads(self) -> None:
        """Write down, at the beginning of each prediction, which threads of ours are alive."""
        fetched = self.uploads.fetched

        def ours() -> list[str]:
            strangers = "_DummyThread", "TMonitor"  # coglet's, and the one that watches progress bars
            staying = "MainThread", "device", "safety-check"
            threads = [thread for thread in threading.enumerate() if type(thread).__name__ not in strangers]
            return [thread.name for thread in threads if thread.name not in staying]

        def fetched_and_noted(image: object, mask: object) -> Any:
            deadline = time.monotonic() + 1  # a thread that ends just now is none that was left
            while (alive := ours()) and time.monotonic() < deadline:
                time.sleep(0.02)
            Path(f"{os.environ[FAULT_FILE]}.threads").write_text(" ".join(alive))
            return fetched(image, mask)

        self.uploads.fetched = fetched_and_noted  # type: ignore[method-assign]
