"""What the soak asks for: a table of good requests, each with a golden output, and a random order with faults in it."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from safetensors.numpy import load, save

from tests.conftest import QUICK
from tests.faults import NOT_FINITE, RAISED, STAGES, WITH_NUMBERS
from tests.paths import DATA
from tests.services import Reply, Storage, StoredFile

LORAS = 20
CACHED = 8
"""How many of them the cache holds."""
FAULTS, HOPELESS, CANCELS = 0.1, 0.05, 0.05
"""The parts of all requests into which a fault is injected, that cannot be served, and that are cancelled."""
NEED_A_FETCH = ("resolve", "download", "verify", "load", "apply")
PROMPTS = ("a red circle on a white background", "a large blue star on a green background", "a yellow square")


@dataclass(frozen=True)
class Good:
    """A request that has to give its golden output."""

    number: int


@dataclass(frozen=True)
class Faulty:
    """A request at one of whose stages a fault happens; it fails, or where the stage is not reached is golden."""

    number: int
    stage: str
    fault: str


@dataclass(frozen=True)
class Hopeless:
    """A request that has to be refused: something in it or behind its address is bad."""

    inputs: dict[str, Any]


@dataclass(frozen=True)
class Cancelled:
    """A request that is cancelled after a while."""

    number: int
    after_seconds: float


Step = Good | Faulty | Hopeless | Cancelled


def publish(storage: Storage) -> list[str]:
    """Put 20 LoRAs of equal size on a host, each with a look of its own; return their addresses."""
    addresses = []
    for index in range(LORAS):
        kind = ("tok-style", "tok-object")[index % 2]
        tensors = load((DATA / "loras" / f"{kind}.safetensors").read_bytes())
        changed = {name: tensor * (0.6 + 0.04 * index) for name, tensor in tensors.items()}
        content = save({name: tensor.astype(tensors[name].dtype) for name, tensor in changed.items()})
        addresses.append(storage.put(f"/lora-{index}.safetensors", StoredFile(content, f'"{index}"')))
    return addresses


def cache_gigabytes(storage: Storage) -> float:
    """A limit for the cache into which eight of the LoRAs fit and nine do not."""
    largest = max(len(file.content) for file in storage.files.values())
    return (CACHED + 0.5) * largest / 1e9


def good_inputs(loras: list[str]) -> list[dict[str, Any]]:
    """The table: every mode, both models, both precisions, every format, none to two LoRAs."""
    photo = _data_uri(Image.linear_gradient("L").resize((256, 256)).convert("RGB"))
    mask = _data_uri(Image.radial_gradient("L").resize((256, 256)))
    square = {"aspect_ratio": "1:1", "megapixels": "0.25", "num_inference_steps": 1, "go_fast": True}
    kinds: list[dict[str, Any]] = [
        {},
        {"model": "schnell", "num_inference_steps": 2, "output_format": "webp"},
        {"image": photo, "prompt_strength": 0.6, "output_format": "jpg"},
        {"image": photo, "mask": mask, "prompt_strength": 0.9},
        {**square},
        {"num_outputs": 2, "num_inference_steps": 2},
        {"disable_safety_checker": True, "output_format": "webp", "output_quality": 30},
    ]
    table = []
    for index in range(4 * LORAS):
        inputs = {**QUICK, "prompt": PROMPTS[index % 3], "seed": index, **kinds[index % len(kinds)]}
        if index % 4:
            inputs |= {"replicate_weights": loras[index % LORAS], "lora_scale": (0.5, 1.0, 1.3)[index % 3]}
        if index % 8 == 5:
            inputs |= {"extra_lora": loras[(7 * index) % LORAS], "extra_lora_scale": 0.7}
        table.append(inputs)
    return table


def hopeless_inputs(storage: Storage) -> list[dict[str, Any]]:
    """Requests that are refused, each in its own way."""
    host = storage.address
    storage.put("/page.safetensors", StoredFile(b"<!DOCTYPE html><title>Sorry</title>"))
    storage.put("/cut.safetensors", StoredFile(bytes(999), ranges=False, declared_length=9999))
    storage.put("/broken.png", StoredFile(b"\x89PNG\r\n\x1a\n" + bytes(99)))
    storage.put("/busy.safetensors", StoredFile(b"", first=[Reply(403)] * 10**6))
    return [
        {"replicate_weights": f"{host}/missing.safetensors"},
        {"replicate_weights": f"{host}/page.safetensors"},
        {"replicate_weights": f"{host}/cut.safetensors"},
        {"replicate_weights": f"{host}/busy.safetensors"},
        {"replicate_weights": "https://127.0.0.1/x.safetensors"},
        {"extra_lora": "no lora at all"},
        {"image": f"{host}/broken.png"},
        {"image": f"{host}/missing.png"},
        {"image": "data:image/png;base64,AAAA"},
        {"mask": _data_uri(Image.new("L", (64, 64)))},
        {"prompt": "x" * 20_001},
    ]


def steps(rng: random.Random, count: int, hopeless: list[dict[str, Any]]) -> Iterator[Step]:
    """An endless random order over a table of `count` good requests."""
    faults = [*RAISED, NOT_FINITE]
    # with a LoRA, and by the model and precision that have the trip-wires
    reaching = [number for number in range(count) if number % 4 and number % 7 in (0, 2, 3, 5)]
    while True:
        number, draw = rng.randrange(count), rng.random()
        if draw < FAULTS:
            fault = rng.choice(faults)
            yield Faulty(rng.choice(reaching), rng.choice(WITH_NUMBERS if fault == NOT_FINITE else STAGES), fault)
        elif draw < FAULTS + HOPELESS:
            yield Hopeless({**QUICK, "prompt": PROMPTS[0], **rng.choice(hopeless)})
        elif draw < FAULTS + HOPELESS + CANCELS:
            yield Cancelled(number, rng.choice((0.0, 0.05, 0.2, 0.5)))
        else:
            yield Good(number)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
