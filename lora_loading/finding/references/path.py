"""Paths inside names and addresses, taken apart the same way for every service."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from lora_loading.finding.references.named import refuse

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def segments_of(path: str) -> list[str]:
    """What lies between the slashes, unescaped once; empty ones are dropped.

    An escaped slash separates nothing, so that `refs%2Fpr%2F1` stays one.

    Raises:
        UnknownFormError: it holds "." or "..", a backslash, or characters that no path has.
    """
    segments = [unescaped(segment) for segment in path.split("/") if segment]
    for segment in segments:
        if holds_control(segment) or "\\" in segment:
            refuse("it holds characters that no path has")
        if any(part in ("", ".", "..") for part in segment.split("/")):
            refuse('it holds "." or ".." between slashes')
    return segments


def unescaped(segment: str) -> str:
    """The segment without its %-escapes.

    Raises:
        UnknownFormError: they are no text.
    """
    try:
        return unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        refuse("it holds escapes that are no text")


def holds_control(text: str) -> bool:
    """Whether there are control characters or line separators in it."""
    return _CONTROL.search(text) is not None


def is_safetensors(path: str) -> bool:
    """Whether the path names a safetensors file."""
    return path.lower().endswith(".safetensors")
