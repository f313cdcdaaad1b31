"""What a text names: `parse` turns each way to write a LoRA's name into one frozen reference. No network, no torch.

A reference has three texts, for three readers:

    str(reference)     canonical: two spellings of one name are equal here, and `parse(str(x)) == x`. It may be signed
                       (an address with a query) or megabytes long (data), so it is neither logged nor stored.
    reference.key      equal exactly when the references are, short and without a secret: for an index on disk.
    reference.label    for people, in messages and logs.

Here is decided which service a text belongs to; how each one's names are spelt is in `references`, a file a service.
Whether the thing exists is for `resolve` to find out. Tokens that were pasted into an address are dropped here: they
travel as headers, given by their own inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

from errors import LoraReferenceError
from lora_loading.finding.references import civitai, data, hugging_face, replicate, url
from lora_loading.finding.references.civitai import CivitaiReference
from lora_loading.finding.references.data import DataReference
from lora_loading.finding.references.hugging_face import HuggingFaceReference
from lora_loading.finding.references.named import UnknownFormError, refuse, shortened
from lora_loading.finding.references.path import holds_control
from lora_loading.finding.references.replicate import ReplicateReference
from lora_loading.finding.references.url import UrlReference

__all__ = (
    "FORMS",
    "MAX_TEXT",
    "CivitaiReference",
    "DataReference",
    "HuggingFaceReference",
    "LoraReference",
    "ReplicateReference",
    "UrlReference",
    "parse",
    "shown",
)

MAX_TEXT = 8192
"""Characters of a reference that is not data; signed addresses take up to 3,000."""
FORMS = (*replicate.FORMS, *hugging_face.FORMS, *civitai.FORMS, *url.FORMS, *data.FORMS)

_HOST = re.compile(r"[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\.?(?::[0-9]+)?")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_USER_INFO = re.compile(r"^((?:[A-Za-z][\w+.-]*:)?//).*@|^()[^/]*@(?=[^/]*/)")
_PASTED_TOKEN = re.compile(r"(hf|r8)_[A-Za-z0-9]{8,}")

LoraReference = ReplicateReference | HuggingFaceReference | CivitaiReference | UrlReference | DataReference
ParseAddress = Callable[[SplitResult], LoraReference]
_SERVICES: dict[str, ParseAddress] = {
    **dict.fromkeys(replicate.HOSTS, replicate.parse),
    replicate.DELIVERY_HOST: url.parse,
    **dict.fromkeys(hugging_face.HOSTS, hugging_face.parse),
    **dict.fromkeys(civitai.HOSTS, civitai.parse),
}
"""By host; any other host's address is a URL."""


def parse(text: str, plain_http_hosts: frozenset[str] = frozenset()) -> LoraReference:
    """Return what `text` names, whichever way it is written.

    Args:
        text: as the user gave it; blanks around it are dropped.
        plain_http_hosts: "host" or "host:port" that an `http://` address may name: the operator's own.

    Raises:
        LoraReferenceError: no form that we know; the message lists the forms and repeats no secret.
    """
    stripped = text.strip()
    try:
        return data.parse(stripped) if data.is_data(stripped) else _parse_name(stripped, plain_http_hosts)
    except UnknownFormError as unknown:
        forms = "".join(f"\n- {form}" for form in FORMS)
        raise LoraReferenceError(f'Cannot read LoRA "{shown(stripped)}": {unknown}. Give one of:{forms}') from None


def shown(text: str) -> str:
    """The beginning of a text that a user gave: no query, no user and password, no payload, nothing unprintable."""
    if data.is_data(text):
        return "data:..."
    text = _USER_INFO.sub(r"\1", text[:MAX_TEXT])
    text = _PASTED_TOKEN.sub(r"\1_...", re.split(r"[?#&]", text)[0])
    return shortened("".join(c if c.isprintable() else "?" for c in text))


def _parse_name(text: str, plain_http_hosts: frozenset[str]) -> LoraReference:
    if not text:
        refuse("the text is empty")
    if len(text) > MAX_TEXT:
        refuse(f"the text has {len(text):,} characters, and at most {MAX_TEXT:,} make sense")
    if holds_control(text) or not _is_encodable(text):
        refuse("the text holds characters that no name has")
    if (air := civitai.parse_air(text)) is not None:
        return air
    if "://" in text:
        return _parse_address(text, plain_http_hosts)
    if _service_named(re.split(r"[/?#]", text)[0].rpartition("@")[2].partition(":")[0]) is not None:
        return _parse_address(f"https://{text}", plain_http_hosts)
    return _parse_bare(text)


def _is_encodable(text: str) -> bool:
    """Whether there is no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_address(address: str, plain_http_hosts: frozenset[str]) -> LoraReference:
    parts = _split(address)
    if parts.scheme not in ("https", "http"):
        refuse("the address is no web address")
    if parts.username is not None or parts.password is not None:
        refuse("the address carries a user name or password")
    if not parts.hostname:
        refuse("the address has no host")
    service = _service_of(parts)
    return url.parse(parts, plain_http_hosts) if service is None else service(parts._replace(scheme="https"))


def _split(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises when it is no number
    except ValueError:
        refuse("the address cannot be read as one")
    return parts._replace(fragment="")


def _parse_bare(text: str) -> LoraReference:
    """A name without a host is Replicate's."""
    first = text.partition("/")[0]
    if text.startswith(("/", ".", "~")) or "\\" in text:
        refuse("it looks like a path to a file, and files are not read")
    if _SCHEME.match(text) and "/" not in text:
        refuse("it is no address of a kind that we know")
    if _HOST.fullmatch(first):
        refuse(f"{shortened(first)} looks like a host; an address begins with https://")
    return replicate.parse_name(text)


def _service_of(parts: SplitResult) -> ParseAddress | None:
    return _service_named(parts.hostname or "") if parts.port in (None, 443, 80) else None


def _service_named(host: str) -> ParseAddress | None:
    host = host.lower().rstrip(".").removeprefix("www.")
    return _SERVICES.get(replicate.DELIVERY_HOST if host.endswith(f".{replicate.DELIVERY_HOST}") else host)
