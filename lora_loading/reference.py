"""What a text names: `parse` turns each way to write a LoRA's name into one frozen reference. No network, no torch.

A reference has three texts, for three readers:

    str(reference)     canonical: two spellings of one name are equal here, and `parse(str(x)) == x`. It may be signed
                       (an address with a query) or megabytes long (data), so it is neither logged nor stored.
    reference.key      equal exactly when the references are, short and without a secret: for an index on disk.
    reference.label    for people, in messages and logs.

Whether the thing exists is for `resolve` to find out. Tokens that were pasted into an address are dropped here: they
travel as headers, given by their own inputs.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn
from urllib.parse import SplitResult, parse_qs, quote, unquote_to_bytes, urlsplit

from errors import LoraReferenceError

MAX_TEXT = 8192
"""Characters of a reference that is not data; signed addresses take up to 3,000."""
MAX_DATA_BYTES = 256 * 2**20
DEFAULT_REVISION = "main"

FORMS = (
    "owner/name or owner/name:version (a Replicate model)",
    "https://replicate.delivery/.../trained_model.tar",
    "huggingface.co/owner/name, with /tree/revision/folder, /blob/revision/file.safetensors or /file.safetensors",
    "civitai.com/models/123, civitai.com/models/123?modelVersionId=456 or civitai.com/api/download/models/456",
    "urn:air:flux1:lora:civitai:123@456",
    "https://any.host/file.safetensors",
    "data: URI of a safetensors file or of a tar with one",
)

_REPLICATE_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,95}")
_REPLICATE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_VERSION = re.compile(r"[0-9a-f]{8,64}")
_HUB_NAME = re.compile(r"\w(?:[\w.-]{0,94}\w)?", re.ASCII)
_HUB_NOT_OWNERS = {"api", "blog", "collections", "datasets", "docs", "models", "papers", "settings", "spaces"}
_AIR = re.compile(r"(?:urn:)?air:(?:[\w.-]+:){0,2}civitai:([0-9]+)(?:@([0-9]+))?(?::[\w.-]+)?(?:\.\w+)?", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HOST = re.compile(r"[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\.?(?::[0-9]+)?")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_IPV6 = re.compile(r"[0-9a-f:.]+")
_USER_INFO = re.compile(r"^((?:[A-Za-z][\w+.-]*:)?//).*@|^()[^/]*@(?=[^/]*/)")
_PASTED_TOKEN = re.compile(r"(hf|r8)_[A-Za-z0-9]{8,}")
_URL_SAFE = "%/:=&?~+!$,;'@()*[]"
"""What an address keeps as it is; escapes stay escapes, since a server may tell them apart."""


class _Named:
    """What every reference answers."""

    @property
    def label(self) -> str:
        """The name for messages and logs: short, and without payload, query or secret."""
        return _shortened(str(self), 200)

    @property
    def key(self) -> str:
        """The name for an index: equal exactly when the references are, short, and without a secret."""
        return str(self)

    @property
    def immutable(self) -> bool:
        """Whether the name says exactly which content is meant, so that no service need be asked again."""
        return False


@dataclass(frozen=True)
class ReplicateReference(_Named):
    """A model on Replicate, at its latest version unless one is named."""

    owner: str
    name: str
    version: str | None = None
    """8 to 64 lower-case hexadecimal digits."""

    @property
    def immutable(self) -> bool:
        """A version that is written out is fixed; a shortened one might come to mean another."""
        return self.version is not None and len(self.version) == 64

    def __str__(self) -> str:
        version = f"/versions/{self.version}" if self.version else ""
        return f"replicate.com/{self.owner}/{self.name}{version}"


@dataclass(frozen=True)
class HuggingFaceReference(_Named):
    """A file, a folder or a whole repository on the Hugging Face Hub, at a revision."""

    repo: str
    """owner/name"""
    revision: str = DEFAULT_REVISION
    """A branch, a tag, a commit, or `refs/...`."""
    path: str | None = None
    """A folder, or a file when it ends in .safetensors."""

    @property
    def file(self) -> str | None:
        """The path when it names a file."""
        return self.path if self.path is not None and _is_safetensors(self.path) else None

    @property
    def immutable(self) -> bool:
        """A file at a commit is fixed."""
        return self.file is not None and _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        if self.path is None and self.revision == DEFAULT_REVISION:
            return f"huggingface.co/{self.repo}"
        kind = "tree" if self.file is None else "blob"
        path = "" if self.path is None else f"/{quote(self.path)}"
        return f"huggingface.co/{self.repo}/{kind}/{quote(self.revision, safe='')}{path}"


@dataclass(frozen=True)
class CivitaiReference(_Named):
    """A model on CivitAI, a version of it, or a version alone; one of the two ids is there."""

    model_id: int | None
    version_id: int | None = None

    @property
    def immutable(self) -> bool:
        """A version is fixed."""
        return self.version_id is not None

    def __str__(self) -> str:
        if self.model_id is None:
            return f"civitai.com/api/download/models/{self.version_id}"
        version = "" if self.version_id is None else f"?modelVersionId={self.version_id}"
        return f"civitai.com/models/{self.model_id}{version}"


@dataclass(frozen=True)
class _Address(_Named):
    address: str

    @property
    def label(self) -> str:
        """Host and file name; neither the query nor the folders, which may hold a signature."""
        parts = urlsplit(self.address)
        return _shortened(f"{parts.netloc}/.../{parts.path.rpartition('/')[2]}")

    @property
    def key(self) -> str:
        """The label and a digest of the whole address."""
        return f"{self.label}#{hashlib.sha256(self.address.encode()).hexdigest()}"

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label!r})"


@dataclass(frozen=True, repr=False)
class ReplicateDelivery(_Address):
    """A tar that Replicate delivers; the address may be signed."""


@dataclass(frozen=True, repr=False)
class UrlReference(_Address):
    """A safetensors file at some address, which may be signed."""


@dataclass(frozen=True)
class DataReference(_Named):
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


LoraReference = (
    ReplicateReference | ReplicateDelivery | HuggingFaceReference | CivitaiReference | UrlReference | DataReference
)


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
        if stripped[:5].lower() == "data:":
            return _parse_data(stripped)
        return _parse_name(stripped, plain_http_hosts)
    except _UnknownFormError as unknown:
        forms = "".join(f"\n- {form}" for form in FORMS)
        raise LoraReferenceError(f'Cannot read LoRA "{shown(stripped)}": {unknown}. Give one of:{forms}') from None


def shown(text: str) -> str:
    """The beginning of a text that a user gave: no query, no user and password, no payload, nothing unprintable."""
    if text[:5].lower() == "data:":
        return "data:..."
    text = _USER_INFO.sub(r"\1", text[:MAX_TEXT])
    text = _PASTED_TOKEN.sub(r"\1_...", re.split(r"[?#&]", text)[0])
    return _shortened("".join(c if c.isprintable() else "?" for c in text))


class _UnknownFormError(Exception):
    """The text is no reference; the message says what was found."""


def _fail(found: str) -> NoReturn:
    raise _UnknownFormError(found)


def _shortened(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _parse_name(text: str, plain_http_hosts: frozenset[str]) -> LoraReference:
    if not text:
        _fail("the text is empty")
    if len(text) > MAX_TEXT:
        _fail(f"the text has {len(text):,} characters, and at most {MAX_TEXT:,} make sense")
    if _CONTROL.search(text) or not _is_encodable(text):
        _fail("the text holds characters that no name has")
    if air := _AIR.fullmatch(text):
        return _civitai(air[1], air[2])
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


def _split(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises when it is no number
    except ValueError:
        _fail("the address cannot be read as one")
    return parts._replace(fragment="")


def _parse_address(address: str, plain_http_hosts: frozenset[str]) -> LoraReference:
    parts = _split(address)
    if parts.scheme not in ("https", "http"):
        _fail("the address is no web address")
    if parts.username is not None or parts.password is not None:
        _fail("the address carries a user name or password")
    if not parts.hostname:
        _fail("the address has no host")
    service = _service_of(parts)
    if service is not None:
        return service(parts._replace(scheme="https"))
    if parts.scheme == "http" and not {parts.hostname, f"{parts.hostname}:{parts.port or 80}"} & plain_http_hosts:
        _fail("the address is plain http")
    return _url(parts)


def _parse_bare(text: str) -> LoraReference:
    """A name without a host is Replicate's."""
    first = text.partition("/")[0]
    if text.startswith(("/", ".", "~")) or "\\" in text:
        _fail("it looks like a path to a file, and files are not read")
    if _SCHEME.match(text) and "/" not in text:
        _fail("it is no address of a kind that we know")
    if _HOST.fullmatch(first):
        _fail(f"{_shortened(first)} looks like a host; an address begins with https://")
    return _replicate_model(_segments(text))


