"""A file inside the request: a safetensors file, or a tar with one.

data:application/octet-stream;base64,...
data:,...                                     with %-escapes
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn
from urllib.parse import unquote_to_bytes

from lora_loading.finding.references.named import Named, refuse

FORMS = ("data: URI of a safetensors file or of a tar with one",)
MAX_BYTES = 256 * 2**20

_SCHEME = "data:"


@dataclass(frozen=True)
class DataReference(Named):
    """A file that came inside the request."""

    content: bytes
    is_tar: bool
    """A tar, else a safetensors file; seen from the content, since the media types in use say nothing."""

    @cached_property
    def sha256(self) -> str:
        """The digest of the content."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def label(self) -> str:
        """What it is, and how long."""
        return f"data: ({len(self.content):,} bytes, sha256 {self.sha256[:12]})"

    @property
    def key(self) -> str:
        """The digest."""
        return f"data:sha256,{self.sha256}"

    @property
    def immutable(self) -> bool:
        """It is its own content."""
        return True

    def __str__(self) -> str:
        media_type = "application/x-tar" if self.is_tar else "application/octet-stream"
        return f"data:{media_type};base64,{base64.b64encode(self.content).decode()}"

    def __repr__(self) -> str:
        return f"DataReference({self.label!r})"


def is_data(text: str) -> bool:
    """Whether the text is a data: URI, or would be one."""
    return text[: len(_SCHEME)].lower() == _SCHEME


def parse(text: str) -> DataReference:
    """Read a data: URI, and see from the content what it is."""
    header, comma, payload = text[len(_SCHEME) :].partition(",")
    if not comma:
        refuse("there is no comma between its header and its content")
    if len(payload) > 4 * MAX_BYTES:
        _refuse_size()
    is_base64 = header.lower().replace(" ", "").endswith(";base64")
    content = _from_base64(payload) if is_base64 else _from_escapes(payload)
    if len(content) > MAX_BYTES:
        _refuse_size()
    is_tar = content[257:262] == b"ustar"
    if not is_tar and content[8:9] != b"{":
        refuse("its content is neither a safetensors file nor a tar")
    return DataReference(content, is_tar)


def _refuse_size() -> NoReturn:
    refuse(f"its content is larger than {MAX_BYTES >> 20} MiB")


def _from_base64(payload: str) -> bytes:
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError):
        refuse("its content is no base64")


def _from_escapes(payload: str) -> bytes:
    if not payload.isascii():
        refuse("its content holds characters that should be escaped")
    return unquote_to_bytes(payload)
