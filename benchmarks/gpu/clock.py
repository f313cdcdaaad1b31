"""What a call takes, seen from outside: times on the device's own clock, peak memory, compilations.

CUDA runs behind the host, so its marks are events in the stream, read when all work is done. On a CPU a mark is the
time of day, and memory that of the whole process.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.callback import callback_handler

Mark = Any
"""A point in time: a torch.cuda.Event, or seconds on a CPU."""


@dataclass(frozen=True)
class Clock:
    """The clock and the memory of one device."""

    device: torch.device

    def mark(self) -> Mark:
        """Now, in the order of what was given to the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Between two marks; waits for the second."""
        if self.device.type != "cuda":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def finish(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give back the memory of what is no longer referred to."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forget_peak(self) -> None:
        """Let the peak begin anew; a process's on a CPU cannot."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """The most that tensors took since the peak was forgotten; on a CPU the process's most, ever."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Watch:
    """The marks that one image leaves behind: when its text was encoded, and when each denoising step began."""

    clock: Clock
    texts: list[Mark] = field(default_factory=list)
    starts: list[Mark] = field(default_factory=list)
    ends: list[Mark] = field(default_factory=list)

    @contextmanager
    def over(self, pipeline: Any) -> Iterator[None]:  # noqa: ANN401 - diffusers ships no types
        """Mark what goes in and out of the pipeline's text encoders and transformer.

        The hooks are on the outermost modules, which are not compiled themselves: their blocks are.
        """
        hooks = [
            pipeline.text_encoder.register_forward_pre_hook(lambda *_: self.texts.append(self.clock.mark())),
            pipeline.text_encoder_2.register_forward_hook(lambda *_: self.texts.append(self.clock.mark())),
            pipeline.transformer.register_forward_pre_hook(lambda *_: self.starts.append(self.clock.mark())),
            pipeline.transformer.register_forward_hook(lambda *_: self.ends.append(self.clock.mark())),
        ]
        with ExitStack() as stack:
            for hook in hooks:
                stack.callback(hook.remove)
            yield

    @property
    def text_seconds(self) -> float:
        """From the beginning of the first text encoder to the end of the second."""
        return self.clock.seconds(self.texts[0], self.texts[-1])

    @property
    def step_seconds(self) -> list[float]:
        """Each step from its beginning to that of the next; the last one without the scheduler's few microseconds."""
        return [self.clock.seconds(a, b) for a, b in zip(self.starts, [*self.starts[1:], self.ends[-1]], strict=True)]


@dataclass
class Compilations:
    """How often torch.compile was at work, and how long."""

    count: int = 0
    seconds: float = 0.0
    _started: float = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count those that happen inside."""
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        try:
            yield
        finally:
            callback_handler.remove_start_callback(self._start)
            callback_handler.remove_end_callback(self._end)

    def _start(self, _: object) -> None:
        self.count += 1
        self._started = time.perf_counter()

    def _end(self, _: object) -> None:
        self.seconds += time.perf_counter() - self._started
