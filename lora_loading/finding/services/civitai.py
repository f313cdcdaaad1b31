"""A model on CivitAI: the version that is named, else the newest for FLUX.1. All of CivitAI's domains are one service.

civitai.com/models/123/some-name
civitai.com/models/123?modelVersionId=456
civitai.com/api/download/models/456
urn:air:flux1:lora:civitai:123@456

Asked:

/api/v1/models/123               a model and its versions
/api/v1/model-versions/456       a version
/api/download/models/456         a version's file
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from errors import HttpStatusError, LoraAccessError, LoraFormatError
from fetching.network import Client
from lora_loading.finding.services.api import (
    bearer,
    json_object,
    one_line,
    rebased_on,
    sha256_digest,
    translating_bad_json,
)
from lora_loading.finding.services.paths import segments_of
from lora_loading.finding.services.service import Access, LoraReference, Network, Service, message, refuse
from weights import Source

ACCESS = Access(
    token_of=lambda tokens: tokens.civitai,
    given_as="civitai_api_token",
    advice="Set civitai_api_token to the API key of a CivitAI account that may download it.",
    advice_to_holder="Set civitai_api_token to the API key of another CivitAI account, one that may download it.",
)
BASE_MODEL = "Flux.1"
LORA_TYPES = ("lora", "locon", "dora")
HOSTS = ("civitai.com", "civitai.red", "civitai.green")

_AIR = re.compile(r"(?:urn:)?air:(?:[\w.-]+:){0,2}civitai:([0-9]+)(?:@([0-9]+))?(?::[\w.-]+)?(?:\.\w+)?", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class CivitaiReference(LoraReference):
    """A model, a version of it, or a version alone: at least one of the two ids is set."""

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


def parse(parts: SplitResult) -> CivitaiReference:
    """Read the address of a model's page, or of a version's download."""
    match segments_of(parts.path):
        case ["models", model] | ["models", model, _]:
            versions = _query(parts).get("modelVersionId", [None])
            if len(set(versions)) > 1:
                refuse("modelVersionId is given more than once")
            return _reference(model, versions[0])
        case ["api", "download", "models", version]:
            return _reference(None, version)
    refuse("the address is neither /models/<id> nor /api/download/models/<version>")


def parse_air(text: str) -> CivitaiReference | None:
    """Read an AIR (CivitAI's resource name); None where the text is none."""
    match = _AIR.fullmatch(text)
    return None if match is None else _reference(match[1], match[2])


def _query(parts: SplitResult) -> dict[str, list[str]]:
    try:
        return parse_qs(parts.query, max_num_fields=100)
    except ValueError:
        refuse("the query behind the ? cannot be read")


def _reference(model: str | None, version: str | None) -> CivitaiReference:
    return CivitaiReference(_number(model, "model"), _number(version, "version"))


def _number(text: str | None, what: str) -> int | None:
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or int(text) == 0:
        refuse(f"the {what}'s id is not a number")
    return int(text)


@dataclass(frozen=True)
class _File:
    id: int
    address: str | None
    sha256: str | None
    primary: bool


@dataclass(frozen=True)
class _Version:
    id: int
    model_id: int | None
    model_type: str
    base_model: str
    published_at: str
    """ISO 8601 in UTC, so that the newest is the greatest; empty for a draft."""
    trigger_words: tuple[str, ...]
    files: tuple[_File, ...]
    """The safetensors files of type Model."""


def resolve(network: Network, reference: CivitaiReference, token: str | None) -> Source:
    """Where the file of the named or newest version lies.

    Raises:
        LoraAccessError: the version belongs to another model.
        LoraFormatError: it is no LoRA for FLUX.1, or has no safetensors file.
    """
    endpoint = network.endpoints.civitai
    version = _version(network.client, reference, token, endpoint)
    file = next(iter(sorted(version.files, key=lambda file: not file.primary)), None)
    if file is None:
        found = f"version {version.id} has no safetensors file"
        raise LoraFormatError(message(reference, found, "Choose another version."))
    with translating_bad_json("CivitAI"):
        address = _address(file, version, endpoint)
    return Source(
        name=reference.label,
        address=address,
        headers=bearer(token) if address.startswith(f"{endpoint}/") else (),
        revision=f"version {version.id}, file {file.id}",
        immutable=reference.immutable,
        sha256=file.sha256,
        facts=(("trigger words", ", ".join(version.trigger_words)),) if version.trigger_words else (),
    )


def explain(error: HttpStatusError, reference: CivitaiReference, with_token: bool) -> LoraAccessError | None:
    """What only CivitAI refuses for: a file in early access. None for any other reason."""
    body = json_object(error)
    if body.get("error") != "Early Access":
        return None
    deadline = one_line(str(body.get("deadline") or "some later day"))
    advice = f"Wait until then, or set {ACCESS.given_as} to the key of an account that bought access."
    return LoraAccessError(message(reference, f"it is in early access until {deadline}", advice))


def _version(client: Client, reference: CivitaiReference, token: str | None, endpoint: str) -> _Version:
    """The named version, else the newest for FLUX.1; both are checked to be a LoRA for FLUX.1."""
    headers = dict(bearer(token))
    if reference.version_id is None:
        answer = client.get_json(f"{endpoint}/api/v1/models/{reference.model_id}", headers)
        with translating_bad_json("CivitAI"):
            return _newest_for_flux([_read_version(v, answer) for v in answer["modelVersions"]], reference)
    answer = client.get_json(f"{endpoint}/api/v1/model-versions/{reference.version_id}", headers)
    with translating_bad_json("CivitAI"):
        version = _read_version(answer, answer.get("model") or {})
    if reference.model_id not in (None, version.model_id):
        found = f"version {version.id} belongs to model {version.model_id}, not to model {reference.model_id}"
        raise LoraAccessError(message(reference, found, "Check both numbers."))
    return _newest_for_flux([version], reference)


def _newest_for_flux(versions: Sequence[_Version], reference: CivitaiReference) -> _Version:
    fitting = [version for version in versions if version.base_model.startswith(BASE_MODEL)]
    if not fitting:
        found = ", ".join(sorted({one_line(version.base_model) for version in versions})) or "nothing"
        raise LoraFormatError(message(reference, f"it is made for {found}", f"Choose a LoRA for {BASE_MODEL}."))
    newest = max(fitting, key=lambda version: (version.published_at, version.id))
    if newest.model_type and newest.model_type.lower() not in LORA_TYPES:
        raise LoraFormatError(message(reference, f"it is a {one_line(newest.model_type)}", "Choose a LoRA."))
    return newest


def _read_version(version: dict[str, Any], model: dict[str, Any]) -> _Version:
    """Read a version from its JSON; `model` is the JSON of its model, or the part of it that came along."""
    files = [f for f in version["files"] if f.get("type") == "Model"]
    return _Version(
        id=int(version["id"]),
        model_id=version.get("modelId"),
        model_type=str(model.get("type") or ""),
        base_model=str(version["baseModel"]),
        published_at=str(version.get("publishedAt") or ""),
        trigger_words=tuple(one_line(str(word)) for word in version.get("trainedWords") or ()),
        files=tuple(_read_file(f) for f in files if (f.get("metadata") or {}).get("format") == "SafeTensor"),
    )


def _read_file(file: dict[str, Any]) -> _File:
    return _File(
        id=int(file["id"]),
        address=file.get("downloadUrl"),
        sha256=sha256_digest((file.get("hashes") or {}).get("SHA256")),
        primary=bool(file.get("primary")),
    )


def _address(file: _File, version: _Version, endpoint: str) -> str:
    """Where the file is downloaded: at the configured endpoint if it lies at CivitAI, else where CivitAI says."""
    if not file.address:
        return f"{endpoint}/api/download/models/{version.id}"
    return rebased_on(file.address, endpoint) if urlsplit(file.address).hostname in HOSTS else file.address


SERVICE = Service(
    reference=CivitaiReference,
    forms=(
        "civitai.com/models/123, civitai.com/models/123?modelVersionId=456 or civitai.com/api/download/models/456",
        "urn:air:flux1:lora:civitai:123@456",
    ),
    resolve=resolve,
    access=ACCESS,
    hosts=HOSTS,
    parse_address=parse,
    parse_text=parse_air,
    explain=explain,
)
