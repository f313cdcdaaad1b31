"""Regular expressions written by strangers, matched in time linear in the text.

PEFT's `alpha_pattern` maps regular expressions to alphas. `re` would follow PEFT exactly, but an expression such as
`(a+)+b` keeps it busy for hours. Here an expression becomes a small automaton whose states are followed all at once.

Read are characters, `.`, escapes (`\\.` `\\d` `\\w` `\\s` and their opposites), classes, groups, `|`, `* + ? {m,n}`,
`^` and `$`. What else `re` knows, such as lookaheads and references, is refused rather than guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_STATES = 1000
MAX_PATTERN = 400
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdigit,
    "D": lambda c: not c.isdigit(),
    "w": lambda c: c.isalnum() or c == "_",
    "W": lambda c: not (c.isalnum() or c == "_"),
    "s": str.isspace,
    "S": lambda c: not c.isspace(),
}
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?", re.ASCII)
"""Names with dots, as in most files: without repetition, `re` itself is linear."""

Step = Callable[[str], bool]
BEGIN, END = "begin", "end"


class PatternError(ValueError):
    """The expression cannot be read, or is too large."""


@dataclass
class _State:
    """Where it can go: freely, at the beginning or end of the text, or over a character that `step` accepts."""

    free: list[int] = field(default_factory=list)
    anchors: list[tuple[str, int]] = field(default_factory=list)
    steps: list[tuple[Step, int]] = field(default_factory=list)


class Pattern:
    """One expression of PEFT's; `matches` answers as `re.match(rf"(.*\\.)?({expression})$", name)` does."""

    def __init__(self, expression: str) -> None:
        """Read the expression.

        Raises:
            PatternError: it cannot be read.
        """
        if len(expression) > MAX_PATTERN:
            raise PatternError(f"it has more than {MAX_PATTERN} characters")
        self._plain = re.compile(rf"(?:.*\.)?(?:{expression})$") if _PLAIN.fullmatch(expression) else None
        self._end = expression.strip("^$").rpartition(".")[2] if self._plain else ""
        self._automaton = None if self._plain else _Automaton(expression)

    def matches(self, name: str) -> bool:
        """Whether the expression names the module."""
        if self._plain is not None:
            return name.endswith(self._end) and self._plain.match(name) is not None
        return self._automaton is not None and self._automaton.matches(name)


