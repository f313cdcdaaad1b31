"""The files that a model's parts are read from, in diffusers layout: a local folder, or a snapshot from the Hub.

A repository holds more than is read: the same weights in one file for other programs, images, other types. What is
read is one table; from it follow both what to fetch and what a folder must contain. Knows names and headers, not the
classes that are loaded from them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError, safe_open

from engine.profiles import ModelProfile
from errors import SettingsError
from fetching.hub import HubError, Listing
from fetching.hub_cache import HubCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One part of a model, and the folder of that name."""

    name: str
    config: str
    weights: str | None = None
    """The stem of the safetensors: one file, or an index and the shards that it names."""
    vocabularies: tuple[tuple[str, ...], ...] = ()
    """Sets of files, of which a tokenizer needs one."""
    extras: tuple[str, ...] = ()
    """Patterns of files that are read where there are any."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """The names of all files that may be read."""
        named = [self.config, *self.extras, *(name for names in self.vocabularies for name in names)]
        if self.weights is not None:
            whole = f"{self.weights}.safetensors"
            named += [whole, f"{whole}.index.json", f"{self.weights}-?????-of-?????.safetensors"]
        return tuple(named)


TOKENIZER = "tokenizer_config.json"
EXTRAS = ("special_tokens_map.json", "added_tokens.json")
OWN = (
    Part("transformer", "config.json", weights="diffusion_pytorch_model"),
    Part("scheduler", "scheduler_config.json"),
)
"""What a model does not share; the transformer first, as it is the largest."""
SHARED = (
    Part("vae", "config.json", weights="diffusion_pytorch_model"),
    Part("text_encoder", "config.json", weights="model"),
    Part("text_encoder_2", "config.json", weights="model"),
    Part("tokenizer", TOKENIZER, vocabularies=(("tokenizer.json",), ("vocab.json", "merges.txt")), extras=EXTRAS),
    Part("tokenizer_2", TOKENIZER, vocabularies=(("tokenizer.json",), ("spiece.model",)), extras=EXTRAS),
)  # fmt: skip
"""What is loaded once for all models."""
ELSEWHERE = "Or set FLUX_DEV and FLUX_SCHNELL to local folders in diffusers layout, or to other repositories."
PIPELINE = "model_index.json"
"""Names the class of every part; optional: fetched with the shared parts when present."""


def fetch_profiles(profiles: tuple[ModelProfile, ...], cache: HubCache) -> tuple[ModelProfile, ...]:
    """The same profiles with local folders for sources, each complete, after fetching what is missing.

    Args:
        profiles: their sources are local folders or repositories of the Hub.
        cache: fetches with the operator's token, for gated and private repositories.

    Raises:
        SettingsError: a folder is not complete, or a repository cannot be had.
    """
    wanted = parts_by_source(profiles)
    folders = {source: path for source in wanted if (path := Path(source).expanduser()).is_dir()}
    try:
        listings = [_listing(cache, source, parts) for source, parts in wanted.items() if source not in folders]
        cache.fetch(listings)
    except HubError as error:
        raise SettingsError(f"{error} {ELSEWHERE}") from None
    folders |= {listing.repository: cache.snapshot(listing) for listing in listings}
    for source, folder in folders.items():
        if found := flaws(folder, wanted[source]):
            raise SettingsError(f'The model "{source}" is not complete in {folder}: {"; ".join(found)}. {ELSEWHERE}')
    return tuple(
        replace(p, source=str(folders[p.source]), shared_source=str(folders[p.shared_source])) for p in profiles
    )


def _listing(cache: HubCache, source: str, parts: tuple[Part, ...]) -> Listing:
    """What is read of a repository, at its newest commit; at the cached one where the Hub does not give it."""
    try:
        return cache.hub.listing(source).only(lambda path: is_read(path, parts))
    except HubError as error:
        cached = cache.cached(source)
        if cached is None:
            raise
        cached = cached.only(lambda path: is_read(path, parts))
        missing = [f"{file.path} was damaged and is removed" for file in cache.missing(cached).files]
        if found := missing or flaws(cache.snapshot(cached), parts):
            raise SettingsError(f"{error} The cache does not suffice: {'; '.join(found)}. {ELSEWHERE}") from None
        logger.warning("%s The cached commit %s is used.", error, cached.commit)
        return cached


def parts_by_source(profiles: Iterable[ModelProfile]) -> Mapping[str, tuple[Part, ...]]:
    """What is read from each source that the profiles name."""
    parts: dict[str, dict[str, Part]] = {}
    for profile in profiles:
        parts.setdefault(profile.source, {}).update({part.name: part for part in OWN})
        parts.setdefault(profile.shared_source, {}).update({part.name: part for part in SHARED})
    return {source: tuple(named.values()) for source, named in parts.items()}


def is_read(path: str, parts: Iterable[Part]) -> bool:
    """Whether a repository's file is one that these parts may be read from."""
    if path == PIPELINE:
        return any(part in SHARED for part in parts)
    folder, _, name = path.partition("/")
    return "/" not in name and any(
        folder == part.name and any(fnmatchcase(name, pattern) for pattern in part.patterns) for part in parts
    )


def flaws(folder: Path, parts: Iterable[Part]) -> list[str]:
    """What a folder lacks for these parts, and which of its files are cut off or unreadable, in words; [] if nothing.

    Of the weights, only the headers are read: they tell how long each file must be.
    """
    return [flaw for part in parts for flaw in _flaws_of_part(folder, part)]


def _flaws_of_part(folder: Path, part: Part) -> Iterator[str]:
    if _json(folder / part.name / part.config) is None:
        yield _unread(folder, f"{part.name}/{part.config}")
    if part.vocabularies and not any(
        all((folder / part.name / name).is_file() for name in names) for names in part.vocabularies
    ):
        wanted = " or ".join(" with ".join(names) for names in part.vocabularies)
        yield f"{part.name}/ lacks {wanted}"
    if part.weights is not None:
        yield from _flaws_of_weights(folder, part.name, f"{part.weights}.safetensors")


def _flaws_of_weights(folder: Path, part: str, whole: str) -> Iterator[str]:
    index = f"{part}/{whole}.index.json"
    if not (folder / index).is_file():
        names = [whole]
    elif (shards := _shards(_json(folder / index))) is None:
        yield _unread(folder, index)
        return
    else:
        names = shards
    for name in names:
        path = folder / part / name
        if not path.is_file():
            yield f"{part}/{name} is missing"
        elif not _is_whole(path):
            yield f"{part}/{name} is cut off or no safetensors file, at {path.stat().st_size} bytes"


def _shards(index: object) -> list[str] | None:
    """The files that an index of weights names, in order; None if it is none."""
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table:
        return None
    names = {str(name) for name in table.values()}
    return None if any("/" in name for name in names) else sorted(names)


def _is_whole(path: Path) -> bool:
    """Whether the header is sound and describes exactly as many bytes as the file has."""
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


def _json(path: Path) -> object:
    """The content of a JSON file; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _unread(folder: Path, path: str) -> str:
    return f"{path} is {'no JSON' if (folder / path).is_file() else 'missing'}"
