"""What every reference answers, and how a text that is none is refused. Knows no service."""

from __future__ import annotations

from typing import NoReturn


class Named:
    """What every reference answers; `str()` is its canonical form."""

    @property
    def label(self) -> str:
        """The name for messages and logs: short, and without payload, query or secret."""
        return shortened(str(self), 200)

    @property
    def key(self) -> str:
        """The name for an index: equal exactly when the references are, short, and without a secret."""
        return str(self)

    @property
    def immutable(self) -> bool:
        """Whether the name says exactly which content is meant, so that no service need be asked again."""
        return False


class UnknownFormError(Exception):
    """The text is no reference; the message says what was found."""


def refuse(found: str) -> NoReturn:
    """Say that the text is no reference.

    Raises:
        UnknownFormError: always.
    """
    raise UnknownFormError(found)


def shortened(text: str, limit: int = 100) -> str:
    """The text, or as much of its beginning as leaves room for three dots."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
