"""Splitting the paths in names and addresses, by one rule for all services."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from lora_loading.finding.services.service import refuse

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def segments_of(path: str) -> list[str]:
    """Split at the slashes and unescape each segment once; empty segments are dropped.

    An escaped slash does not split: `refs%2Fpr%2F1` stays one segment.

    Raises:
        UnknownFormError: a segment is "." or "..", or holds a backslash or a control character.
    """
    segments = [unescaped(segment) for segment in path.split("/") if segment]
    for segment in segments:
        if holds_control(segment) or "\\" in segment:
            refuse("it holds control characters or a backslash")
        if any(part in ("", ".", "..") for part in segment.split("/")):
            refuse('it holds "." or ".." between slashes')
    return segments


def unescaped(segment: str) -> str:
    """The segment with its %-escapes decoded.

    Raises:
        UnknownFormError: they do not decode as UTF-8.
    """
    try:
        return unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        refuse("its %-escapes are not UTF-8")


def holds_control(text: str) -> bool:
    """Whether it holds control characters or line separators."""
    return _CONTROL.search(text) is not None


def is_safetensors(path: str) -> bool:
    """Whether the path names a safetensors file."""
    return path.lower().endswith(".safetensors")
