"""The command: script/bench gpu [--tiny] [--minutes 9] [--output FOLDER]."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from logs import configure_logging


def main() -> None:
    """Measure, and print the report."""
    parser = argparse.ArgumentParser(prog="script/bench gpu", description="Measure ours beside its peers on one GPU.")
    parser.add_argument("--tiny", action="store_true", help="the same rows with tiny models, on a CPU too")
    parser.add_argument("--minutes", type=float, default=9, help="rows that are not begun by then are left out")
    parser.add_argument("--output", type=Path, help="where gpu.json and gpu.md go; benchmarks/, or a temporary folder")
    arguments = parser.parse_args()
    configure_logging()
    import torch

    from benchmarks.gpu.plan import stages
    from benchmarks.gpu.run import run
    from benchmarks.gpu.scales import FULL, TINY

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        sys.exit("There is no CUDA device to measure. Run it on one, or with --tiny for a trial on this machine.")
    output: Path = arguments.output or Path(tempfile.mkdtemp() if arguments.tiny else Path(__file__).parent.parent)
    output.mkdir(parents=True, exist_ok=True)
    scale = TINY if arguments.tiny else FULL
    run(scale, stages(scale), device, arguments.minutes, output)
    print((output / "gpu.md").read_text())
    print(f"Written to {output / 'gpu.json'} and gpu.md")


if __name__ == "__main__":
    main()
