"""What a change of LoRAs or of the model costs the device in go_fast's working copy."""

from __future__ import annotations

from benchmarks.dry_run.bounds import CHANGE_GB, CHANGE_LAUNCHES, COPIES_A_LORA
from benchmarks.dry_run.counting import CACHED_ROW, RANK, Counts, DeviceCounter
from benchmarks.dry_run.device import fake_device, fake_tensors
from benchmarks.dry_run.flux import engine_of, loras, precision_of
from benchmarks.dry_run.tables import Table, gigabytes
from benchmarks.gpu.scales import FULL, Scale

COLUMNS = ("change of the fp8 copy", "launches", "GB read and written", "copies to the device", "MB copied", "waits")
CHANGES = (
    ("to one LoRA", "dev", 1),
    ("to two LoRAs", "dev", 2),
    ("to none", "dev", 0),
    ("to the other model", "schnell", 0),
)


def changes_table(scale: Scale = FULL) -> tuple[Table, dict[str, Counts]]:
    """The table, and the counts by the names of its rows."""
    table = Table(f"LoRAs of rank {RANK} on all linear layers of the blocks, go_fast", COLUMNS)
    found: dict[str, Counts] = {}
    counter = DeviceCounter()
    with fake_device(), fake_tensors(counter.on_sync), counter.watching():
        engine = engine_of(scale=scale)
        for name, model, number in CHANGES:
            stack = loras(engine, number)
            counts = found[name] = counter.restart()
            precision_of(engine, "fast").adapters[model].apply(stack)
            copies, waits = sum(counts.copies.values()), sum(counts.syncs.values())
            moved, copied = gigabytes(counts.moved_bytes), f"{counts.copied_bytes / 1e6:.0f}"
            table.rows.append((name, counts.kernels, moved, copies, copied, waits))
            table.require(counts.moved_bytes <= CHANGE_GB[number] * 1e9, f"{name}: {moved} GB")
            table.require(counts.kernels <= CHANGE_LAUNCHES[number], f"{name}: {counts.kernels} launches")
            table.require(copies <= COPIES_A_LORA * number, f"{name}: {copies} copies")
            table.require(not waits, f"{name}: {dict(counts.syncs)}")
    table.notes.append(
        f"Rows of up to {CACHED_ROW} numbers are read twice and counted once: the second time they come from the cache."
    )
    return table, found
