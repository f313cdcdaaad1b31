"""A model on CivitAI: the version that is named or the newest for FLUX.1, and its file.

/api/v1/models/123               a model and its versions
/api/v1/model-versions/456       a version
/api/download/models/456         a version's file
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from errors import HttpStatusError, LoraAccessError, LoraFormatError
from fetching.network import Client
from lora_loading.finding.reference import CivitaiReference
from lora_loading.finding.references.civitai import HOSTS
from lora_loading.finding.sources.access import Access, message
from lora_loading.finding.sources.api import bearer, json_object, known_shape, moved, one_line, sha256_digest
from weights import Source

ACCESS = Access(
    token_of=lambda tokens: tokens.civitai,
    given_as="civitai_api_token",
    advice="Set civitai_api_token to the API key of a CivitAI account that may download it.",
    advice_to_holder="Set civitai_api_token to the API key of another CivitAI account, one that may download it.",
)
BASE_MODEL = "Flux.1"
LORA_TYPES = ("lora", "locon", "dora")


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


def resolve(client: Client, reference: CivitaiReference, token: str | None, *, endpoint: str) -> Source:
    """Where the file of the version lies that is meant.

    Raises:
        LoraAccessError: the version belongs to another model.
        LoraFormatError: it is no LoRA for FLUX.1, or has no safetensors file.
    """
    version = _version(client, reference, token, endpoint)
    file = next(iter(sorted(version.files, key=lambda file: not file.primary)), None)
    if file is None:
        found = f"version {version.id} has no safetensors file"
        raise LoraFormatError(message(reference, found, "Choose another version."))
    with known_shape("CivitAI"):
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


def explain(error: HttpStatusError, reference: CivitaiReference) -> LoraAccessError | None:
    """What only CivitAI refuses for: that a file is in early access. None for any other reason."""
    body = json_object(error)
    if body.get("error") != "Early Access":
        return None
    deadline = one_line(str(body.get("deadline") or "some later day"))
    advice = f"Wait until then, or set {ACCESS.given_as} to the key of an account that bought access."
    return LoraAccessError(message(reference, f"it is in early access until {deadline}", advice))


def _version(client: Client, reference: CivitaiReference, token: str | None, endpoint: str) -> _Version:
    """The version that is named, else the newest for FLUX.1; either is a LoRA for FLUX.1."""
    headers = dict(bearer(token))
    if reference.version_id is None:
        answer = client.get_json(f"{endpoint}/api/v1/models/{reference.model_id}", headers)
        with known_shape("CivitAI"):
            return _newest_for_flux([_read_version(v, answer) for v in answer["modelVersions"]], reference)
    answer = client.get_json(f"{endpoint}/api/v1/model-versions/{reference.version_id}", headers)
    with known_shape("CivitAI"):
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
    """Read a version out of its JSON; `model` is the JSON around it, or as much as is told."""
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
    """Where the file is downloaded: at our endpoint for CivitAI, unless it lies elsewhere."""
    if not file.address:
        return f"{endpoint}/api/download/models/{version.id}"
    return moved(file.address, endpoint) if urlsplit(file.address).hostname in HOSTS else file.address
