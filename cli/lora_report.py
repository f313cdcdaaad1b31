"""The facts of a LoRA file: format, trainer, layers, size of the change, whether it loads. Needs no model, no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from errors import LoraFormatError
from lora_loading.known_models import flux_1, tiny
from lora_loading.reading.header import Header, holds_only_zeros, read_header
from lora_loading.reading.keys import SortedFile, kind_of, sort_file
from lora_loading.reading.metadata import PeftSettings, base_model, config_from, trigger_words
from lora_loading.reading.norms import LayerSize, Measured
from lora_loading.reading.scales import Settings, notes_on_scales, settings_of
from lora_loading.shapes import COMPONENTS, ModelShapes

ADAPTER_CONFIG = "adapter_config.json"
MODELS: tuple[tuple[str, Callable[[str], ModelShapes], str], ...] = (
    ("FLUX.1 [dev]", flux_1, "dev"),
    ("FLUX.1 [schnell]", flux_1, "schnell"),
    ("tiny-dev", tiny, "dev"),
    ("tiny-schnell", tiny, "schnell"),
)
"""The models that a file is tried on, in this order, and what gives their shapes."""
TRAINING = {
    "resolution": ("modelspec.resolution", "ss_resolution"),
    "steps": ("ss_steps", "global_step", "ss_max_train_steps"),
    "epochs": ("ss_num_epochs",),
    "images": ("ss_num_train_images",),
    "learning rate": ("ss_learning_rate", "ss_unet_lr"),
    "name of the base model's file": ("ss_sd_model_name",),
}
"""What is known of the training, and the metadata that say it, the first that does."""
BLOCK = re.compile(r"(single_transformer_blocks|transformer_blocks)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Verdict:
    """Whether a file loads on a model."""

    model: str
    problem: str
    """Why not; empty if it loads."""


@dataclass(frozen=True)
class Report:
    """All facts of one file."""

    path: Path
    size_bytes: int
    header: Header
    verdicts: tuple[Verdict, ...]
    file: SortedFile | None
    """Its sorted keys; None if it loads nowhere."""
    shapes: ModelShapes
    """Of the first model on which it loads."""
    settings: Settings
    notes: tuple[str, ...] = ()
    sizes: tuple[LayerSize, ...] = ()
    """Empty unless asked for."""
    training: Mapping[str, str] = field(default_factory=dict)

    @property
    def loads_on(self) -> list[str]:
        """The models on which the file loads."""
        return [verdict.model for verdict in self.verdicts if not verdict.problem]

    @property
    def ranks(self) -> list[int]:
        """All ranks of its changes, in order."""
        layers = () if self.file is None else self.file.layers
        return sorted({change.rank for layer in layers for change in layer.changes if change.rank})

    @property
    def measured(self) -> Measured:
        """The file's numbers.

        Raises:
            ValueError: it loads nowhere.
        """
        if self.file is None:
            raise ValueError("the file loads nowhere")
        return Measured(self.path, self.header, self.file, self.settings)


def report_on(path: Path, *, with_sizes: bool = True, config: str = "") -> Report:
    """Read a file's header, try it on the known models, and measure its changes if asked to.

    `config` is PEFT's `adapter_config.json` that belongs to the file; otherwise the one beside it is read.

    Raises:
        LoraFormatError: it is not a safetensors file, or its settings cannot be read.
    """
    header = read_header(path)
    settings = settings_of(header.metadata, config_from(config) or settings_beside(path))
    tried = [(name, *_tried(path, header, shapes_of(model))) for name, shapes_of, model in MODELS]
    file, shapes = next(((file, shapes) for _, file, shapes, _ in tried if file is not None), (None, tried[0][2]))
    report = Report(
        path, path.stat().st_size, header, tuple(Verdict(name, problem) for name, _, _, problem in tried), file, shapes,
        settings, training=_training(header.metadata),
    )  # fmt: skip
    if file is None:
        return report
    sizes = tuple(report.measured.sizes()) if with_sizes else ()
    notes = (*file.notes, *notes_on_scales(file, settings), *_notes_on_numbers(sizes), *_notes_on_twice(file))
    return Report(**{**report.__dict__, "notes": notes, "sizes": sizes})


def _tried(path: Path, header: Header, shapes: ModelShapes) -> tuple[SortedFile | None, ModelShapes, str]:
    try:
        return sort_file(header, shapes, partial(holds_only_zeros, path, header)), shapes, ""
    except LoraFormatError as error:
        return None, shapes, str(error)


def settings_beside(path: Path) -> PeftSettings | None:
    """The settings of PEFT's `adapter_config.json` in the file's folder, None if there is none.

    Raises:
        LoraFormatError: a pattern of alphas in it cannot be read.
    """
    try:
        return config_from((path.parent / ADAPTER_CONFIG).read_text())
    except (OSError, UnicodeDecodeError):
        return None


def _notes_on_numbers(sizes: tuple[LayerSize, ...]) -> list[str]:
    broken = [size.layer for size in sizes if size.norm is not None and not math.isfinite(size.norm)]
    zero = [size.layer for size in sizes if size.norm == 0]
    notes = []
    if broken:
        notes.append(f"{len(broken)} layers hold numbers that are not finite, as {broken[0]}: it will be refused")
    if zero:
        notes.append(f"{len(zero)} of {len(sizes)} layers change nothing, as {zero[0]}")
    return notes


def _notes_on_twice(file: SortedFile) -> list[str]:
    names = [(layer.target.component, piece.layer.name) for layer in file.layers for piece in layer.target.pieces]
    twice = len(names) - len(set(names))
    if not twice:
        return []
    return [f"{twice} layers are in the file under two names: used once if both are equal, else refused"]


def trainer_of(header: Header) -> str:
    """The program that wrote the file, as far as its metadata tells; empty if it does not."""
    metadata = header.metadata
    if "ss_network_module" in metadata:
        return f"kohya's sd-scripts ({metadata['ss_network_module'][:60]})"
    if "ot_revision" in metadata or "ot_config" in metadata:
        return "OneTrainer"
    if "ai-toolkit" in metadata.get("software", ""):
        return "ai-toolkit"
    if metadata.get("modelspec.implementation") == "diffusers" and "global_step" in metadata:
        return "SimpleTuner"
    if "lora_adapter_metadata" in metadata:
        return "diffusers"
    return ""


def _training(metadata: Mapping[str, str]) -> dict[str, str]:
    found = {name: next((metadata[key] for key in keys if metadata.get(key)), "") for name, keys in TRAINING.items()}
    step = _step(metadata.get("training_info"))
    if step:
        found["steps"] = found["steps"] or step
    return {name: " ".join(text.split())[:80] for name, text in found.items() if text and text != "None"}


def _step(text: str | None) -> str:
    """ai-toolkit: {"step": 2000, "epoch": 10}."""
    try:
        info = json.loads(text or "{}")
    except ValueError:
        return ""
    return str(info.get("step", "")) if isinstance(info, dict) else ""


# Blocks

GROUPS: tuple[tuple[str, str, str], ...] = (
    ("transformer_blocks", "attention", r"attn\.(?!norm)"),
    ("transformer_blocks", "MLP", r"ff"),
    ("transformer_blocks", "modulation", r"norm1"),
    ("transformer_blocks", "norms", r"attn\.norm"),
    ("single_transformer_blocks", "attention", r"attn\.(?!norm)"),
    ("single_transformer_blocks", "MLP", r"proj_mlp"),
    ("single_transformer_blocks", "output", r"proj_out"),
    ("single_transformer_blocks", "modulation", r"norm\."),
    ("single_transformer_blocks", "norms", r"attn\.norm"),
)
"""The rows of the chart: the kind of block, what the layers do, and their names."""


@dataclass(frozen=True)
class Cell:
    """The layers of one kind in one block."""

    layers: int = 0
    norm: float = 0.0
    """Root of the sum of the squares of their norms; NaN if one is not known."""


def chart(report: Report) -> dict[tuple[str, str], list[Cell]]:
    """A row for each group of layers that the file changes, a cell for each block of the model."""
    counts = {kind: _block_count(report.shapes, kind) for kind in ("transformer_blocks", "single_transformer_blocks")}
    norms = {(size.component, size.layer): size.norm for size in report.sizes}
    rows: dict[tuple[str, str], list[Cell]] = {}
    for component, layer in _changed_layers(report):
        match = BLOCK.fullmatch(layer) if component == COMPONENTS[0] else None
        group = None if match is None else _group(match[1], match[3])
        if match is None or group is None:
            continue
        row = rows.setdefault(group, [Cell() for _ in range(counts[match[1]])])
        norm = norms.get((component, layer), math.nan)
        cell = row[int(match[2])]
        row[int(match[2])] = Cell(cell.layers + 1, math.hypot(cell.norm, math.nan if norm is None else norm))
    order = [(kind, name) for kind, name, _ in GROUPS]
    return {group: rows[group] for group in order if group in rows}


def _group(kind: str, name: str) -> tuple[str, str] | None:
    return next(((k, group) for k, group, pattern in GROUPS if k == kind and re.match(pattern, name)), None)


def _block_count(shapes: ModelShapes, kind: str) -> int:
    names = (BLOCK.fullmatch(name) for name in shapes.by_component[COMPONENTS[0]])
    return max((int(match[2]) + 1 for match in names if match and match[1] == kind), default=0)


def _changed_layers(report: Report) -> list[tuple[str, str]]:
    layers = () if report.file is None else report.file.layers
    names = [(layer.target.component, piece.layer.name) for layer in layers for piece in layer.target.pieces]
    return list(dict.fromkeys(names))


def layer_counts(report: Report) -> dict[str, tuple[int, int]]:
    """For each component that is changed: how many layers are, and how many it has."""
    changed = _changed_layers(report)
    counts = {c: (sum(name == c for name, _ in changed), len(report.shapes.by_component[c])) for c in COMPONENTS}
    return {component: pair for component, pair in counts.items() if pair[0]}


def total_norm(report: Report) -> float | None:
    """The norm of all changes together, None if some are not known."""
    norms = [size.norm for size in report.sizes]
    known = [norm for norm in norms if norm is not None]
    return math.hypot(*known) if known and len(known) == len(norms) else None


def as_json(report: Report) -> dict[str, Any]:
    """The report for programs."""
    file = report.file
    return {
        "file": report.path.name,
        "bytes": report.size_bytes,
        "loads_on": report.loads_on,
        "problem": "" if report.loads_on else report.verdicts[0].problem,
        "format": None if file is None else file.format,
        "kinds": [] if file is None else sorted({kind_of(layer.changes) for layer in file.layers}),
        "ranks": report.ranks,
        "trainer": trainer_of(report.header),
        "base_model": base_model(report.header.metadata),
        "trigger_words": list(trigger_words(report.header.metadata)),
        "training": dict(report.training),
        "layers": {name: {"changed": n, "of": of} for name, (n, of) in layer_counts(report).items()},
        "blocks": [
            {"blocks": kind, "layers": group, "counts": [cell.layers for cell in row], "norms": _norms(report, row)}
            for (kind, group), row in chart(report).items()
        ],
        "norm": total_norm(report),
        "left_out": [] if file is None else list(file.left_out),
        "notes": list(report.notes),
        "tensors": len(report.header.tensors),
    }


def _norms(report: Report, row: list[Cell]) -> list[float | None]:
    if not report.sizes:
        return []
    return [round(cell.norm, 6) if math.isfinite(cell.norm) else None for cell in row]


# Two files


@dataclass(frozen=True)
class Comparison:
    """What two files have in common."""

    both: int
    only_first: int
    only_second: int
    cosine: float | None
    """Of the low-rank changes of the layers in both: 1 is the same direction, 0 nothing in common."""
    ratio: float | None
    """The second's size over the first's, in those layers."""


def compare(first: Report, second: Report) -> Comparison:
    """Compare two files layer by layer, whatever their formats.

    Raises:
        ValueError: one of them loads nowhere.
    """
    ours, theirs = set(_changed_layers(first)), set(_changed_layers(second))
    one, other = first.measured.factors(), second.measured.factors()
    common = one.keys() & other.keys()
    dot = sum(one[name].dot(other[name]) for name in common)
    squares = [sum(factors[name].dot(factors[name]) for name in common) for factors in (one, other)]
    known = bool(common) and min(squares) > 0
    return Comparison(
        both=len(ours & theirs),
        only_first=len(ours - theirs),
        only_second=len(theirs - ours),
        cosine=dot / math.sqrt(squares[0] * squares[1]) if known else None,
        ratio=math.sqrt(squares[1] / squares[0]) if known else None,
    )
