"""A LoRA inside the request itself, as a data: URI: a safetensors file, or a tar with one.

data:application/octet-stream;base64,...
data:,...                                     content with %-escapes
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn
from urllib.parse import unquote_to_bytes

from lora_loading.finding.services import url
from lora_loading.finding.services.service import LoraReference, Network, Service, refuse
from weights import Container, Source

MAX_BYTES = 256 * 2**20
LONGEST_BASE64, LONGEST_ESCAPED = 1.5, 3.0
"""Characters for a byte of content: 4/3 with line breaks and some spare, or three as in %41."""

_SCHEME = "data:"


@dataclass(frozen=True)
class DataReference(LoraReference):
    """A file that came inside the request."""

    content: bytes
    is_tar: bool
    """Else a safetensors file. Found from the content, since clients send any media type."""

    @cached_property
    def sha256(self) -> str:
        """The digest of the content."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def label(self) -> str:
        """Its size and the beginning of its digest."""
        return f"data: ({len(self.content):,} bytes, sha256 {self.sha256[:12]})"

    @property
    def key(self) -> str:
        """The digest."""
        return f"data:sha256,{self.sha256}"

    @property
    def immutable(self) -> bool:
        """Always: the reference is the content."""
        return True

    def __str__(self) -> str:
        media_type = "application/x-tar" if self.is_tar else "application/octet-stream"
        return f"data:{media_type};base64,{base64.b64encode(self.content).decode()}"

    def __repr__(self) -> str:
        return f"DataReference({self.label!r})"


def is_data(text: str) -> bool:
    """Whether the text begins with data:."""
    return text[: len(_SCHEME)].lower() == _SCHEME


def parse(text: str) -> DataReference | None:
    """Read a data: URI, and find from its content what it holds; None for any other text."""
    if not is_data(text):
        return None
    header, comma, payload = text[len(_SCHEME) :].partition(",")
    if not comma:
        refuse("there is no comma between its header and its content")
    is_base64 = header.lower().replace(" ", "").endswith(";base64")
    if len(payload) > MAX_BYTES * (LONGEST_BASE64 if is_base64 else LONGEST_ESCAPED):  # before it is decoded
        _refuse_size()
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
        refuse("its content is not base64")


def _from_escapes(payload: str) -> bytes:
    if not payload.isascii():
        refuse("its content holds characters that must be %-escaped")
    return unquote_to_bytes(payload)


def resolve(network: Network, reference: DataReference, token: str | None) -> Source:
    """The content itself. Digest and size are given for a bare file only: a tar's are not its member's."""
    return Source(
        name=reference.label,
        content=reference.content,
        container=Container.TAR if reference.is_tar else Container.SAFETENSORS,
        revision=f"sha256:{reference.sha256}",
        immutable=True,
        sha256=None if reference.is_tar else reference.sha256,
        size_bytes=None if reference.is_tar else len(reference.content),
    )


SERVICE = Service(
    reference=DataReference,
    forms=("data: URI of a safetensors file or of a tar with one",),
    resolve=resolve,
    access=url.ACCESS,
    parse_text=parse,
)