class _Automaton:
    """States and transitions of `(.*\\.)?(expression)$`; built by reading the expression from left to right."""

    def __init__(self, expression: str) -> None:
        self._states: list[_State] = []
        self._text, self._at = expression, 0
        start, module = self._new(), self._new()
        self._states[start].steps.append((lambda _: True, start))
        self._states[start].steps.append((lambda c: c == ".", module))
        first, last = self._alternatives()
        if self._at < len(self._text):
            raise PatternError("a bracket is closed that was not opened")
        self._states[module].free.append(first)
        self._start, self._first, self._last = start, first, last

    def matches(self, name: str) -> bool:
        current = self._closure({self._start, self._first}, True, not name)
        for index, character in enumerate(name):
            reached = {to for state in current for step, to in self._states[state].steps if step(character)}
            current = self._closure(reached, False, index == len(name) - 1)
        return self._last in current

    def _closure(self, states: set[int], at_begin: bool, at_end: bool) -> set[int]:
        waiting, seen = list(states), set(states)
        while waiting:
            state = self._states[waiting.pop()]
            met = [to for anchor, to in state.anchors if (at_begin if anchor == BEGIN else at_end)]
            for to in (*state.free, *met):
                if to not in seen:
                    seen.add(to)
                    waiting.append(to)
        return seen

    # Reading: each method returns the first and the last state of what it has read

    def _new(self) -> int:
        if len(self._states) >= MAX_STATES:
            raise PatternError(f"it needs more than {MAX_STATES} states")
        self._states.append(_State())
        return len(self._states) - 1

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        character = self._peek()
        if not character:
            raise PatternError("it ends too early")
        self._at += 1
        return character

    def _alternatives(self) -> tuple[int, int]:
        first, last = self._new(), self._new()
        while True:
            begin, end = self._sequence()
            self._states[first].free.append(begin)
            self._states[end].free.append(last)
            if self._peek() != "|":
                return first, last
            self._take()

    def _sequence(self) -> tuple[int, int]:
        first = last = self._new()
        while self._peek() not in ("", "|", ")"):
            begin, end = self._repeated()
            self._states[last].free.append(begin)
            last = end
        return first, last

    def _repeated(self) -> tuple[int, int]:
        start = self._at
        begin, end = self._atom()
        if self._peek() not in ("*", "+", "?", "{"):
            return begin, end
        least, most = self._counts()
        if self._peek() == "?":  # lazy: of no consequence for whether there is a match
            self._take()
        if self._peek() in ("*", "+", "?", "{"):
            raise PatternError("it repeats a repetition")
        return self._copies(start, begin, end, least, most)

    def _counts(self) -> tuple[int, int | None]:
        sign = self._take()
        if sign != "{":
            return (1 if sign == "+" else 0), (1 if sign == "?" else None)
        match = re.compile(r"(\d{1,3})(,?)(\d{0,3})\}").match(self._text, self._at)
        if match is None:
            raise PatternError("a count in braces cannot be read")
        self._at = match.end()
        least = int(match[1])
        most = least if not match[2] else int(match[3]) if match[3] else None
        if most is not None and most < least:
            raise PatternError("a count in braces is the wrong way round")
        return least, most

    def _copies(self, start: int, begin: int, end: int, least: int, most: int | None) -> tuple[int, int]:
        """The atom that was read from `start`, repeated; each copy after the first is read again."""
        after = self._at
        first, last = self._new(), self._new()
        copies = [(begin, end)]
        for _ in range(max(least, most or 1) - 1):
            self._at = start
            copies.append(self._atom())
        self._at = after
        at = first
        for index, (copy_begin, copy_end) in enumerate(copies):
            if index >= least:
                self._states[at].free.append(last)
            self._states[at].free.append(copy_begin)
            at = copy_end
        self._states[at].free.append(last)
        if most is None:
            self._states[at].free.append(copies[-1][0])
        if most == 0:
            self._states[first].free = [last]
        return first, last

    def _atom(self) -> tuple[int, int]:
        character = self._take()
        if character == "(":
            return self._group()
        if character in "*+?{":
            raise PatternError("there is nothing to repeat")
        first, last = self._new(), self._new()
        if character in "^$":
            self._states[first].anchors.append((BEGIN if character == "^" else END, last))
        else:
            self._states[first].steps.append((self._step(character), last))
        return first, last

    def _group(self) -> tuple[int, int]:
        if self._peek() == "?":
            self._take()
            if self._take() != ":":
                raise PatternError("it has a group of a kind that is not read")
        inner = self._alternatives()
        if self._take() != ")":
            raise PatternError("a bracket is not closed")
        return inner

    def _step(self, character: str) -> Step:
        if character == ".":
            return lambda c: c != "\n"
        if character == "[":
            return self._class()
        if character == "\\":
            return self._escape()
        return lambda c: c == character

    def _escape(self) -> Step:
        character = self._take()
        if character in _CLASSES:
            return _CLASSES[character]
        if character.isalnum():
            raise PatternError(f'it has "\\{character}", which is not read')
        return lambda c: c == character

    def _class(self) -> Step:
        negated = self._peek() == "^"
        if negated:
            self._take()
        steps: list[Step] = []
        while not steps or self._peek() != "]":
            steps.append(self._member())
        self._take()
        return lambda c: any(step(c) for step in steps) != negated

    def _member(self) -> Step:
        character = self._take()
        if character == "\\":
            return self._escape()
        if self._peek() != "-" or self._text[self._at + 1 : self._at + 2] in ("]", ""):
            return lambda c: c == character
        self._take()
        upper = self._take()
        if upper == "\\" or upper < character:
            raise PatternError("a range of characters cannot be read")
        return lambda c: character <= c <= upper
