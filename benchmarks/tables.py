"""A table of the report, with what is wrong in it. Knows nothing of what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """Rows under a heading; `problems` are figures beyond their bounds, and failures, in words."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def require(self, holds: bool, problem: str) -> None:
        """Note a problem unless it holds."""
        if not holds:
            self.problems.append(f"{self.title}: {problem}")

    def markdown(self) -> str:
        """The heading, the table and its notes."""
        lines = [f"## {self.title}", ""]
        if self.rows:
            lines += [_line(self.columns), _line(["---"] * len(self.columns)), *map(_line, self.rows), ""]
        return "\n".join([*lines, *(f"{note}\n" for note in self.notes)])


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def gigabytes(size_bytes: float) -> str:
    """With one decimal."""
    return f"{size_bytes / 1e9:.1f}"
