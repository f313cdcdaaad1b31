"""What a service of LoRAs is: how its references are written, where their files lie, what its refusals mean.

A service is one module beside this one, with a reference type and a `SERVICE`; its row is in `services/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar
from urllib.parse import SplitResult

from errors import HttpStatusError, LoraAccessError
from fetching.network import Client
from lora_loading.finding.tokens import Tokens
from weights import Source


class LoraReference:
    """The parsed name of a LoRA; `str()` is its canonical form."""

    @property
    def label(self) -> str:
        """The name for messages and logs: short, without payload, query or secret."""
        return shortened(str(self), 200)

    @property
    def key(self) -> str:
        """The name for an index on disk: equal exactly when the references are; short, without a secret."""
        return str(self)

    @property
    def immutable(self) -> bool:
        """Whether the name fixes the content, so that the service need not be asked again."""
        return False


R = TypeVar("R", bound=LoraReference)


@dataclass(frozen=True)
class Endpoints:
    """The addresses of the services, without a slash at the end; mirrors and tests have others."""

    hugging_face: str = "https://huggingface.co"
    civitai: str = "https://civitai.com"
    replicate: str = "https://replicate.com"
    replicate_api: str = "https://api.replicate.com"


@dataclass(frozen=True)
class Network:
    """What a service asks its questions with."""

    client: Client
    endpoints: Endpoints
    hub_timeout_seconds: float = 10
    """Of one step of a request to the Hub, which is asked through its own library and not by `client`."""
    sleep: Callable[[float], None] | None = None
    """Waits between two tries at the Hub; the default is interruptible and ends with the Hub's deadline."""


@dataclass(frozen=True)
class Access:
    """Which token a service takes, and what to advise when it refuses."""

    token_of: Callable[[Tokens], str | None]
    """Picks this service's token among the caller's."""
    given_as: str
    """The input that gives the token, or the operator's variable."""
    advice: str
    """For callers without a token."""
    advice_to_holder: str
    """For callers who gave one."""


@dataclass(frozen=True)
class Service(Generic[R]):
    """One service."""

    reference: type[R]
    forms: tuple[str, ...]
    """How its references are written, for the message about a text that is none."""
    resolve: Callable[[Network, R, str | None], Source]
    """Returns where the file lies, for the holder of this token; may ask the service, downloads nothing."""
    access: Access
    hosts: tuple[str, ...] = ()
    """Hosts whose addresses are its references, without "www."."""
    parse_address: Callable[[SplitResult], R] | None = None
    """Reads an https address at one of the hosts; calls `refuse` where it is none."""
    parse_text: Callable[[str], R | None] | None = None
    """Reads a form that is no web address; None where the text is not of this form."""
    explain: Callable[[HttpStatusError, R, bool], LoraAccessError | None] | None = None
    """Explains what this service alone refuses for, None for any other reason; the flag says if a token was sent."""


class UnknownFormError(Exception):
    """The text is no reference; the message says what was found."""


def refuse(found: str) -> NoReturn:
    """Say that the text is no reference.

    Raises:
        UnknownFormError: always.
    """
    raise UnknownFormError(found)


def shortened(text: str, limit: int = 100) -> str:
    """The text, cut to `limit` characters with three dots at its end if it is longer."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def refusal(reference: LoraReference, access: Access, found: str, with_token: bool) -> LoraAccessError:
    """The error for a LoRA that its service does not give to this caller."""
    return LoraAccessError(message(reference, found, access.advice_to_holder if with_token else access.advice))


def message(reference: LoraReference, found: str, advice: str) -> str:
    """What was asked, what was found, what to do."""
    return f'Cannot read LoRA "{reference.label}": {found}. {advice}'
