"""What asking one service has in common with asking another: headers, addresses, texts, answers of another shape."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from errors import DownloadError, HttpStatusError
from lora_loading.finding.references.named import shortened

Headers = tuple[tuple[str, str], ...]

_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")


def bearer(token: str | None) -> Headers:
    """The headers that a token is sent in; none without one."""
    return () if token is None else (("Authorization", f"Bearer {token}"),)


def moved(address: str, endpoint: str) -> str:
    """An address of a service at our endpoint for it: a mirror, or the service itself, and so safe for its token."""
    parts = urlsplit(address)
    return f"{endpoint}{parts.path}{'?' if parts.query else ''}{parts.query}"


@contextmanager
def known_shape(service: str) -> Iterator[None]:
    """Turn what unexpected JSON raises into a DownloadError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DownloadError(f"{service} answered with JSON of a shape that we do not know. Try again later.") from error


def json_object(error: HttpStatusError) -> dict[str, Any]:
    """The JSON object of an answer, empty if it is none."""
    try:
        body = json.loads(error.body)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def sha256_digest(text: str | None) -> str | None:
    """The text in lower case if it is a sha256 in hexadecimal digits."""
    return text.lower() if text is not None and _SHA256.fullmatch(text) else None


def one_line(text: str) -> str:
    """The text with everything unprintable as blanks, shortened."""
    return shortened(" ".join("".join(c if c.isprintable() else " " for c in text).split()), 200)
