"""`script/soak --minutes N`. Exit status 1 if an image was wrong or good requests failed too often."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.paths import PROJECT
from tests.soak import report
from tests.soak.run import soak

DOCUMENT = PROJECT / "docs" / "robustness.md"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="script/soak", description="Mixed requests with faults, for a long time.")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0, help="another one gives another order")
    parser.add_argument("--samples", type=Path, help="keep the samples there, as JSON")
    parser.add_argument("--write", action="store_true", help="put table and plot into docs/robustness.md")
    arguments = parser.parse_args()
    tally, probe = soak(arguments.minutes, arguments.seed, lambda text: print(text, flush=True))
    print(report.table(tally, probe), *tally.complaints[:50], sep="\n")
    print("kinds:", dict(tally.kinds))
    if arguments.samples:
        arguments.samples.write_text(json.dumps({"seconds": probe.seconds, **probe.samples}))
    if arguments.write:
        report.write(DOCUMENT, tally, probe)
    sys.exit(not tally.passed)


if __name__ == "__main__":
    main()
