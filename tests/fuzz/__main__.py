"""`script/fuzz`: the full counts, each subject in a process of its own with limits; writes benchmarks/robustness.md."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.fuzz.runs import Found, run
from tests.fuzz.subjects import ACCEPTED, REFUSED, SUBJECTS
from tests.paths import PROJECT

TARGET = PROJECT / "benchmarks" / "robustness.md"
BEGIN, END = "<!-- script/fuzz -->", "<!-- end -->"


def row(found: Found) -> str:
    """The run as a row of the table."""
    faults = len(found.faults)
    count = sum(found.outcomes.values()) + faults
    return (
        f"| {found.name} | {count:,} | {found.outcomes[ACCEPTED]:,} | {found.outcomes[REFUSED]:,} | {faults} "
        f"| {found.slowest_seconds:.2f} s | {found.grown_bytes >> 20} MiB | {found.seconds:.0f} s |"
    )


def table(all_found: list[Found]) -> str:
    """What the document holds between its marks."""
    head = "| input | mutated | accepted | refused | faults | slowest | memory grown | in all |\n"
    return head + "|---|---|---|---|---|---|---|---|\n" + "\n".join(map(row, all_found)) + "\n"


def main() -> None:
    """The command line. Exit status 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="script/fuzz", description="Fuzz with mutated inputs from fixed seeds.")
    parser.add_argument("--part", type=float, default=1.0, help="the part of the full counts to run (default 1)")
    parser.add_argument("--first", type=int, default=0, help="the first number; others give other inputs")
    parser.add_argument("--write", action="store_true", help=f"put the table into {TARGET.relative_to(PROJECT)}")
    parser.add_argument("subjects", nargs="*", default=list(SUBJECTS), help=", ".join(SUBJECTS))
    arguments = parser.parse_args()
    all_found = []
    for name in arguments.subjects:
        count = max(1, int(SUBJECTS[name][1] * arguments.part))
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # its limits are its own, its memory starts small
            found = pool.submit(run, name, count, arguments.first).result()
        print(row(found), *found.faults[:20], f"slowest: {found.slowest}", sep="\n", flush=True)
        all_found.append(found)
    if arguments.write:
        text = TARGET.read_text()
        kept = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        TARGET.write_text(f"{kept[0]}\n{table(all_found)}{kept[1]}")
    sys.exit(any(found.faults for found in all_found))


if __name__ == "__main__":
    main()
