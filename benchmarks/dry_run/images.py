"""Whole requests in every mode, precision, size and number of LoRAs: what reaches the device and what waits for it."""

from __future__ import annotations

from benchmarks.dry_run.bounds import PLANNED_COPIES, PLANNED_SYNCS
from benchmarks.dry_run.counting import Counts, DeviceCounter
from benchmarks.dry_run.device import fake_device, fake_tensors
from benchmarks.dry_run.flux import engine_of, loras, precision_of, shortened
from benchmarks.plan import NAME_COLUMNS, SIZES, cases, request_of
from benchmarks.scales import Scale
from benchmarks.tables import Table
from request import Size

STEPS = 2
BLOCKS = shortened(2, 4)
COLUMNS = (*NAME_COLUMNS, "waits", "copies")


def images_table(
    sizes: tuple[Size, ...] = SIZES, models: tuple[str, ...] = ("dev", "schnell"), scale: Scale = BLOCKS
) -> Table:
    """One request of two steps a row; LoRAs are in place beforehand, and their change is counted elsewhere."""
    table = Table(f"Requests of {STEPS} steps, uncompiled", COLUMNS)
    counter = DeviceCounter()
    with fake_device(), fake_tensors(counter.on_sync), counter.watching():
        engine = engine_of(scale=scale)
        stacks = [loras(engine, number) for number in range(3)]
        for case in cases(sizes, models):
            precision, stack = precision_of(engine, case.precision), stacks[case.loras]
            precision.adapters[case.model].apply([(adapter, value * precision.lora_gain) for adapter, value in stack])
            counts = counter.restart()
            list(engine.generate(request_of(case, STEPS), stack))
            _add(table, counts, case.name)
    table.notes.append("With 2 double and 4 single blocks of full width: the blocks themselves neither wait nor copy.")
    table.notes += _explained()
    return table


def _add(table: Table, counts: Counts, name: tuple[object, ...]) -> None:
    waits, copies = sum(counts.syncs.values()), sum(counts.copies.values())
    table.rows.append((*name, waits, copies))
    for caller, times in counts.syncs.items():
        table.require(caller in PLANNED_SYNCS, f"{name}: {times} unplanned waits: {caller}")
    for caller, times in counts.copies.items():
        table.require(caller in PLANNED_COPIES, f"{name}: {times} unplanned copies: {caller}")


def _explained() -> list[str]:
    what = {"Waits for the device": PLANNED_SYNCS, "Copies": PLANNED_COPIES}
    return [
        f"{kind} that are planned: " + "; ".join(f"`{caller}` ({reason})" for caller, reason in reasons.items()) + "."
        for kind, reasons in what.items()
    ]
