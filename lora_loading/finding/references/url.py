"""A .safetensors file, or a .tar that holds one, at any web address.

    https://example.com/folder/lora.safetensors?signature=...
    https://replicate.delivery/.../trained_model.tar

The address may be signed: its query and its folders are kept out of messages and keys.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urlsplit

from lora_loading.finding.references.named import Named, refuse, shortened
from lora_loading.finding.references.path import is_safetensors, segments_of, unescaped

FORMS = ("https://any.host/file.safetensors or https://any.host/file.tar",)

_IPV6 = re.compile(r"[0-9a-f:.]+")
_HOST_NAME = re.compile(r"[a-z0-9._-]+")
_URL_SAFE = "%/:=&?~+!$,;'@()*[]"
"""What an address keeps as it is; escapes stay escapes, since a server may tell them apart."""


@dataclass(frozen=True)
class UrlReference(Named):
    """A file at a web address, which may be signed."""

    address: str

    @property
    def is_tar(self) -> bool:
        """Whether the address is that of a tar."""
        return _is_tar(urlsplit(self.address).path)

    @property
    def label(self) -> str:
        """Host and file name; neither the query nor the folders, which may hold a signature."""
        parts = urlsplit(self.address)
        return shortened(f"{parts.netloc}/.../{parts.path.rpartition('/')[2]}")

    @property
    def key(self) -> str:
        """The label and a digest of the whole address."""
        return f"{self.label}#{hashlib.sha256(self.address.encode()).hexdigest()}"

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:
        return f"UrlReference({self.label!r})"


def parse(parts: SplitResult, plain_http_hosts: frozenset[str] = frozenset()) -> UrlReference:
    """Read the address of a file; `plain_http_hosts` are "host" or "host:port" that it may name with http."""
    if parts.scheme == "http" and not {parts.hostname, f"{parts.hostname}:{parts.port or 80}"} & plain_http_hosts:
        refuse("the address is plain http")
    name = unescaped(parts.path.rpartition("/")[2])
    if not (is_safetensors(name) or _is_tar(name)):
        refuse("the address ends in neither .safetensors nor .tar")
    return UrlReference(canonical_address(parts))


def _is_tar(path: str) -> bool:
    return path.lower().endswith(".tar")


def canonical_address(parts: SplitResult) -> str:
    """The address with its host in lower case, no port that goes without saying, and no bare blank or letter abroad."""
    segments_of(parts.path)  # refuses ..
    host = _ascii_host(parts.hostname or "")
    port = "" if parts.port in (None, 443 if parts.scheme == "https" else 80) else f":{parts.port}"
    query = f"?{quote(parts.query, safe=_URL_SAFE)}" if parts.query else ""
    return f"{parts.scheme}://{host}{port}{quote(parts.path, safe=_URL_SAFE)}{query}"


def _ascii_host(host: str) -> str:
    """The host as the name system knows it, so that each spelling of a name abroad is one."""
    if ":" in host and _IPV6.fullmatch(host):
        return f"[{host}]"
    try:
        name = host.encode("idna").decode().lower()
    except UnicodeError:
        refuse("the host is no host name")
    if not _HOST_NAME.fullmatch(name):
        refuse("the host is no host name")
    return name
