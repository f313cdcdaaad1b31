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

from lora_loading.finding.services.paths import is_safetensors, segments_of, unescaped
from lora_loading.finding.services.service import Access, LoraReference, Network, Service, refuse, shortened
from weights import Container, Source

_ADVICE = "Give an address that anyone may read; a signed one expires, so it may have to be signed again."
ACCESS = Access(token_of=lambda tokens: None, given_as="", advice=_ADVICE, advice_to_holder=_ADVICE)

_IPV6 = re.compile(r"[0-9a-f:.]+")
_HOST_NAME = re.compile(r"[a-z0-9._-]+")
_URL_SAFE = "%/:=&?~+!$,;'@()*[]"
"""Characters that are not escaped in an address. Escapes stay as they are, since a server may tell them apart."""


@dataclass(frozen=True)
class UrlReference(LoraReference):
    """A file at a web address, which may be signed."""

    address: str

    @property
    def is_tar(self) -> bool:
        """Whether the address is that of a tar."""
        return _is_tar(urlsplit(self.address).path)

    @property
    def label(self) -> str:
        """Host and file name, without the query and the folders, which may hold a signature."""
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
    """Read the address of a file; `plain_http_hosts` ("host" or "host:port") are those that http is allowed for."""
    if parts.scheme == "http" and not {parts.hostname, f"{parts.hostname}:{parts.port or 80}"} & plain_http_hosts:
        refuse("the address is plain http")
    name = unescaped(parts.path.rpartition("/")[2])
    if not (is_safetensors(name) or _is_tar(name)):
        refuse("the address ends in neither .safetensors nor .tar")
    return UrlReference(canonical_address(parts))


def _is_tar(path: str) -> bool:
    return path.lower().endswith(".tar")


def canonical_address(parts: SplitResult) -> str:
    """The address with its host in lower case, without the default port, blanks and non-ASCII characters escaped."""
    segments_of(parts.path)  # refuses ".."
    host = _ascii_host(parts.hostname or "")
    port = "" if parts.port in (None, 443 if parts.scheme == "https" else 80) else f":{parts.port}"
    query = f"?{quote(parts.query, safe=_URL_SAFE)}" if parts.query else ""
    return f"{parts.scheme}://{host}{port}{quote(parts.path, safe=_URL_SAFE)}{query}"


def _ascii_host(host: str) -> str:
    """The host in its IDNA form (punycode)."""
    if ":" in host and _IPV6.fullmatch(host):
        return f"[{host}]"
    try:
        name = host.encode("idna").decode().lower()
    except UnicodeError:
        refuse("the host is no host name")
    if not _HOST_NAME.fullmatch(name):
        refuse("the host is no host name")
    return name


def resolve(network: Network, reference: UrlReference, token: str | None) -> Source:
    """The address itself; no token plays a part."""
    container = Container.TAR if reference.is_tar else Container.SAFETENSORS
    return Source(name=reference.label, address=reference.address, container=container)


SERVICE = Service(
    reference=UrlReference,
    forms=("https://any.host/file.safetensors or https://any.host/file.tar",),
    resolve=resolve,
    access=ACCESS,
)
