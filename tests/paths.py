"""Where the project and the tests' data lie."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).parent.parent
DATA = PROJECT / "tests" / "data"
LORAS = DATA / "loras"
