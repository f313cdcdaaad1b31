"""The command: script/bench gpu [--tiny] [--minutes 9] [--output FILE]."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.loras import Loras
from benchmarks.gpu.rows import tables
from benchmarks.models import build_weights
from benchmarks.scales import FULL, TINY, Scale
from benchmarks.tables import Table
from logs import configure_logging
from lora_loading.shapes import COMPONENTS, shapes_of

CLOCKS = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


def introduction(scale: Scale, device: torch.device) -> str:
    """What was measured, and on what."""
    title = "# Measured on a GPU" if scale is FULL else "# A trial of the measurements, with tiny models"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "diffusers", "torchao", "peft"))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    return f"{title}\n\n`script/bench gpu` on {where} with {packages}. {_clocks()}Random weights; medians.\n"


def _clocks() -> str:
    """The first GPU's driver, clocks (MHz), power (W) and temperature as nvidia-smi has them; empty where it is not."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={CLOCKS}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{CLOCKS}: {line.strip()}. "


def run(scale: Scale, device: torch.device, minutes: float, output: Path) -> list[Table]:
    """Measure what there is time for; the report is written anew after each table, so nothing measured is lost."""
    started, done = time.monotonic(), list[Table]()
    beginning = introduction(scale, device)
    with TemporaryDirectory() as folder:
        for table in _measured(scale, device, Path(folder)):
            if done and done[-1].title == table.title:
                done[-1].rows += table.rows
            else:
                done.append(table)
            output.write_text("\n".join([beginning, *(made.markdown() for made in done)]), encoding="utf-8")
            if time.monotonic() - started > 60 * minutes:
                break
    return done


def _measured(scale: Scale, device: torch.device, folder: Path) -> Iterator[Table]:
    weights = build_weights(scale, device)
    modules = {"transformer": weights.transformers["dev"], **weights.shared}
    loras = Loras(folder, weights.transformers["dev"], shapes_of({name: modules[name] for name in COMPONENTS}))
    yield from tables(scale, Clock(device), weights, loras)


def main() -> None:
    """Measure, and print the report."""
    parser = argparse.ArgumentParser(prog="script/bench gpu", description="Measure ours beside diffusers on one GPU.")
    parser.add_argument("--tiny", action="store_true", help="the same rows with tiny models, on a CPU too")
    parser.add_argument("--minutes", type=float, default=9, help="no table is begun after that")
    parser.add_argument("--output", type=Path, help="where the report goes; benchmarks/gpu.md unless --tiny")
    arguments = parser.parse_args()
    configure_logging()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        sys.exit("There is no CUDA device to measure. Run it on one, or with --tiny for a trial on this machine.")
    with TemporaryDirectory() as folder:
        standard = Path(folder) / "gpu.md" if arguments.tiny else Path(__file__).parents[1] / "gpu.md"
        output = arguments.output or standard
        done = run(TINY if arguments.tiny else FULL, device, arguments.minutes, output)
        print(output.read_text(encoding="utf-8"))
    problems = [problem for table in done for problem in table.problems]
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
