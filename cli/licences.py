"""`script/licences`: the licence of every locked package; refused where one is copyleft or unknown."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable

from cli.packages import Package, locked_packages

COPYLEFT = re.compile(
    r"\b[AL]?GPL|Affero|General Public|\bSSPL|\bEUPL|\bCECILL|\bOSL-|\bMPL|Mozilla|\bEPL|Eclipse|\bCDDL|\bCPAL"
    r"|\bCC-BY-SA|\bMS-RL|\bNC\b|NonCommercial|Sleepycat|\bQPL",
    re.IGNORECASE,
)
ALLOWED = {
    "certifi": "MPL-2.0 holds for its own files alone, the certificates, which stay as they are",
    "tqdm": "MPL-2.0 holds for its own files alone, which stay as they are",
    "hypothesis": "MPL-2.0; for tests, not shipped",
    "pathspec": "MPL-2.0; for tests, not shipped",
}
"""Copyleft for single files, unchanged, which asks nothing of ours."""


def refusals(packages: Iterable[Package]) -> list[str]:
    """What is wrong with the licences: copyleft ones that are not allowed, and unknown ones."""
    found = []
    for package in packages:
        if not package.licence:
            found.append(f"{package.name} {package.version}: no licence is known. Look at its page, then add it.")
        elif COPYLEFT.search(package.licence) and package.name not in ALLOWED:
            found.append(
                f"{package.name} {package.version}: {package.licence} is copyleft. Replace it, or allow it by name."
            )
    return found


def main() -> None:
    """The command line. Exit status 1 where a licence is refused."""
    parser = argparse.ArgumentParser(prog="script/licences", description="List and judge the licences.")
    parser.add_argument("--runtime", action="store_true", help="only what the image has")
    arguments = parser.parse_args()
    packages = [package for package in locked_packages() if package.runtime or not arguments.runtime]
    for package in packages:
        use = "image" if package.runtime else "development"
        print(f"{package.name}\t{package.version}\t{use}\t{package.licence or 'unknown'}")
    wrong = refusals(packages)
    print(*wrong, sep="\n", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
