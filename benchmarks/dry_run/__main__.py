"""The command `script/dry-run`: all tables in one report; fails on a figure beyond its bound."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import torch
import triton

from benchmarks.dry_run.changes import changes_table
from benchmarks.dry_run.device import CARDS
from benchmarks.dry_run.images import images_table
from benchmarks.dry_run.memory import memory_table
from benchmarks.dry_run.rewrite import rewrite_table
from benchmarks.dry_run.steps import DECODER, compiled_graphs, eager_steps, graphs_table, steps_of, steps_table
from benchmarks.dry_run.times import parts_of_an_image, times_table
from benchmarks.tables import Table

REPORT = Path(__file__).parents[1] / "dry-run.md"
INTRODUCTION = f"""# FLUX.1 at full size on a device that is not there

Made by `script/dry-run` with torch {torch.__version__.split("+")[0]}, diffusers {diffusers.__version__} and triton \
{triton.__version__}, without a GPU: the engine's own code runs on tensors that have shapes and types but no memory,
and inductor and ptxas compile its kernels for an H100. Everything below is counted; what is called modelled is worked
out from counts. Nothing is timed. Such a device cannot show whether numbers are right, how fast kernels are, what
cuBLAS and cuDNN allocate, or how memory fragments.
"""


def tables() -> Iterator[Table]:
    """All tables, one after another."""
    eager, compiled = eager_steps(), compiled_graphs()
    steps = steps_of(eager, compiled)
    yield steps_table(steps)
    changes, counts = changes_table()
    (decoder,) = compiled[DECODER].graphs
    yield changes
    yield times_table(steps, eager["first"], counts, parts_of_an_image(), decoder)
    yield memory_table(CARDS)
    yield graphs_table(compiled)
    yield rewrite_table()
    yield images_table()


def run(made: Iterator[Table], output: Path, say: Callable[[str], None] = print) -> int:
    """Write the report to `output`, name the problems, and return the exit status: 0 without any."""
    started = time.monotonic()
    done = []
    for table in made:
        done.append(table)
        seconds = time.monotonic() - started
        say(f"{seconds:4.0f} s  {table.title}: {len(table.rows)} rows, {len(table.problems)} problems")
    output.write_text("\n".join([INTRODUCTION, *(table.markdown() for table in done)]), encoding="utf-8")
    problems = [problem for table in done for problem in table.problems]
    for problem in problems:
        say(f"PROBLEM  {problem}")
    say(f"{output}: {len(problems)} problems")
    return int(bool(problems))


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="script/dry-run", description=__doc__)
    parser.add_argument("--output", type=Path, default=REPORT, help="where the report goes")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    warnings.simplefilter("ignore")
    return run(tables(), options.output)


if __name__ == "__main__":
    sys.exit(main())
