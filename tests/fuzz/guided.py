"""Coverage-guided fuzzing of the safetensors header check and of the reference parser, with atheris.

`script/fuzz guided header|reference [libFuzzer options]` runs it in an environment of its own, since atheris is no
requirement of ours. What it finds is kept as a small corpus in `tests/data/fuzz`, which `tests/fuzz/test_fuzz.py`
replays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

with atheris.instrument_imports(include=["fetching", "lora_loading"], enable_loader_override=False):
    from tests.fuzz.targets import check_header, check_reference, with_length

from errors import LoraFormatError, LoraReferenceError


def header(content: bytes) -> None:
    """A whole file after one byte; where that is odd, a header without its length, before a body as long as it says."""
    whole, words = content[1:], content[0] if content else 0
    with suppress(LoraFormatError):
        check_header(with_length(whole, bytes(2 * (words - 1))) if words % 2 else whole)


def reference(content: bytes) -> None:
    """A reference in UTF-8; bytes that are none become half surrogates, as in a broken client's JSON."""
    with suppress(LoraReferenceError):
        check_reference(content.decode("utf-8", "surrogateescape"))


TARGETS: dict[str, Callable[[bytes], None]] = {"header": header, "reference": reference}


def main() -> None:
    """The command line: a target, then libFuzzer's folders and options."""
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
