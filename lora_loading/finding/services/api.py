"""Helpers that the services' APIs share: headers, addresses, JSON of an unexpected shape."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from errors import DownloadError, HttpStatusError
from lora_loading.finding.services.service import shortened

Headers = tuple[tuple[str, str], ...]

_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")


def bearer(token: str | None) -> Headers:
    """The Authorization header for a token; empty without one."""
    return () if token is None else (("Authorization", f"Bearer {token}"),)


def rebased_on(address: str, endpoint: str) -> str:
    """The address with its scheme and host replaced by the endpoint's, so that the token goes to no other host."""
    parts = urlsplit(address)
    return f"{endpoint}{parts.path}{'?' if parts.query else ''}{parts.query}"


@contextmanager
def translating_bad_json(service: str) -> Iterator[None]:
    """Turn the exceptions that JSON of an unexpected shape causes into a DownloadError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DownloadError(f"{service} answered with JSON of an unknown shape. Try again later.") from error


def json_object(error: HttpStatusError) -> dict[str, Any]:
    """The JSON object in the body of an error answer; empty if there is none."""
    try:
        body = json.loads(error.body)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def sha256_digest(text: str | None) -> str | None:
    """The text in lower case if it is a sha256 in hexadecimal digits."""
    return text.lower() if text is not None and _SHA256.fullmatch(text) else None


def one_line(text: str) -> str:
    """The text on one line, unprintable characters as blanks, shortened."""
    return shortened(" ".join("".join(c if c.isprintable() else " " for c in text).split()), 200)