# Replicate


def _replicate(parts: SplitResult) -> LoraReference:
    return _replicate_model(_segments(parts.path))


def _replicate_model(segments: list[str]) -> ReplicateReference:
    """owner/name, owner/name:version, owner/name/version, owner/name/versions/version, and /_weights behind them."""
    if segments[-1:] == ["_weights"]:
        segments = segments[:-1]
    if len(segments) == 4 and segments[2] == "versions":
        segments = [*segments[:2], segments[3]]
    if len(segments) == 2 and ":" in segments[1]:
        segments = [segments[0], *segments[1].split(":", 1)]
    if len(segments) not in (2, 3):
        _fail("it is not owner/name, and no address of a service that we know")
    owner, name, *versions = segments
    if not _REPLICATE_OWNER.fullmatch(owner) or not _REPLICATE_NAME.fullmatch(name) or ".." in name:
        _fail("it is no owner/name")
    if _is_safetensors(name):
        _fail("it looks like a path to a file, and files are not read")
    version = versions[0].lower() if versions else None
    if version is not None and not _VERSION.fullmatch(version):
        _fail("what follows owner/name is no version, which has up to 64 hexadecimal digits")
    return ReplicateReference(owner, name, version)


def _delivery(parts: SplitResult) -> LoraReference:
    if parts.path.lower().endswith(".tar"):
        return ReplicateDelivery(_canonical_address(parts))
    return _url(parts)


