"""What must hold for any file and any reference, whoever made it up. Raises only our own errors."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open

from errors import LoraFormatError, LoraReferenceError
from fetching.containers import check_safetensors
from lora_loading.finding.reference import parse

LONGEST_LABEL = 200
LONGEST_MESSAGE = 4000


def check_header(content: bytes) -> None:
    """Write a file, check it, and open what is accepted.

    Raises:
        LoraFormatError: it is refused.
    """
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:  # noqa: PTH112
        file.write(content)
        file.flush()
        check_safetensors(Path(file.name))
        with safe_open(file.name, "np") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                opened.get_slice(name).get_shape()


def with_length(header: bytes, body: bytes = b"") -> bytes:
    """A file whose first 8 bytes give the header's length."""
    return struct.pack("<Q", len(header)) + header + body


def check_reference(text: str) -> None:
    """Parse a reference; what is accepted survives its canonical form, and nothing is too long to show.

    Raises:
        LoraReferenceError: it is refused.
    """
    reference = parse(text)
    again = parse(str(reference))
    assert again == reference
    assert again.key == reference.key
    assert len(reference.label) <= LONGEST_LABEL
    assert reference.label.isprintable()
    reference.key.encode()
    assert str(reference.key) not in ("", text) or len(text) < LONGEST_MESSAGE


def header(content: bytes) -> None:
    """A whole file after one byte; where that is odd, a header without its length, before a body as long as it says."""
    rest, words = content[1:], content[0] if content else 0
    with suppress(LoraFormatError):
        check_header(with_length(rest, bytes(2 * (words - 1))) if words % 2 else rest)


def reference(content: bytes) -> None:
    """A reference in UTF-8; bytes that are none become half surrogates, as in a broken client's JSON."""
    with suppress(LoraReferenceError):
        check_reference(content.decode("utf-8", "surrogateescape"))


TARGETS: dict[str, Callable[[bytes], None]] = {"header": header, "reference": reference}
"""What coverage-guided fuzzing calls with any bytes."""
