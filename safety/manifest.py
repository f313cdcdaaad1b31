"""How a checker gets its weight files: each pinned to a commit, a size and a digest, and verified at every start.

Only safetensors are read. The architecture and the preprocessing are in our code, so no other file of a repository is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from errors import SettingsError
from fetching.hub import HubError, HubFile, Listing
from fetching.hub_cache import HubCache


@dataclass(frozen=True)
class WeightFile:
    """One file of a Hub repository at one commit."""

    repository: str
    revision: str
    size_bytes: int
    sha256: str
    name: str = "model.safetensors"


@dataclass(frozen=True)
class Weights:
    """Where the weight files come from: a folder of the operator's, or the Hub and its cache."""

    folder: str | None
    """Holds `<repository>/<name>`; None fetches from the Hub."""
    cache: HubCache

    def obtain(self, file: WeightFile) -> Path:
        """Return the verified file.

        Raises:
            SettingsError: it is not there, cannot be fetched, or is not the file of the manifest.
        """
        path = self._fetch(file) if self.folder is None else Path(self.folder) / file.repository / file.name
        verify(path, file)
        return path

    def _fetch(self, file: WeightFile) -> Path:
        one = HubFile(file.name, file.size_bytes, file.sha256)
        listing = Listing(file.repository, file.revision, (one,), revision=file.revision)
        try:
            self.cache.fetch([listing])
        except HubError as error:
            raise SettingsError(
                f"The safety checker lacks its weights. {error} Or fetch {file.name} of revision {file.revision} "
                f"elsewhere and set FLUX_SAFETY_FOLDER to a folder that holds {file.repository}/{file.name}."
            ) from None
        return self.cache.snapshot(listing) / file.name


def verify(path: Path, file: WeightFile) -> None:
    """Compare a file's size and digest with the manifest.

    Raises:
        SettingsError: it is missing or differs.
    """
    if not path.is_file():
        raise SettingsError(
            f"The safety checker needs {file.repository}, but there is no {path}. Put its {file.name} of revision "
            f"{file.revision} there, or unset FLUX_SAFETY_FOLDER to fetch it from the Hub."
        )
    size_bytes = path.stat().st_size
    if size_bytes != file.size_bytes:
        raise SettingsError(_altered(path, file, f"has {size_bytes} bytes instead of {file.size_bytes}"))
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != file.sha256:
        raise SettingsError(_altered(path, file, f"has the digest {digest} instead of {file.sha256}"))


def _altered(path: Path, file: WeightFile, found: str) -> str:
    return (
        f"The safety checker's weights {path} {found}: it is not the {file.name} of {file.repository} at revision "
        f"{file.revision}. Replace it, or unset FLUX_SAFETY_FOLDER to fetch it from the Hub."
    )
