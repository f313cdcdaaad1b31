"""Go through the plan while there is time, and write the report after every row."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.contenders import Bench, Contender, Ours, is_installed, open_contender
from benchmarks.gpu.floor import Floor, measure_floor
from benchmarks.gpu.loras import Loras
from benchmarks.gpu.machine import clocks, machine
from benchmarks.gpu.models import build_weights
from benchmarks.gpu.plan import DEV, UNLOAD, Budget, Case, Job, Stage
from benchmarks.gpu.report import FAILED, MEASURED, NOT_INSTALLED, Report, Row
from benchmarks.gpu.rows import ChangeTimes, Times, Unloaded, check_unload, time_case, time_change
from benchmarks.gpu.scales import Scale
from lora_loading.shapes import COMPONENTS, shapes_of

logger = logging.getLogger(__name__)


def run(scale: Scale, plan: Sequence[Stage], device: torch.device, minutes: float, output: Path) -> Report:
    """Measure what there is time for; gpu.json and gpu.md in `output` are up to date after every row."""
    budget = Budget(minutes * 60)
    rows = {stage.name: [Row(job) for job in stage.jobs] for stage in plan}
    report = Report(scale.name, machine(device), minutes, [row for own in rows.values() for row in own])
    report.clocks["At the start"] = clocks()
    report.write(output)
    clock = Clock(device)
    if budget.is_spent:
        return report
    report.floor = floor = measure_floor(scale, clock)
    report.clocks["After the floor"] = clocks()
    report.seconds["floor"] = budget.used_seconds
    report.write(output)
    with TemporaryDirectory() as folder:
        bench = _bench(scale, clock, Path(folder))
        report.seconds["models"] = budget.used_seconds - report.seconds["floor"]
        for index, stage in enumerate(plan):
            started = time.monotonic()
            deadline = budget.deadline(stage, plan[index + 1 :])
            _run_stage(bench, stage, rows[stage.name], deadline, floor, report, output)
            torch.compiler.reset()
            clock.free()
            report.seconds[stage.name] = time.monotonic() - started
    report.clocks["At the end"] = clocks()
    report.write(output)
    return report


def _bench(scale: Scale, clock: Clock, folder: Path) -> Bench:
    weights = build_weights(scale, clock.device)
    modules = {"transformer": weights.transformers[DEV], **weights.shared}
    shapes = shapes_of({name: modules[name] for name in COMPONENTS})
    return Bench(scale, clock, weights, Loras(folder, weights.transformers[DEV], shapes))


def _run_stage(
    bench: Bench, stage: Stage, rows: Sequence[Row], deadline: float, floor: Floor, report: Report, output: Path
) -> None:
    if not is_installed(stage.name):
        for row in rows:
            row.status, row.reason = NOT_INSTALLED, f"pip install {stage.name}"
        report.write(output)
        return
    if time.monotonic() >= deadline:
        return
    contender: Contender | None = None
    for row in rows:
        if time.monotonic() >= deadline:
            return
        try:
            contender = contender or open_contender(stage.name, bench)
            row.figures = _measure(bench, contender, row.job, floor)
            row.status, row.reason = MEASURED, ""
        except Exception as error:  # whatever one contender's libraries raise, the others' rows are worth having
            logger.exception("%s failed", row.job)
            row.status, row.reason = FAILED, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        logger.info("%s: %s", row.job, row.figures or row.reason)
        report.write(output)


def _measure(bench: Bench, contender: Contender, job: Job, floor: Floor) -> Times | ChangeTimes | Unloaded:
    if isinstance(job, Case):
        return time_case(bench, contender, job, floor)
    if job.what == UNLOAD and isinstance(contender, Ours):
        return check_unload(bench, contender, job)
    return time_change(bench, contender, job)
