"""The words that a model knows, where it knows few: the tiny models' small world. A table in a file; loads no model."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

MOST_NAMED = 10
LONGEST_NAMED = 20


@dataclass(frozen=True)
class Vocabulary:
    """What a model can be asked for."""

    words: frozenset[str]
    """In lower case."""
    draws: str
    """What the model draws, for a reader of its log."""

    def unknown_in(self, prompt: str) -> list[str]:
        """The prompt's words that the model does not know, each once, in their order."""
        return [word for word in dict.fromkeys(re.findall(r"\w+", prompt.lower())) if word not in self.words]

    def remark(self, prompt: str) -> str | None:
        """A line for the log about the words that the model does not know; None where it knows them all."""
        unknown = self.unknown_in(prompt)
        if not unknown:
            return None
        named = ", ".join(f'"{word[:LONGEST_NAMED]}"' for word in unknown[:MOST_NAMED])
        more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
        return f"the embedded model does not know {named}{more}; it draws {self.draws}"


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary that `script/make-tiny` wrote beside its models."""
    values = json.loads(path.read_text())
    return Vocabulary(frozenset(values["words"]), values["draws"])
