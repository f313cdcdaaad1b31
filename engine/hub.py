"""Where a profile's files lie on this machine: a local folder as it is, or the Hub's cache, filled from the Hub.

Of a repository, one commit is taken, and only the files that are read. What the Hub lists of each file, its size and
digest, decides whether it is right. Where the Hub cannot be asked, what was fetched whole before serves.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError

from engine.hub_access import Hub, explained
from engine.hub_cache import RepositoryCache
from engine.hub_fetch import Snapshot, fetch
from engine.model_folders import Part, flaws, is_read, parts_by_source
from engine.profiles import ModelProfile
from errors import SettingsError

logger = logging.getLogger(__name__)


def fetch_profiles(
    profiles: tuple[ModelProfile, ...], token: str | None, endpoint: str | None, cache_dir: Path = Path(HF_HUB_CACHE)
) -> tuple[ModelProfile, ...]:
    """The same profiles with local folders for sources, each complete, after fetching what is missing.

    Args:
        profiles: their sources are local folders or repositories of the Hub.
        token: the operator's, for gated and private repositories.
        endpoint: the Hub's address; None is huggingface_hub's own default.
        cache_dir: the Hub's cache on this machine.

    Raises:
        SettingsError: a folder is not complete, or a repository cannot be had.
    """
    wanted = parts_by_source(profiles)
    folders = {source: path for source in wanted if (path := Path(source).expanduser()).is_dir()}
    hub = Hub(endpoint, token)
    snapshots = [_look_up(hub, source, parts, cache_dir) for source, parts in wanted.items() if source not in folders]
    if snapshots:
        fetch(hub, snapshots, cache_dir)
    folders |= {snapshot.repository: snapshot.folder for snapshot in snapshots}
    for source, folder in folders.items():
        _require_complete(source, folder, wanted[source])
    return tuple(
        replace(p, source=str(folders[p.source]), shared_source=str(folders[p.shared_source])) for p in profiles
    )


def _look_up(hub: Hub, repository: str, parts: tuple[Part, ...], cache_dir: Path) -> Snapshot:
    """What the Hub has of a repository for these parts; where it does not answer, what is here as a whole."""
    cache = RepositoryCache(cache_dir, repository)
    try:
        commit, files = hub.listing(repository)
        return Snapshot(repository, commit, tuple(file for file in files if is_read(file.path, parts)), cache)
    except HFValidationError as error:
        raise SettingsError(
            f'FLUX_DEV or FLUX_SCHNELL is "{repository}": there is no such folder, and a repository of the Hub has '
            "another kind of name. Set it to a local folder in diffusers layout, or to a repository such as "
            "black-forest-labs/FLUX.1-dev."
        ) from error
    except (HTTPError, OSError) as error:
        reason = explained(error, hub, repository)
        stored = cache.pinned()
        if stored is None:
            raise SettingsError(reason) from None  # the error may quote a signed address
        if found := flaws(cache.snapshot(stored), parts):
            raise SettingsError(f"{reason} The cache does not suffice: {'; '.join(found)}.") from None
        logger.warning("%s What is in the cache serves: commit %s.", reason, stored)
        return Snapshot(repository, stored, cache.listed(stored, parts), cache)


def _require_complete(source: str, folder: Path, parts: tuple[Part, ...]) -> None:
    if found := flaws(folder, parts):
        raise SettingsError(
            f'The model "{source}" is not complete in {folder}: {"; ".join(found)}. Put the whole model there in '
            "diffusers layout, or set FLUX_DEV or FLUX_SCHNELL to another folder or to a repository of the Hub."
        )
