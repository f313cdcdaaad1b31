"""The inputs that coverage-guided fuzzing found, one a line in base64.

python -m tests.fuzz.corpus unpack|pack header|reference FOLDER
"""

from __future__ import annotations

import base64
import hashlib
import sys
from pathlib import Path

from tests.paths import DATA

LONGEST = 2000
MOST = 400


def kept(target: str) -> list[bytes]:
    """The inputs of a target."""
    return [base64.b64decode(line) for line in _file(target).read_text().splitlines()]


def unpack(target: str, folder: Path) -> None:
    """Write each input into a file, as libFuzzer names them."""
    for content in kept(target):
        (folder / hashlib.sha1(content).hexdigest()).write_bytes(content)


def pack(target: str, folder: Path) -> None:
    """Keep the files of a folder, the shortest first, at most 400 of them."""
    found = {file.read_bytes() for file in folder.iterdir()}
    short = sorted((content for content in found if len(content) <= LONGEST), key=lambda c: (len(c), c))[:MOST]
    _file(target).write_text("".join(f"{base64.b64encode(content).decode()}\n" for content in short))


def _file(target: str) -> Path:
    return DATA / "fuzz" / f"{target}.txt"


if __name__ == "__main__":
    {"pack": pack, "unpack": unpack}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
