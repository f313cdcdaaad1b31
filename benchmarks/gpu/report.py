"""The rows as JSON and as Markdown. Both are written anew after every row, so that nothing measured is ever lost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.gpu.floor import Floor
from benchmarks.gpu.plan import Case, Change, Job
from benchmarks.gpu.rows import ChangeTimes, Times, Unloaded

MEASURED, NOT_RUN, NOT_INSTALLED, FAILED = "measured", "not run", "not installed", "failed"


@dataclass
class Row:
    """A planned row, and what came of it."""

    job: Job
    status: str = NOT_RUN
    reason: str = ""
    figures: Times | ChangeTimes | Unloaded | None = None


@dataclass
class Report:
    """All of a run."""

    scale: str
    machine: Mapping[str, str]
    budget_minutes: float
    rows: list[Row]
    seconds: dict[str, float] = field(default_factory=dict)
    """What each part of the run took, the stages with all their rows."""
    clocks: dict[str, Mapping[str, str]] = field(default_factory=dict)
    floor: Floor | None = None

    def write(self, folder: Path) -> None:
        """Write gpu.json and gpu.md, each as a whole or not at all."""
        _replace(folder / "gpu.json", json.dumps(self._data(), indent=1) + "\n")
        _replace(folder / "gpu.md", "\n".join(self._lines()) + "\n")

    def _data(self) -> dict[str, object]:
        return {
            "scale": self.scale,
            "machine": dict(self.machine),
            "clocks": {when: dict(values) for when, values in self.clocks.items()},
            "budget_minutes": self.budget_minutes,
            "seconds": self.seconds,
            "floor": None if self.floor is None else asdict(self.floor),
            "rows": [_row_data(row) for row in self.rows if isinstance(row.job, Case)],
            "changes": [_row_data(row) for row in self.rows if isinstance(row.job, Change)],
        }

    def _lines(self) -> Iterable[str]:
        yield "# Measured on a GPU" if self.scale == "full" else "# A trial of the measurements, with tiny models"
        yield ""
        yield from _said(self)
        if self.floor is not None:
            yield from _floor_lines(self.floor)
        yield from _times_lines([row for row in self.rows if isinstance(row.figures, Times)])
        yield from _change_lines(self.rows)
        yield from _missing_lines([row for row in self.rows if row.status != MEASURED])


def _row_data(row: Row) -> dict[str, object]:
    figures = {} if row.figures is None else asdict(row.figures)
    return {**asdict(row.job), "status": row.status, "reason": row.reason, **figures}


def _said(report: Report) -> Iterable[str]:
    yield f"`script/bench gpu`: {', '.join(f'{n} {v}' if n != 'device' else v for n, v in report.machine.items())}."
    for when, values in report.clocks.items():
        if values:
            yield f"{when}: {', '.join(f'{name} {value}' for name, value in values.items())}."
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items())
    yield f"Budget {report.budget_minutes:g} minutes: {spent or 'nothing run yet'}."
    yield ""
    yield "Random weights; one image from text, the prompt always a new one, webp; medians."
    yield ""


def _floor_lines(floor: Floor) -> Iterable[str]:
    yield "## The floor: this machine's kernels at FLUX's shapes"
    yield ""
    yield from _table(
        ("kernel", "ms", "TFLOP/s"),
        [
            *((f"({p.m}, {p.k}) x ({p.k}, {p.n}), {p.arithmetic}", p.milliseconds, p.tflops) for p in floor.products),
            *(
                (f"attention (1, {a.heads}, {a.tokens}, {a.head_size}), {a.backend}", a.milliseconds, a.tflops)
                for a in floor.attention
            ),
        ],
    )
    yield f"Copying: {floor.copy_gb_per_second:.0f} GB/s, read and written."
    yield ""
    yield "The floor of a step is its matrix products and its attention at these rates; nothing else is in it."
    yield ""


def _times_lines(rows: Sequence[Row]) -> Iterable[str]:
    if not rows:
        return
    yield "## Images"
    yield ""
    head = (
        "contender", "model", "size", "LoRAs", "ms a step", "TFLOP/s", "floor ms", "share of floor", "end to end s",
        "text", "denoise", "decode", "webp", "rest", "peak GiB", "compile s", "graphs", "recompiled",
    )  # fmt: skip
    yield from _table(head, [_times_cells(row.job, row.figures) for row in rows])
    yield from (
        "- Times marked * are worked out: an image of few steps, and the other steps at their pace.",
        "- The floor of what runs in fp8 is that of fp8 products, of everything else that of exact ones.",
        "- Peak: without the weights that the row has no need of.",
        "- cache-dit leaves out parts of steps, which counts as done here; how many, random weights do not tell.",
        "",
    )


def _times_cells(job: Job, times: object) -> tuple[object, ...]:
    if not isinstance(job, Case) or not isinstance(times, Times):
        raise TypeError(f"{job} has no times")
    mark = "" if times.end_to_end == MEASURED else "*"
    return (
        job.contender, job.model, f"{job.width}x{job.height}", _loras(job.loras, job.rank),
        times.milliseconds_a_step, times.tflops, times.floor_milliseconds, f"{times.share_of_floor:.2f}",
        f"{times.end_to_end_seconds:.3f}{mark}", f"{times.text_seconds:.3f}", f"{times.denoise_seconds:.3f}{mark}",
        f"{times.decode_seconds:.3f}", f"{times.encode_seconds:.3f}", f"{times.rest_seconds:.3f}", times.peak_gib,
        times.compile_seconds, times.compilations, times.recompilations,
    )  # fmt: skip


def _change_lines(rows: Iterable[Row]) -> Iterable[str]:
    timed = [(row.job, row.figures) for row in rows if isinstance(row.figures, ChangeTimes)]
    checked = [(row.job, row.figures) for row in rows if isinstance(row.figures, Unloaded)]
    if timed:
        yield "## Changes"
        yield ""
        yield from _table(
            ("contender", "change", "p50 ms", "p95 ms", "of"),
            [(j.contender, _change(j), f.p50_milliseconds, f.p95_milliseconds, f.count) for j, f in timed],
        )
    for job, figures in checked:
        weights, image = (
            "equal to the bit" if equal else "NOT equal"
            for equal in (figures.bit_equal_weights, figures.bit_equal_image)
        )
        yield f"{job.contender}, after {_change(job)}: weights {weights}, image {image}."
    yield ""


def _missing_lines(rows: Sequence[Row]) -> Iterable[str]:
    if not rows:
        return
    yield "## Without figures"
    yield ""
    yield from _table(("row", "why"), [(_name(row.job), f"{row.status}: {row.reason}".rstrip(": ")) for row in rows])


def _name(job: Job) -> str:
    if isinstance(job, Change):
        return f"{job.contender}: {_change(job)}"
    return f"{job.contender}: {job.model} {job.width}x{job.height}, LoRAs: {_loras(job.loras, job.rank)}"


def _loras(count: int, rank: int) -> str:
    return f"{count} of rank {rank}" if count else "none"


def _change(job: Job) -> str:
    if not isinstance(job, Change):
        raise TypeError(f"{job} is no change")
    return f"{job.what}, rank {job.rank}" if job.rank else job.what


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterable[str]:
    """Markdown; floats with three significant digits or as whole numbers."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(_cell, row))} |"
    yield ""


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text)
    beside.replace(path)
