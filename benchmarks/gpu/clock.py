"""What calls take on the device's own clock. CUDA runs behind the host, so its marks are events, read at the end."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
        """Give back the memory of what is no longer referred to, and let the peak begin anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """The most that tensors took since `free`; on a CPU the process's most, ever."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def of_one(self, calls: list[Callable[[], object]], repeats: int, batches: int = 5) -> float:
        """Seconds of one call: the median of batches in which the calls take turns, after one that is not timed."""
        times = []
        for _ in range(batches + 1):
            start = self.mark()
            for index in range(repeats):
                calls[index % len(calls)]()
            times.append(self.seconds(start, self.mark()) / repeats)
        return statistics.median(times[1:])

    @contextmanager
    def steps_of(self, transformer: nn.Module) -> Iterator[list[tuple[Mark, Mark]]]:
        """Within, the beginning and the end of each call of a transformer, of which the blocks alone are compiled."""
        starts: list[Mark] = []
        steps: list[tuple[Mark, Mark]] = []
        hooks = (
            transformer.register_forward_pre_hook(lambda *_: starts.append(self.mark())),
            transformer.register_forward_hook(lambda *_: steps.append((starts[-1], self.mark()))),
        )
        try:
            yield steps
        finally:
            for hook in hooks:
                hook.remove()