# Hugging Face


def _hugging_face(parts: SplitResult) -> LoraReference:
    segments = _segments(parts.path)
    if len(segments) < 2:
        _fail("there is no owner/name behind the host")
    if segments[0] in _HUB_NOT_OWNERS:
        _fail(f"{segments[0]} on Hugging Face hold no LoRA; a LoRA lies in a model's repository")
    if not all(map(_is_hub_name, segments[:2])):
        _fail("what follows the host is no owner/name")
    repo, rest = "/".join(segments[:2]), segments[2:]
    if rest and rest[0] in ("tree", "blob", "resolve"):
        revision, path = _revision_and_path(rest[1:])
        if rest[0] != "tree" and path is None:
            _fail(f"the address names no file behind /{rest[0]}/")
    else:
        revision, path = DEFAULT_REVISION, "/".join(rest) or None
    if path is not None and rest[0] != "tree" and not _is_safetensors(path):
        _fail("the file that it names is no .safetensors")
    return HuggingFaceReference(repo, revision, path)


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and not ("--" in name or ".." in name or name.endswith(".git"))


def _revision_and_path(segments: list[str]) -> tuple[str, str | None]:
    """Split what follows /tree/, /blob/ or /resolve/. `refs/pr/1` is one revision, escaped or not."""
    if not segments:
        return DEFAULT_REVISION, None
    taken = 3 if segments[0] == "refs" and len(segments) >= 3 else 1
    return "/".join(segments[:taken]), "/".join(segments[taken:]) or None


# CivitAI


