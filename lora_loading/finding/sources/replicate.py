"""A model on Replicate: the tar of its training where a token shows it, else the public address of its weights.

/v1/models/owner/name     the latest version                  Replicate's API, with a token
/v1/trainings             those of the token's account        the same
/owner/name/versions/version/_weights                         the site, for anyone
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from errors import HttpStatusError
from fetching.network import Client
from lora_loading.finding.reference import ReplicateReference
from lora_loading.finding.sources.access import Access
from lora_loading.finding.sources.api import bearer, known_shape, moved
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


def resolve(client: Client, reference: ReplicateReference, token: str | None, *, site: str, api: str) -> Source:
    """Where the model's tar lies.

    Args:
        client: what the API is asked with.
        reference: the model.
        token: the caller's for the API; without one the API is not asked.
        site: where the weights of public models are.
        api: where the API is.
    """
    version, address = reference.version, None
    if token is not None:
        account = _Account(client, api, token)
        try:
            version = version or account.latest_version(reference)
            address = account.trained_weights(reference, version)
        except HttpStatusError as error:
            logger.warning("Replicate's API answered %s; trying the public address", error.status)
    path = f"/versions/{version}" if version else ""
    return Source(
        name=reference.label,
        address=address or f"{site}/{reference.owner}/{reference.name}{path}/_weights",
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
        with known_shape("Replicate"):
            return str(model["latest_version"]["id"]) if model["latest_version"] else None

    def trained_weights(self, reference: ReplicateReference, version: str | None) -> str | None:
        """The address of the tar that a training of the account made, or None. The newest training comes first."""
        for training in self._trainings():
            with known_shape("Replicate"):
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
            with known_shape("Replicate"):
                yield from page["results"]
                address = moved(page["next"], self.api) if page.get("next") else None

    def _get(self, address: str) -> Any:  # noqa: ANN401 - JSON
        return self.client.get_json(address, dict(bearer(self.token)))


def _made(output: dict[str, Any] | None, reference: ReplicateReference, version: str | None) -> bool:
    """Whether a training's output is the model's wanted version, or any of its versions where none is known."""
    model, _, made = str((output or {}).get("version") or "").rpartition(":")
    same_model = model.lower() == f"{reference.owner}/{reference.name}".lower()
    return made.startswith(version or "") and (same_model or (not model and version is not None))
