"""Where a LoRA lies: a reference and the caller's tokens become a `Source`. May ask the service; downloads nothing.

The reference's service is asked, each by its file in `services`. Tokens are headers of single calls: no login, none
from the environment, none that the caller did not give. `explain` puts a service's refusal into words, for its API and
for a download that fails later.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from errors import DownloadError, HttpStatusError, LoraAccessError
from fetching.network import Client
from lora_loading.finding.services import service_of
from lora_loading.finding.services.api import json_object, one_line
from lora_loading.finding.services.service import Endpoints, LoraReference, Network, message, refusal
from lora_loading.finding.tokens import Tokens
from weights import Source

_REFUSALS = {401: "asks for a login", 403: "refuses it", 404: "has no such thing", 410: "no longer has it: archived"}
"""By status: what the host does."""
_REFUSALS_WITH_TOKEN = {401: "does not accept the token", 403: "refuses it: the token has no access"}


class Resolver:
    """Finds sources; keeps nothing between two calls."""

    def __init__(
        self,
        client: Client,
        endpoints: Endpoints | None = None,
        *,
        timeout_seconds: float = 10,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        """`timeout_seconds` and `sleep` are for the Hub, which is asked through its own library, not by `client`."""
        self._network = Network(client, endpoints or Endpoints(), timeout_seconds, sleep)

    def resolve(self, reference: LoraReference, tokens: Tokens) -> Source:
        """Return where the file lies that `reference` names, as the caller's own tokens may see it.

        Raises:
            LoraAccessError: the service refuses it, or has no such thing.
            LoraReferenceError: several files fit the name.
            LoraFormatError: the service says that it is no LoRA for FLUX.1.
            DownloadError: the service cannot be reached, or answers with something else.
        """
        try:
            return service_of(reference).resolve(self._network, reference, token_for(reference, tokens))
        except HttpStatusError as error:
            raise explain(error, reference, tokens) from error
        except DownloadError as error:
            raise DownloadError(f'Cannot find LoRA "{reference.label}": {error}') from error


def token_for(reference: LoraReference, tokens: Tokens) -> str | None:
    """The token that the reference's service is asked with; what is found with it is for its holders alone.

    Raises:
        LoraAccessError: it holds characters that no header can carry.
    """
    access = service_of(reference).access
    token = (access.token_of(tokens) or "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        found = f"{access.given_as} holds blanks, control or non-ASCII characters"
        raise LoraAccessError(message(reference, found, "Give it anew."))
    return token or None


def explain(error: HttpStatusError, reference: LoraReference, tokens: Tokens) -> LoraAccessError | DownloadError:
    """What a status means for the user: an error to raise `from` the first, without a token or an address."""
    with_token = token_for(reference, tokens) is not None
    service = service_of(reference)
    if service.explain is not None and (special := service.explain(error, reference, with_token)) is not None:
        return special
    if error.status in _REFUSALS:
        does = (_REFUSALS_WITH_TOKEN if with_token else {}).get(error.status, _REFUSALS[error.status])
        return refusal(reference, service.access, f"{error.host} {does}{_said(error, tokens)}", with_token)
    found = f"{error.host} limits how often it is asked" if error.status == 429 else f"{error.host} failed"
    return DownloadError(message(reference, f"{found} (status {error.status})", "Try again in some minutes."))


def _said(error: HttpStatusError, tokens: Tokens) -> str:
    """The server's own words, without addresses and tokens; empty if it said nothing in JSON."""
    body = json_object(error)
    words = next((v for v in map(body.get, ("message", "error", "detail")) if isinstance(v, str) and v.strip()), "")
    for token in (tokens.hugging_face, tokens.civitai, tokens.replicate):
        words = words.replace(token.strip(), "...") if token and token.strip() else words
    words = one_line(re.sub(r"\S*://\S*", "...", words)).rstrip(".")
    return f' ("{words}")' if words else ""
