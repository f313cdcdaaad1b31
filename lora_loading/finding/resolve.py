"""Where a LoRA lies: a reference and the caller's tokens become a `Source`. May ask the service; downloads nothing.

Here is decided which service is asked; how is in `sources`, a file a service. Tokens are headers of single calls: no
login, none from the environment, none that the caller did not give. What a service refuses is explained by `explain`,
the same for its API and for a download that fails later.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from errors import DownloadError, HttpStatusError, LoraAccessError
from fetching.network import Client
from lora_loading.finding.reference import (
    CivitaiReference,
    DataReference,
    HuggingFaceReference,
    LoraReference,
    ReplicateReference,
    UrlReference,
)
from lora_loading.finding.sources import civitai, data, hugging_face, replicate, url
from lora_loading.finding.sources.access import Access, message, refusal
from lora_loading.finding.sources.api import json_object, one_line
from lora_loading.finding.tokens import Tokens
from weights import Source

_ACCESS: dict[type[LoraReference], Access] = {
    ReplicateReference: replicate.ACCESS,
    HuggingFaceReference: hugging_face.ACCESS,
    CivitaiReference: civitai.ACCESS,
}
"""By reference; all others are addresses that anyone may read."""
_REFUSALS = {401: "asks for a login", 403: "refuses it", 404: "has no such thing", 410: "no longer has it: archived"}
"""What a host does with these statuses."""
_REFUSALS_WITH_TOKEN = {401: "does not accept the token", 403: "refuses it: the token has no access"}


@dataclass(frozen=True)
class Endpoints:
    """Where the services are; mirrors and tests are elsewhere. No slash at the end."""

    hugging_face: str = "https://huggingface.co"
    civitai: str = "https://civitai.com"
    replicate: str = "https://replicate.com"
    replicate_api: str = "https://api.replicate.com"


class Resolver:
    """Finds sources; keeps nothing between two calls."""

    def __init__(
        self,
        client: Client,
        endpoints: Endpoints | None = None,
        *,
        timeout_seconds: float = hugging_face.TIMEOUT_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`timeout_seconds` and `sleep` are for the Hub, which is asked through its own library, not by `client`."""
        self._timeout_seconds = timeout_seconds
        self._client = client
        self._endpoints = endpoints or Endpoints()
        self._sleep = sleep

    def resolve(self, reference: LoraReference, tokens: Tokens) -> Source:
        """Return where the file lies that `reference` names, as the caller's own tokens may see it.

        Raises:
            LoraAccessError: the service refuses it, or has no such thing.
            LoraReferenceError: several files fit the name.
            LoraFormatError: the service says that it is no LoRA for FLUX.1.
            DownloadError: the service cannot be reached, or answers with something else.
        """
        try:
            return self._ask(reference, token_for(reference, tokens))
        except HttpStatusError as error:
            raise explain(error, reference, tokens) from error
        except DownloadError as error:
            raise DownloadError(f'Cannot find LoRA "{reference.label}": {error}') from error

    def _ask(self, reference: LoraReference, token: str | None) -> Source:
        at = self._endpoints
        match reference:
            case ReplicateReference():
                return replicate.resolve(self._client, reference, token, site=at.replicate, api=at.replicate_api)
            case HuggingFaceReference():
                hub = hugging_face.Hub(at.hugging_face, token, self._timeout_seconds, self._sleep)
                return hugging_face.resolve(hub, reference)
            case CivitaiReference():
                return civitai.resolve(self._client, reference, token, endpoint=at.civitai)
            case UrlReference():
                return url.resolve(reference)
            case DataReference():
                return data.resolve(reference)


def token_for(reference: LoraReference, tokens: Tokens) -> str | None:
    """The token that plays a part in finding `reference`: what is found with it is for its holders alone.

    Raises:
        LoraAccessError: it cannot be sent.
    """
    access = _access(reference)
    token = (access.token_of(tokens) or "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        found = f"{access.given_as} holds characters that no token has"
        raise LoraAccessError(message(reference, found, "Give it anew."))
    return token or None


def explain(error: HttpStatusError, reference: LoraReference, tokens: Tokens) -> LoraAccessError | DownloadError:
    """What a status means for the user: an error to raise `from` the first, without a token or an address."""
    with_token = token_for(reference, tokens) is not None
    if (special := _explained_by_service(error, reference, with_token)) is not None:
        return special
    if error.status in _REFUSALS:
        does = (_REFUSALS_WITH_TOKEN if with_token else {}).get(error.status, _REFUSALS[error.status])
        return refusal(reference, _access(reference), f"{error.host} {does}{_said(error, tokens)}", with_token)
    found = f"{error.host} limits how often it is asked" if error.status == 429 else f"{error.host} failed"
    return DownloadError(message(reference, f"{found} (status {error.status})", "Try again in some minutes."))


def _explained_by_service(error: HttpStatusError, reference: LoraReference, with_token: bool) -> LoraAccessError | None:
    match reference:
        case CivitaiReference():
            return civitai.explain(error, reference)
        case HuggingFaceReference():
            return hugging_face.explain(error, reference, with_token)
    return None


def _access(reference: LoraReference) -> Access:
    return _ACCESS.get(type(reference), url.ACCESS)


def _said(error: HttpStatusError, tokens: Tokens) -> str:
    """The server's own words, without addresses and tokens; empty if it said nothing in JSON."""
    body = json_object(error)
    words = next((v for v in map(body.get, ("message", "error", "detail")) if isinstance(v, str) and v.strip()), "")
    for token in (tokens.hugging_face, tokens.civitai, tokens.replicate):
        words = words.replace(token.strip(), "...") if token and token.strip() else words
    words = one_line(re.sub(r"\S*://\S*", "...", words)).rstrip(".")
    return f' ("{words}")' if words else ""
