"""`parse`: the text that a user gave becomes a frozen LoraReference. No network, no torch.

A reference has three texts, for three readers:

    str(reference)     canonical: two spellings of one name are equal here, and `parse(str(x)) == x`. It may be signed
                       (an address with a query) or megabytes long (data), so it is neither logged nor stored.
    reference.key      equal exactly when the references are, short and without a secret: for an index on disk.
    reference.label    for people, in messages and logs.

This module decides which service a text belongs to; each service's own forms are in its file in `services`. Whether the
thing exists is found out by `resolve`. A token pasted into an address is dropped here: tokens have inputs of their own.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import SplitResult, urlsplit

from errors import LoraReferenceError
from lora_loading.finding.services import SERVICES, data, replicate, url
from lora_loading.finding.services.paths import holds_control
from lora_loading.finding.services.service import LoraReference, Service, UnknownFormError, refuse, shortened

MAX_TEXT = 8192
"""Characters of a reference that is not data; signed addresses take up to 3,000."""
FORMS = tuple(form for service in SERVICES for form in service.forms)
DELIVERY_HOST = "replicate.delivery"
"""With every host below it: where the tars of trainings lie. Their addresses may be written without https://."""

_HOST = re.compile(r"[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\.?(?::[0-9]+)?")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_USER_INFO = re.compile(r"^((?:[A-Za-z][\w+.-]*:)?//).*@|^()[^/]*@(?=[^/]*/)")
_PASTED_TOKEN = re.compile(r"(hf|r8)_[A-Za-z0-9]{8,}")
_BY_HOST = {host: service for service in SERVICES for host in service.hosts}


def parse(text: str, plain_http_hosts: frozenset[str] = frozenset()) -> LoraReference:
    """Return the reference that `text` is a spelling of.

    Args:
        text: as the user gave it; blanks around it are dropped.
        plain_http_hosts: "host" or "host:port" that an `http://` address may name: the operator's own.

    Raises:
        LoraReferenceError: no known form; the message lists the forms and repeats no secret.
    """
    stripped = text.strip()
    try:
        return _parse_text(stripped) or _parse_name(stripped, plain_http_hosts)
    except UnknownFormError as unknown:
        forms = "".join(f"\n- {form}" for form in FORMS)
        raise LoraReferenceError(f'Cannot read LoRA "{shown(stripped)}": {unknown}. Give one of:{forms}') from None


def shown(text: str) -> str:
    """The beginning of a user's text, fit for a message: no query, user, password, payload or unprintable character."""
    if data.is_data(text):
        return "data:..."
    text = _USER_INFO.sub(r"\1", text[:MAX_TEXT])
    text = _PASTED_TOKEN.sub(r"\1_...", re.split(r"[?#&]", text)[0])
    return shortened("".join(c if c.isprintable() else "?" for c in text))


def _parse_text(text: str) -> LoraReference | None:
    """Read a form that is no web address, such as a data: URI; None where no service knows it."""
    read = (service.parse_text(text) for service in SERVICES if service.parse_text is not None)
    return next((reference for reference in read if reference is not None), None)


def _parse_name(text: str, plain_http_hosts: frozenset[str]) -> LoraReference:
    if not text:
        refuse("the text is empty")
    if len(text) > MAX_TEXT:
        refuse(f"the text has {len(text):,} characters, more than {MAX_TEXT:,}")
    if holds_control(text) or not _is_encodable(text):
        refuse("the text holds control characters or is not valid Unicode")
    if "://" in text:
        return _parse_address(text, plain_http_hosts)
    host = re.split(r"[/?#]", text)[0].rpartition("@")[2].partition(":")[0]
    if _service_named(host) is not None or _is_delivery(host):
        return _parse_address(f"https://{text}", plain_http_hosts)
    return _parse_bare(text)


def _is_encodable(text: str) -> bool:
    """Whether it has no unpaired surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_address(address: str, plain_http_hosts: frozenset[str]) -> LoraReference:
    parts = _split(address)
    if parts.scheme not in ("https", "http"):
        refuse("the address does not begin with https://")
    if parts.username is not None or parts.password is not None:
        refuse("the address carries a user name or password")
    if not parts.hostname:
        refuse("the address has no host")
    with_default_port = parts.port in (None, 443, 80)
    service = _service_named(parts.hostname) if with_default_port else None
    if service is not None and service.parse_address is not None:
        reference: LoraReference = service.parse_address(parts)
        return reference
    if with_default_port and _is_delivery(parts.hostname):
        return url.parse(parts._replace(scheme="https"))
    return url.parse(parts, plain_http_hosts)


def _split(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises ValueError where the port is not a number
    except ValueError:
        refuse("the address is malformed")
    return parts._replace(fragment="")


def _parse_bare(text: str) -> LoraReference:
    """A name without a host is Replicate's."""
    first = text.partition("/")[0]
    if text.startswith(("/", ".", "~")) or "\\" in text:
        refuse("it looks like a path to a file, and files are not read")
    if _SCHEME.match(text) and "/" not in text:
        refuse("its scheme is none that is known")
    if _HOST.fullmatch(first):
        refuse(f"{shortened(first)} looks like a host; an address begins with https://")
    return replicate.parse_name(text)


def _service_named(host: str) -> Service[Any] | None:
    return _BY_HOST.get(_bare_host(host))


def _is_delivery(host: str) -> bool:
    return f".{_bare_host(host)}".endswith(f".{DELIVERY_HOST}")


def _bare_host(host: str) -> str:
    return host.lower().rstrip(".").removeprefix("www.")
