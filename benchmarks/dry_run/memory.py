"""The most memory on each card, counted allocation by allocation, beside what the memory plan says."""

from __future__ import annotations

import math

from benchmarks.dry_run.bounds import PLAN_ACCURACY
from benchmarks.dry_run.counting import DeviceCounter
from benchmarks.dry_run.device import Card, fake_device, fake_tensors
from benchmarks.dry_run.flux import dora, engine_of, flux_sizes, loras
from benchmarks.plan import Case, request_of
from benchmarks.scales import FULL, Scale
from benchmarks.tables import Table, gigabytes
from engine.engine import Engine
from engine.memory_plan import LARGEST, RESERVE_BYTES, Plan, plan_memory
from engine.precision import RESERVED_RANK
from request import Mode

COLUMNS = ("card", "layout", "serves", "at rest", "most, counted", "most, planned")


def memory_table(cards: tuple[Card, ...], scale: Scale = FULL) -> Table:
    """GB on each card: at rest, and the most while the largest images are made with and without LoRAs."""
    table = Table("Memory on the device, in GB", COLUMNS)
    for card in cards:
        plan = plan_memory(flux_sizes(scale), card.memory_bytes)
        resting, most = _measured(card, plan, scale)
        planned = plan.needed_bytes - RESERVE_BYTES
        layout = (card.name, plan.layout.name, " and ".join(plan.precisions))
        table.rows.append((*layout, *map(gigabytes, (resting, most, planned))))
        table.require(
            abs(most - planned) <= PLAN_ACCURACY * planned,
            f"{card.name}: at most {gigabytes(most)} GB counted, {gigabytes(planned)} planned",
        )
        for new_bytes in dict.fromkeys((plan.spare_bytes, None)):
            most, there = _most_with_new_weights(card, plan, scale, new_bytes), card.memory_bytes - RESERVE_BYTES
            what = "all layers" if new_bytes is None else f"{gigabytes(new_bytes)} GB"
            table.require(most <= there, f"{card.name}, a DoRA of {what}: at most {gigabytes(most)} GB counted")
    table.notes.append(
        f"The largest images are {LARGEST.width}x{LARGEST.height}, uncompiled, in every served precision, with "
        f"two LoRAs of rank {RESERVED_RANK // 2} and none. The plan's reserve of {gigabytes(RESERVE_BYTES)} GB and the "
        "safety checker are left out on both sides."
    )
    return table


def _measured(card: Card, plan: Plan, scale: Scale) -> tuple[int, int]:
    """The bytes at rest, and the most."""
    counter = DeviceCounter()
    with fake_device(card), fake_tensors(counter.on_sync), counter.watching():
        engine = engine_of(plan.layout, scale, spare_bytes=plan.spare_bytes)
        resting = counter.live_bytes
        _make_the_largest(engine, plan)
        return resting, counter.most_bytes


def _most_with_new_weights(card: Card, plan: Plan, scale: Scale, new_bytes: int | None) -> int:
    """The most bytes while both models take turns in every served precision with a DoRA, and without.

    Args:
        card: the device.
        plan: its plan.
        scale: the models' sizes.
        new_bytes: which weights the DoRA makes anew at most; None for all linear layers of the blocks.
    """
    counter = DeviceCounter()
    with fake_device(card), fake_tensors(counter.on_sync), counter.watching():
        engine = engine_of(plan.layout, scale, spare_bytes=plan.spare_bytes)
        stack = dora(engine, math.inf if new_bytes is None else new_bytes)
        for precision in plan.precisions:
            for model, loras_of_request in (("dev", stack), ("schnell", stack), ("dev", [])):
                case = Case(model, precision, Mode.TXT2IMG, LARGEST, len(loras_of_request))
                list(engine.generate(request_of(case, steps=1), loras_of_request))
        return counter.most_bytes


def _make_the_largest(engine: Engine, plan: Plan) -> None:
    for precision in plan.precisions:
        for stack in (loras(engine, 2, RESERVED_RANK // 2), []):
            for mode in (Mode.TXT2IMG, Mode.INPAINT):
                case = Case("dev", precision, mode, LARGEST, len(stack))
                list(engine.generate(request_of(case, steps=1), stack))
