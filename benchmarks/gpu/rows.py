"""Measure one row: a case's times, or a change's. Knows contenders by their protocol alone."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from benchmarks.gpu.clock import Clock, Compilations, Watch
from benchmarks.gpu.contenders import Bench, Contender, Ours
from benchmarks.gpu.floor import EXACT, FP8, Floor, step_flop, tokens_of
from benchmarks.gpu.plan import DEV, HOTSWAP, OURS_FAST, Case, Change
from images import encode

WARM_STEPS = 2
GIB = 2**30


@dataclass(frozen=True)
class Times:
    """A case's figures. The four parts and the rest make up the end to end time."""

    milliseconds_a_step: float
    tflop_a_step: float
    tflops: float
    """tflop_a_step a second; with a cache, more than was really done."""
    floor_milliseconds: float
    share_of_floor: float
    """floor_milliseconds / milliseconds_a_step: 1 is the floor's speed."""
    steps: int
    """Of the image whose end to end time is given."""
    end_to_end: str
    """"measured", or "computed from n steps"."""
    end_to_end_seconds: float
    text_seconds: float
    denoise_seconds: float
    decode_seconds: float
    """From the last step's end to an image in host memory."""
    encode_seconds: float
    """As webp."""
    rest_seconds: float
    """Preparation on the host, and what it makes the device wait."""
    peak_gib: float
    """Of all that the row needs, the first image and its compilations included."""
    compile_seconds: float
    """Of the row's first image, which comes before the timed ones."""
    compilations: int
    recompilations: int
    """During the timed images."""


@dataclass(frozen=True)
class ChangeTimes:
    """A change's figures, the device's work included."""

    p50_milliseconds: float
    p95_milliseconds: float
    count: int


@dataclass(frozen=True)
class Unloaded:
    """What a LoRA leaves behind when it is gone."""

    bit_equal_weights: bool
    bit_equal_image: bool


@dataclass(frozen=True)
class _Image:
    total: float
    text: float
    denoise: float
    decode: float
    encode: float


def time_case(bench: Bench, contender: Contender, case: Case, floor: Floor) -> Times:
    """Make a first image, which builds and compiles what is not there yet, and then the timed ones."""
    scale, clock = bench.scale, bench.clock
    whole = scale.steps[case.model]
    steps = whole if case.whole else scale.few_steps
    clock.forget_peak()
    first, timed = Compilations(), Compilations()
    contender.pipeline(case).set_progress_bar_config(disable=True)
    with first.counted():
        contender.make_image(case, "the first one", WARM_STEPS)
    with timed.counted():
        images = [_timed_image(clock, contender, case, steps, run) for run in range(scale.runs)]
    used_bytes = clock.peak_bytes() - bench.weights.unused_bytes(contender.models_used)
    total, text, denoise, decode, encoded = (
        statistics.median(getattr(image, part) for image in images)
        for part in ("total", "text", "denoise", "decode", "encode")
    )
    step = denoise / steps
    tokens = tokens_of(scale, case.model, case.width, case.height)
    flop = step_flop(scale, tokens)
    least = floor.step_seconds(scale, tokens, FP8 if case.contender in (OURS_FAST, HOTSWAP) else EXACT)
    return Times(
        milliseconds_a_step=step * 1e3,
        tflop_a_step=flop / 1e12,
        tflops=flop / step / 1e12,
        floor_milliseconds=least * 1e3,
        share_of_floor=least / step,
        steps=whole,
        end_to_end="measured" if steps == whole else f"computed from {steps} steps",
        end_to_end_seconds=total + (whole - steps) * step,
        text_seconds=text,
        denoise_seconds=whole * step,
        decode_seconds=decode,
        encode_seconds=encoded,
        rest_seconds=total - text - denoise - decode - encoded,
        peak_gib=used_bytes / GIB,
        compile_seconds=first.seconds,
        compilations=first.count,
        recompilations=timed.count,
    )


def _timed_image(clock: Clock, contender: Contender, case: Case, steps: int, run: int) -> _Image:
    """Each has a prompt of its own, since encoded prompts may be kept."""
    prompt = f"a circle {crc32(repr((case, run)).encode())}"
    watch = Watch(clock)
    clock.finish()
    with watch.over(contender.pipeline(case)):
        started = time.perf_counter()
        image = contender.make_image(case, prompt, steps)
        decoded = clock.mark()
        made = time.perf_counter()
    encode(image, "webp", 80)
    ended = time.perf_counter()
    decode = clock.seconds(watch.ends[-1], decoded)
    return _Image(ended - started, watch.text_seconds, sum(watch.step_seconds), decode, ended - made)


def time_change(bench: Bench, contender: Contender, change: Change) -> ChangeTimes:
    """Go to and fro, two turns untimed and the rest timed."""
    call = contender.change(change)
    times = []
    for turn in range(bench.scale.swaps + 2):
        bench.clock.finish()
        started = time.perf_counter()
        call(turn)
        bench.clock.finish()
        times.append((time.perf_counter() - started) * 1e3)
    return ChangeTimes(percentile(times[2:], 0.5), percentile(times[2:], 0.95), len(times) - 2)


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def check_unload(bench: Bench, ours: Ours, change: Change) -> Unloaded:
    """Compare dev without LoRAs before and after it carried one, in its weights and in an image.

    Raises:
        RuntimeError: the LoRA changed nothing, so that nothing was checked.
    """
    width, height = bench.scale.sizes[0]
    plain = Case(change.contender, DEV, width, height, 0, 0, whole=False)
    adapted = Case(change.contender, DEV, width, height, 1, change.rank, whole=False)

    def state(case: Case) -> tuple[bytes, str]:
        image = ours.make_image(case, "the same", WARM_STEPS)
        return image.tobytes(), digest(ours.pipeline(case).transformer)

    before, between, after = state(plain), state(adapted), state(plain)
    if before[0] == between[0] or before[1] == between[1]:
        raise RuntimeError("the LoRA changed nothing")
    return Unloaded(bit_equal_weights=before[1] == after[1], bit_equal_image=before[0] == after[0])


def digest(module: nn.Module) -> str:
    """A hash of all names and bytes of a module's tensors, worked out where they are."""
    found = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        for part in _plain_tensors(tensor.detach()):
            found.update(f"{name} {tuple(part.shape)} {part.dtype} {_checksum(part)}\n".encode())
    return found.hexdigest()


def _plain_tensors(tensor: Any) -> list[Tensor]:  # noqa: ANN401 - quantised tensors have attributes of their own
    """The tensors that a quantised one consists of; a plain one itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain_tensors(getattr(tensor, name))]


def _checksum(tensor: Tensor) -> int:
    """The sum of all 64-bit words, each times an odd number of its place, modulo 2**64; one changed word changes it."""
    octets = tensor.contiguous().flatten().view(torch.uint8)
    words = nn.functional.pad(octets, (0, -len(octets) % 8)).view(torch.int64)
    places = torch.arange(len(words), device=words.device) * 2 + 1
    return int((words * places).sum())
