"""What a change of LoRAs or of the model costs the device in go_fast's working copy."""

from __future__ import annotations

from benchmarks.dry_run.bounds import CHANGE_GB, CHANGE_LAUNCHES, COPIES_A_LORA
from benchmarks.dry_run.counting import CACHED_ROW, Counts, DeviceCounter
from benchmarks.dry_run.device import fake_device, fake_tensors
from benchmarks.dry_run.flux import engine_of, loras, precision_of
from benchmarks.plan import CHANGES, RANK
from benchmarks.scales import FULL, Scale
from benchmarks.tables import Table, gigabytes

COLUMNS = ("change of the fp8 copy", "launches", "GB read and written", "copies to the device", "MB copied", "waits")


def changes_table(scale: Scale = FULL) -> tuple[Table, dict[str, Counts]]:
    """The table, and the counts by the names of its rows; with fewer blocks the bounds are so much lower."""
    table = Table(f"LoRAs of rank {RANK} on all linear layers of the blocks, go_fast", COLUMNS)
    found: dict[str, Counts] = {}
    counter = DeviceCounter()
    with fake_device(), fake_tensors(counter.on_sync), counter.watching():
        engine = engine_of(scale=scale)
        for change in CHANGES:
            name, number = change.name, change.loras
            stack = loras(engine, number)
            counts = found[name] = counter.restart()
            precision_of(engine, "fast").adapters[change.model].apply(stack)
            copies, waits = _add_row(table, name, counts)
            most = CHANGE_GB[number] * 1e9 * _weights(scale) / _weights(FULL)
            table.require(counts.moved_bytes <= most, f"{name}: {gigabytes(counts.moved_bytes)} GB")
            launches = CHANGE_LAUNCHES[number] + _layers(scale) - _layers(FULL)
            table.require(counts.kernels <= launches, f"{name}: {counts.kernels} launches")
            table.require(copies <= COPIES_A_LORA * number, f"{name}: {copies} copies")
            table.require(not waits, f"{name}: {dict(counts.syncs)}")
        two = loras(engine, 2)
        counts = counter.restart()
        engine.exact.adapters["dev"].apply(two)
        copies, waits = _add_row(table, "beside exact weights, two LoRAs", counts)
        table.require(copies <= 2 * COPIES_A_LORA and not waits, f"exact: {copies} copies, {waits} waits")
    table.notes.append(
        f"Rows of up to {CACHED_ROW} numbers are read twice and counted once: the second time they come from the "
        "cache. Without a LoRA 23.8 GB of bf16 are read and 11.9 of fp8 written. The other 6.4 GB are the longer rows "
        "(12288 in the double blocks' last layers, 15360 in the single blocks'), read from memory a second time: 16 of "
        "them are 0.4 to 0.5 MB, and those of all processors together more than the cache of 50 MB."
    )
    return table, found


def _add_row(table: Table, name: str, counts: Counts) -> tuple[int, int]:
    """Add what was counted; returns the copies to the device and the waits."""
    copies, waits = sum(counts.copies.values()), sum(counts.syncs.values())
    moved, copied = gigabytes(counts.moved_bytes), f"{counts.copied_bytes / 1e6:.0f}"
    table.rows.append((name, counts.kernels, moved, copies, copied, waits))
    return copies, waits


def _layers(scale: Scale) -> int:
    """Linear layers of the blocks: 14 in a double block, 6 in a single one."""
    return 14 * int(scale.transformer["num_layers"]) + 6 * int(scale.transformer["num_single_layers"])


def _weights(scale: Scale) -> int:
    """Those of the blocks' linear layers, in squares of the width: 36 in a double block, 15 in a single one."""
    return 36 * int(scale.transformer["num_layers"]) + 15 * int(scale.transformer["num_single_layers"])
