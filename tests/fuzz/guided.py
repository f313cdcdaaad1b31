"""Coverage-guided fuzzing of the safetensors header check and of the reference parser, with atheris.

`script/fuzz guided header|reference [seconds]` runs it in an environment of its own, since atheris is no requirement of
ours. What it finds is kept in `tests/data/fuzz`, an input a line, which `tests/fuzz/test_fuzz.py` replays.
"""

from __future__ import annotations

import sys

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

with atheris.instrument_imports(include=["fetching", "lora_loading"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """The command line: a target, then libFuzzer's folders and options."""
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
