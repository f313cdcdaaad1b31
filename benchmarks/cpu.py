"""`script/bench cpu`: ours beside its peer in one process, in turn; medians and ratios, written to benchmarks/cpu.md.

Only ratios mean anything: the machine's speed drifts, and both sides of a ratio drift with it.
"""

from __future__ import annotations

import inspect
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import cog
import numpy as np
import torch
from cog.input import FieldInfo
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch._dynamo.testing import CompileCounter

from benchmarks.swap import our_adapter, random_factors, real_depth_transformer
from engine.compilation import compile_blocks
from engine.fp8 import WEIGHT_ONLY
from engine.precision import RESERVED_RANK
from engine.working_copy import WorkingCopy, WorkingCopyAdapters
from logs import configure_logging
from lora_loading.applying.manager import AdaptedComponent, ComponentAdapters
from lora_loading.reading.adapter import Stack
from lora_loading.shapes import TRANSFORMER
from predict import Predictor
from request import Mode

ROUNDS = 9
STEPS = 8
SIDE = 512
REPORT = Path(__file__).parent / "cpu.md"
PROMPT = "a large red circle on a white background"


def in_turn(*calls: Callable[[], object]) -> list[float]:
    """The median seconds of each call over the rounds, the calls taking turns after one warm-up."""
    seconds: list[list[float]] = [[] for _ in calls]
    for round_ in range(ROUNDS + 1):
        for index, call in enumerate(calls):
            started = time.perf_counter()
            call()
            if round_ > 0:
                seconds[index].append(time.perf_counter() - started)
    return [statistics.median(times) for times in seconds]


def defaults() -> dict[str, Any]:
    """The predictor's arguments at their defaults."""
    parameters = inspect.signature(Predictor.predict).parameters.values()
    return {p.name: p.default.default for p in parameters if isinstance(p.default, FieldInfo)}


def overhead(predictor: Predictor, mode: Mode, inputs: dict[str, Path]) -> tuple[float, float]:
    """Median seconds of predict() and of a bare call of the same diffusers pipeline, one 512x512 image."""
    model = predictor.engine.exact.models["dev"]
    pipeline = model.pipelines[mode]
    opened = {name: Image.open(path) for name, path in inputs.items()}
    arguments: dict[str, Any] = {"mask_image": opened["mask"]} if "mask" in opened else {}
    if "image" in opened:
        arguments |= {"image": opened["image"], "strength": 1.0}
    given = defaults() | {
        "prompt": PROMPT, "aspect_ratio": "custom", "width": SIDE, "height": SIDE, "num_inference_steps": STEPS,
        "seed": 1, "prompt_strength": 1.0, "output_format": "webp",
    }  # fmt: skip
    given |= {name: cog.Path(path) for name, path in inputs.items()}

    def bare() -> None:
        image = pipeline(
            PROMPT, width=SIDE, height=SIDE, num_inference_steps=STEPS, guidance_scale=3.0,
            max_sequence_length=model.profile.max_prompt_tokens, generator=torch.Generator().manual_seed(1),
            **arguments,
        ).images[0]  # fmt: skip
        image.save(io.BytesIO(), "WEBP", quality=80)

    ours, theirs = in_turn(lambda: predictor.predict(**given), bare)
    return ours, theirs


def prompts(predictor: Predictor) -> tuple[float, float]:
    """Median seconds of predict() with a prompt never seen before and with the same one again: schnell, one step."""
    given = defaults() | {
        "aspect_ratio": "custom", "width": 256, "height": 256, "num_inference_steps": 1, "seed": 1,
        "model": "schnell", "output_format": "jpg",
    }  # fmt: skip
    numbers = count()
    new, again = in_turn(
        lambda: predictor.predict(**{**given, "prompt": f"{PROMPT} {next(numbers)}"}),
        lambda: predictor.predict(**{**given, "prompt": PROMPT}),
    )
    return new, again


