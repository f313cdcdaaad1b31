"""A model on Replicate: the tar of its training where a token shows it, else the public address of its weights.

owner/name
owner/name:version
owner/name/version
https://replicate.com/owner/name/versions/version

Asked:

/v1/models/owner/name     the latest version                  Replicate's API, with a token
/v1/trainings             those of the token's account        the same
/owner/name/versions/version/_weights                         the site, for anyone
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, quote

from errors import HttpStatusError
from fetching.network import Client
from lora_loading.finding.services.api import bearer, rebased_on, translating_bad_json
from lora_loading.finding.services.paths import is_safetensors, segments_of
from lora_loading.finding.services.service import Access, LoraReference, Network, Service, refuse
from weights import Container, Source

ACCESS = Access(
    token_of=lambda tokens: tokens.replicate,
    given_as="REPLICATE_API_TOKEN",
    advice="Check the name. If the model is private, the operator must set REPLICATE_API_TOKEN to a token of "
    "its owner.",
    advice_to_holder="Check the name, and that the operator's REPLICATE_API_TOKEN is a token of the model's owner.",
)
MAX_PAGES = 10
"""Of the list of trainings, 100 each."""

logger = logging.getLogger(__name__)

_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,95}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_VERSION = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class ReplicateReference(LoraReference):
    """A model on Replicate, at its latest version unless one is named."""

    owner: str
    name: str
    version: str | None = None
    """8 to 64 lower-case hexadecimal digits."""

    @property
    def immutable(self) -> bool:
        """A full version id is fixed; a shortened one may become ambiguous."""
        return self.version is not None and len(self.version) == 64

    def __str__(self) -> str:
        version = f"/versions/{self.version}" if self.version else ""
        return f"replicate.com/{self.owner}/{self.name}{version}"


def parse(parts: SplitResult) -> ReplicateReference:
    """Read the address of a model's page, of a version's, or of the weights behind either."""
    return parse_name(parts.path)


def parse_name(text: str) -> ReplicateReference:
    """Read owner/name, owner/name:version, owner/name/version, owner/name/versions/version; maybe with /_weights."""
    segments = segments_of(text)
    if segments[-1:] == ["_weights"]:
        segments = segments[:-1]
    if len(segments) == 4 and segments[2] == "versions":
        segments = [*segments[:2], segments[3]]
    if len(segments) == 2 and ":" in segments[1]:
        segments = [segments[0], *segments[1].split(":", 1)]
    if len(segments) not in (2, 3):
        refuse("it is not owner/name, and no address of a service that we know")
    owner, name, *versions = segments
    if not _OWNER.fullmatch(owner) or not _NAME.fullmatch(name) or ".." in name:
        refuse("it is no owner/name")
    if is_safetensors(name):
        refuse("it looks like a path to a file, and files are not read")
    version = versions[0].lower() if versions else None
    if version is not None and not _VERSION.fullmatch(version):
        refuse("what follows owner/name is not a version: 8 to 64 hexadecimal digits")
    return ReplicateReference(owner, name, version)


def resolve(network: Network, reference: ReplicateReference, token: str | None) -> Source:
    """Where the model's tar lies. Without a token the API is not asked."""
    version, address = reference.version, None
    if token is not None:
        account = _Account(network.client, network.endpoints.replicate_api, token)
        try:
            version = version or account.latest_version(reference)
            address = account.trained_weights(reference, version)
        except HttpStatusError as error:
            logger.warning("Replicate's API answered %s; trying the public address", error.status)
    path = f"/versions/{version}" if version else ""
    return Source(
        name=reference.label,
        address=address or f"{network.endpoints.replicate}/{reference.owner}/{reference.name}{path}/_weights",
        container=Container.TAR,
        revision=version,
        immutable=reference.immutable,
    )


@dataclass(frozen=True)
class _Account:
    """Replicate's API as the holder of a token sees it."""

    client: Client
    api: str
    token: str = field(repr=False)

    def latest_version(self, reference: ReplicateReference) -> str | None:
        """The model's latest version; None where it has none."""
        model = self._get(f"{self.api}/v1/models/{reference.owner}/{reference.name}")
        with translating_bad_json("Replicate"):
            return str(model["latest_version"]["id"]) if model["latest_version"] else None

    def trained_weights(self, reference: ReplicateReference, version: str | None) -> str | None:
        """The address of the tar that a training of the account wrote, the newest first; None where there is none."""
        for training in self._trainings():
            with translating_bad_json("Replicate"):
                if training["status"] == "succeeded" and _made(training["output"], reference, version):
                    found = self._get(f"{self.api}/v1/trainings/{quote(training['id'], safe='')}")
                    weights = found["output"].get("weights")
                    return weights if isinstance(weights, str) else None
        return None

    def _trainings(self) -> Iterator[Any]:
        address: str | None = f"{self.api}/v1/trainings"
        for _ in range(MAX_PAGES):
            if address is None:
                return
            page = self._get(address)
            with translating_bad_json("Replicate"):
                yield from page["results"]
                address = rebased_on(page["next"], self.api) if page.get("next") else None

    def _get(self, address: str) -> Any:  # noqa: ANN401 - JSON
        return self.client.get_json(address, dict(bearer(self.token)))


def _made(output: dict[str, Any] | None, reference: ReplicateReference, version: str | None) -> bool:
    """Whether a training's output is the model's wanted version, or any of its versions where none is known."""
    model, _, made = str((output or {}).get("version") or "").rpartition(":")
    same_model = model.lower() == f"{reference.owner}/{reference.name}".lower()
    return made.startswith(version or "") and (same_model or (not model and version is not None))


SERVICE = Service(
    reference=ReplicateReference,
    forms=("owner/name or owner/name:version (a Replicate model)",),
    resolve=resolve,
    access=ACCESS,
    hosts=("replicate.com",),
    parse_address=parse,
)
