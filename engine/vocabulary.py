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
        """The prompt's words that the model does not know, each once, in the alphabet's order."""
        return sorted(set(re.findall(r"\w+", prompt.lower())) - self.words)

    def remark(self, prompt: str) -> str | None:
        """A line for the log about the words that the model does not know; None where it knows them all.

        No log holds a prompt, and this line does not give one away: its words are out of their order, cut to 20 letters
        and at most ten, and what has digits in it, as a token or a number of an account has, is counted, not named.
        """
        unknown = self.unknown_in(prompt)
        if not unknown:
            return None
        named = [f'"{word[:LONGEST_NAMED]}"' for word in unknown if word.isalpha()][:MOST_NAMED]
        others = len(unknown) - len(named)
        listed = ", ".join(named)
        if others:
            listed = f"{listed} and {others} more" if named else f"{others} of the words"
        return f"the embedded model does not know {listed}; it draws {self.draws}"


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary that `script/make-tiny` wrote beside its models."""
    values = json.loads(path.read_text())
    return Vocabulary(frozenset(values["words"]), values["draws"])