def graphs(fast: bool) -> tuple[int, int]:
    """How many graphs the warm-up compiles, and how many are added by twenty swaps over five sizes and two models."""
    torch._dynamo.reset()
    models = {name: real_depth_transformer(seed) for seed, name in enumerate(("dev", "schnell"))}
    carriers: dict[str, AdaptedComponent]
    if fast:
        working_copy = WorkingCopy(models, WEIGHT_ONLY, torch.device("cpu"))
        carriers = {name: WorkingCopyAdapters(name, working_copy) for name in models}
        models = working_copy.transformers
    else:
        carriers = {name: ComponentAdapters(TRANSFORMER, model, RESERVED_RANK) for name, model in models.items()}
    counter = CompileCounter()
    for model in models.values():
        compile_blocks(model, counter)
    adapters = [our_adapter(random_factors(models["dev"], rank, rank), str(rank)) for rank in (4, 16, 60)]

    def run(name: str, stack: Stack, tokens: int) -> None:
        carriers[name].apply(stack)
        with torch.inference_mode():
            models[name](**random_inputs(models[name], tokens))

    for stack in ([], [(adapters[0], 1.0)]):
        run("dev", stack, 48)
    warm = counter.frame_count
    for turn in range(20):
        stack = [(adapters[turn % 3], (1.0, -0.5)[turn % 2])] if turn % 5 else []
        run(("dev", "schnell")[turn // 3 % 2], stack, (40, 56, 72, 88, 104)[turn % 5])
    return warm, counter.frame_count - warm


def random_inputs(model: FluxTransformer2DModel, tokens: int, text: int = 12) -> dict[str, Any]:
    """One call's inputs for this many image tokens."""
    config = model.config
    return {
        "hidden_states": torch.randn(1, tokens, config.in_channels),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.0]),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text, 3),
    }


def photograph() -> Image.Image:
    """An image of 1024x1024 with smooth shading and fine grain, as a photograph has."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize((1024, 1024), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (1024, 1024, 1))
    return Image.fromarray(np.uint8(np.clip(np.asarray(coarse, dtype=float) + grain, 0, 255)))


def encoder_rows(image: Image.Image) -> list[str]:
    """A table row per encoder setting: milliseconds and bytes for one image of 1024x1024."""
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        f"webp method {method}": ("WEBP", {"quality": 80, "method": method}) for method in (0, 1, 2, 3, 4, 6)
    }
    settings["jpg"] = ("JPEG", {"quality": 80})
    settings["jpg, optimised tables"] = ("JPEG", {"quality": 80, "optimize": True})
    settings |= {f"png level {level}": ("PNG", {"compress_level": level}) for level in (1, 4, 6)}

    def encoded(kind: str, options: dict[str, Any]) -> int:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.tell()

    calls = [partial(encoded, kind, options) for kind, options in settings.values()]
    times = in_turn(*calls)
    sizes = [call() for call in calls]
    return [
        f"| {name} | {seconds * 1000:.0f} | {size / 1024:.0f} |"
        for name, seconds, size in zip(settings, times, sizes, strict=True)
    ]


def main() -> None:
    """Measure and write the report."""
    configure_logging()
    predictor = Predictor()
    predictor.setup()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photograph().resize((SIDE, SIDE)).save(folder / "image.png")
        Image.new("L", (SIDE, SIDE), 255).save(folder / "mask.png")
        image, mask = {"image": folder / "image.png"}, {"mask": folder / "mask.png"}
        modes = {Mode.TXT2IMG: {}, Mode.IMG2IMG: image, Mode.INPAINT: image | mask}
        rows = []
        for mode, inputs in modes.items():
            ours, bare = overhead(predictor, mode, inputs)
            rows.append(f"| {mode.value} | {ours:.3f} | {bare:.3f} | {ours / bare:.3f} |")
        new, again = prompts(predictor)
    compiled = {name: graphs(fast) for name, fast in (("exact", False), ("go_fast", True))}
    lines = [
        "# Measured on a CPU",
        "",
        f"`script/bench cpu`: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, medians of {ROUNDS}.",
        "",
        f"## predict() beside a bare diffusers pipeline: {SIDE}x{SIDE}, {STEPS} steps, webp",
        "",
        "| mode | predict, s | bare, s | ratio |",
        "|---|---|---|---|",
        *rows,
        "",
        "## A prompt again: predict() of schnell, 256x256, one step",
        "",
        f"New prompts {new * 1000:.0f} ms, the same again {again * 1000:.0f} ms: {new / again:.2f} times.",
        "",
        "## Graphs compiled, 19 + 38 blocks of both models, blocks compiled one by one",
        "",
        "| precision | by the warm-up | by 20 swaps of 3 ranks over 5 sizes and 2 models |",
        "|---|---|---|",
        *(f"| {name} | {warm} | {more} |" for name, (warm, more) in compiled.items()),
        "",
        "## Encoders: a photograph-like image of 1024x1024, quality 80",
        "",
        "| encoder | ms | KiB |",
        "|---|---|---|",
        *encoder_rows(photograph()),
        "",
    ]
    REPORT.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