def _civitai_page(parts: SplitResult) -> LoraReference:
    match _segments(parts.path):
        case ["models", model] | ["models", model, _]:
            versions = _query(parts).get("modelVersionId", [None])
            if len(set(versions)) > 1:
                _fail("modelVersionId is given more than once")
            return _civitai(model, versions[0])
        case ["api", "download", "models", version]:
            return _civitai(None, version)
    _fail("the address is neither /models/<id> nor /api/download/models/<version>")


def _query(parts: SplitResult) -> dict[str, list[str]]:
    try:
        return parse_qs(parts.query, max_num_fields=100)
    except ValueError:
        _fail("the query behind the ? cannot be read")


def _civitai(model: str | None, version: str | None) -> CivitaiReference:
    return CivitaiReference(_number(model, "model"), _number(version, "version"))


def _number(text: str | None, what: str) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) == 0:
        _fail(f"the {what}'s id is no number")
    return int(text)


# Any address


def _url(parts: SplitResult) -> LoraReference:
    if not _is_safetensors(_unescaped(parts.path.rpartition("/")[2])):
        _fail("the address does not end in .safetensors")
    return UrlReference(_canonical_address(parts))


def _canonical_address(parts: SplitResult) -> str:
    """The address with its host in lower case, no port that goes without saying, and no bare blank or letter abroad."""
    _segments(parts.path)  # refuses ..
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
        _fail("the host is no host name")
    if not re.fullmatch(r"[a-z0-9._-]+", name):
        _fail("the host is no host name")
    return name


def _segments(path: str) -> list[str]:
    """What lies between the slashes, unescaped once; empty ones are dropped.

    An escaped slash separates nothing, so that `refs%2Fpr%2F1` stays one.
    """
    segments = [_unescaped(segment) for segment in path.split("/") if segment]
    for segment in segments:
        if _CONTROL.search(segment) or "\\" in segment:
            _fail("it holds characters that no path has")
        if any(part in ("", ".", "..") for part in segment.split("/")):
            _fail('it holds "." or ".." between slashes')
    return segments


def _unescaped(segment: str) -> str:
    try:
        return unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        _fail("it holds escapes that are no text")


def _is_safetensors(path: str) -> bool:
    return path.lower().endswith(".safetensors")


# Data


def _parse_data(text: str) -> DataReference:
    header, comma, payload = text[5:].partition(",")
    if not comma:
        _fail("there is no comma between its header and its content")
    if len(payload) > 4 * MAX_DATA_BYTES:
        _fail(f"its content is larger than {MAX_DATA_BYTES >> 20} MiB")
    is_base64 = header.lower().replace(" ", "").endswith(";base64")
    content = _from_base64(payload) if is_base64 else _from_escapes(payload)
    if len(content) > MAX_DATA_BYTES:
        _fail(f"its content is larger than {MAX_DATA_BYTES >> 20} MiB")
    is_tar = content[257:262] == b"ustar"
    if not is_tar and content[8:9] != b"{":
        _fail("its content is neither a safetensors file nor a tar")
    return DataReference(content, is_tar)


def _from_base64(payload: str) -> bytes:
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError):
        _fail("its content is no base64")


def _from_escapes(payload: str) -> bytes:
    if not payload.isascii():
        _fail("its content holds characters that should be escaped")
    return unquote_to_bytes(payload)


# Which service a host is


def _service_of(parts: SplitResult) -> Callable[[SplitResult], LoraReference] | None:
    return _service_named(parts.hostname or "") if parts.port in (None, 443, 80) else None


def _service_named(host: str) -> Callable[[SplitResult], LoraReference] | None:
    host = host.lower().rstrip(".").removeprefix("www.")
    return _SERVICES.get("replicate.delivery" if host.endswith(".replicate.delivery") else host)


_SERVICES: dict[str, Callable[[SplitResult], LoraReference]] = {
    "replicate.com": _replicate,
    "replicate.delivery": _delivery,
    "huggingface.co": _hugging_face,
    "hf.co": _hugging_face,
    "civitai.com": _civitai_page,
    "civitai.red": _civitai_page,
    "civitai.green": _civitai_page,
}
