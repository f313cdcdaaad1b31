"""How a service lets callers in, and what they can do when it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from errors import LoraAccessError
from lora_loading.finding.reference import LoraReference
from lora_loading.finding.tokens import Tokens


@dataclass(frozen=True)
class Access:
    """A service's token, and the advice when the service gives nothing."""

    token_of: Callable[[Tokens], str | None]
    """The one of a caller's tokens that this service takes."""
    given_as: str
    """The input that gives the token, or the operator's variable."""
    advice: str
    """What to do without a token."""
    advice_to_holder: str
    """For whoever gave a token already."""


def refusal(reference: LoraReference, access: Access, found: str, with_token: bool) -> LoraAccessError:
    """The error of a LoRA that its service does not give to this caller."""
    return LoraAccessError(message(reference, found, access.advice_to_holder if with_token else access.advice))


def message(reference: LoraReference, found: str, advice: str) -> str:
    """What was asked, what was found, what to do."""
    return f'Cannot read LoRA "{reference.label}": {found}. {advice}'
