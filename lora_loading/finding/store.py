"""LoRA files by reference: found at their service, fetched with the right tokens, held in the cache while in use."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from errors import DownloadError, HttpStatusError, LoraFormatError, LoraReferenceError, SettingsError
from fetching.download import Limits
from fetching.network import Client
from fetching.store import DiskQuota
from logs import Event, log_stage
from lora_loading.finding.reference import parse
from lora_loading.finding.resolve import Resolver, explain, token_for
from lora_loading.finding.services.service import Endpoints, LoraReference
from lora_loading.finding.tokens import Tokens
from settings import Settings
from weights import CachedFile, WeightsCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Operator:
    """Whose service this is: the operator's tokens, and for which LoRAs they may be used."""

    tokens: Tokens
    default_lora: LoraReference | None = None
    base_lora: tuple[LoraReference, float] | None = None
    """Reference and scale. This one and the default one are fetched with the operator's tokens."""
    shares: bool = False
    """Whether callers' LoRAs are fetched with them too, where the caller gives none."""

    def tokens_for(self, reference: LoraReference, given: Tokens) -> Tokens:
        """The tokens that a LoRA of this caller is fetched with."""
        own = {self.default_lora, self.base_lora and self.base_lora[0]}
        if not self.shares and reference not in own:
            return given
        return Tokens(
            given.hugging_face or self.tokens.hugging_face,
            given.civitai or self.tokens.civitai,
            given.replicate or self.tokens.replicate,
        )


class LoraStore:
    """Where LoRA files come from."""

    def __init__(self, cache: WeightsCache, resolver: Resolver, operator: Operator) -> None:
        self._cache = cache
        self._resolver = resolver
        self._operator = operator

    @property
    def default_lora(self) -> LoraReference | None:
        """Used where a request names no main LoRA."""
        return self._operator.default_lora

    @property
    def base_lora(self) -> tuple[LoraReference, float] | None:
        """Part of every image: reference and scale."""
        return self._operator.base_lora

    @contextmanager
    def open(self, reference: LoraReference, tokens: Tokens) -> Iterator[CachedFile]:
        """Hold the file that `reference` names for whoever has these tokens.

        Raises:
            LoraError: the service refuses it, or what came is no safetensors file.
            DownloadError: it cannot be fetched.
        """
        with ExitStack() as held:
            file = self._enter(held, reference, self._operator.tokens_for(reference, tokens))
            event = Event("fetch_lora", file.seconds, file.size_bytes, file.outcome)
            found = f"{file.outcome}, {file.size_bytes / 1e6:.1f} MB, {file.seconds:.2f} s"
            log_stage(logger, event, f"LoRA {reference.label}: {found}")
            yield file

    def _enter(self, held: ExitStack, reference: LoraReference, tokens: Tokens) -> CachedFile:
        token = token_for(reference, tokens) or ""
        try:
            return held.enter_context(
                self._cache.open(reference.key, token, lambda: self._resolver.resolve(reference, tokens))
            )
        except HttpStatusError as error:
            raise explain(error, reference, tokens) from error
        except DownloadError as error:
            raise DownloadError(_named(error, reference)) from error
        except LoraFormatError as error:
            raise LoraFormatError(_named(error, reference)) from error


def _named(error: Exception, reference: LoraReference) -> str:
    """The message, with the LoRA's name where it lacks it."""
    message = str(error)
    return message if reference.label in message else f'Cannot fetch LoRA "{reference.label}": {message}'


def open_store(settings: Settings) -> LoraStore:
    """The store that the settings describe.

    Raises:
        SettingsError: the cache folder cannot be used, or one of the operator's LoRAs is in no known form.
    """
    client = Client(settings.trusted_hosts)
    limits, quota = (
        Limits(settings.max_download_bytes),
        DiskQuota(settings.cache_min_free_bytes, settings.cache_max_bytes),
    )
    try:
        cache = WeightsCache(settings.cache_dir.expanduser(), client, limits=limits, quota=quota)
    except OSError as error:
        found = f"FLUX_CACHE_DIR is {settings.cache_dir}, which cannot be used: {error.strerror}"
        raise SettingsError(f"{found}. Set it to another folder, or to a new one below it.") from error
    tokens = Tokens(settings.hugging_face_token, settings.civitai_token, settings.replicate_token)
    operator = Operator(tokens, default_lora(settings), base_lora(settings), settings.share_operator_tokens)
    return LoraStore(cache, Resolver(client, _endpoints(settings)), operator)


def _endpoints(settings: Settings) -> Endpoints:
    services = Endpoints()
    return Endpoints(
        settings.hugging_face_endpoint or services.hugging_face,
        settings.civitai_endpoint or services.civitai,
        settings.replicate_endpoint or services.replicate,
        settings.replicate_endpoint or services.replicate_api,
    )


def default_lora(settings: Settings) -> LoraReference | None:
    """The LoRA of requests that name no main LoRA.

    Raises:
        SettingsError: FLUX_DEFAULT_LORA is in no known form.
    """
    lora = settings.default_lora
    return None if lora is None else _parsed("FLUX_DEFAULT_LORA:", lora, settings)


def base_lora(settings: Settings) -> tuple[LoraReference, float] | None:
    """The LoRA that is part of every image, and its scale.

    Raises:
        SettingsError: FLUX_BASE_LORA is in no known form.
    """
    if settings.base_lora is None:
        return None
    text, scale = settings.base_lora
    return _parsed("FLUX_BASE_LORA:", text, settings), scale


def _parsed(setting: str, text: str, settings: Settings) -> LoraReference:
    try:
        return parse(text, settings.trusted_hosts)
    except LoraReferenceError as error:
        raise SettingsError(f"{setting} {error}") from error
