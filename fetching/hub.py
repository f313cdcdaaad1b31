"""The one client of the Hugging Face Hub, over huggingface_hub: what a repository holds, and what the Hub refuses.

No message of the library is passed on: they quote addresses, and those of the Hub's storage are signed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from httpx2 import HTTPError
from huggingface_hub import HfApi, close_session, hf_hub_url, snapshot_download
from huggingface_hub.constants import ENDPOINT, REGEX_COMMIT_OID
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from fetching.deadline import Deadline, run_until

MAIN = "main"
ATTEMPTS = 4
MAX_PAUSE_SECONDS = 30
T = TypeVar("T")


class Refusal(Enum):
    """Why something does not come from the Hub: what was found, and what an operator can do."""

    GATED = (
        "it is gated, and {account}",
        "Accept its licence at https://huggingface.co/{repository} and set HF_TOKEN to a token of that account",
    )
    NO_REPOSITORY = "there is no such repository, or it is private and {account}", "Check the name and HF_TOKEN"
    NO_REVISION = "it has no such revision", "Check the revision"
    NO_FILE = "it has no such file", "Check the file's name"
    DISABLED = "the Hub has disabled it", "Choose another repository"
    BAD_NAME = "this is not the name of a repository", "Give one such as black-forest-labs/FLUX.1-dev"
    BAD_TOKEN = "the Hub does not know HF_TOKEN", "Set it to a valid token, or unset it where nothing is gated"
    STATUS = "{host} answered with status {status}", "Try again later"
    OFFLINE = "HF_HUB_OFFLINE is set", "Unset it"
    UNREACHABLE = "{host} cannot be reached ({detail})", "Give this machine access, or set HF_ENDPOINT to a mirror"
    BROKEN_OFF = "{host} gave only a part of what was asked for", "Try again later"
    BAD_ANSWER = (
        "{host} does not answer as the Hub does ({detail})",
        "Set HF_ENDPOINT to a complete mirror, or unset it",
    )
    DISK = "the cache folder cannot be used: {detail}", "Make room, or set HF_HUB_CACHE to another folder"
    DAMAGED = "{detail} was fetched again and still differs from what is expected", "Try again later"


class HubError(Exception):
    """Something that the Hub does not give; the message holds neither a token nor a signed address."""

    def __init__(
        self, refusal: Refusal, hub: Hub, repository: str, *, detail: str = "", status: int = 0, host: str = ""
    ) -> None:
        self.refusal = refusal
        self.status = status
        """Of the answer, or 0."""
        self.host = host or hub.host
        account = "the account of HF_TOKEN has no access" if hub.token else "HF_TOKEN is not set"
        found, remedy = (
            part.format(repository=repository, account=account, detail=detail, status=status, host=self.host)
            for part in refusal.value
        )
        super().__init__(f'Cannot get "{repository}" from the Hugging Face Hub: {found}. {remedy}.')


@dataclass(frozen=True)
class HubFile:
    """One file of a repository, as the Hub lists it."""

    path: str
    size_bytes: int
    digest: str
    """In hexadecimal digits: sha256, or git's sha1 for what is kept in git."""


@dataclass(frozen=True)
class Listing:
    """Files of a repository at one commit."""

    repository: str
    commit: str
    files: tuple[HubFile, ...]
    revision: str = MAIN
    """What the commit was asked for by: a branch, a tag, or the commit itself."""

    def only(self, wanted: Callable[[str], bool]) -> Listing:
        """The files whose path is wanted."""
        return replace(self, files=tuple(file for file in self.files if wanted(file.path)))


@dataclass(frozen=True)
class Location:
    """Where a file lies that the caller may read, at the commit that its revision is now."""

    commit: str
    address: str
    """Takes the caller's token; redirects to the Hub's storage."""
    etag: str | None
    """The sha256 of a large file."""
    size_bytes: int | None


@dataclass(frozen=True)
class Hub:
    """The Hub as one caller sees it."""

    endpoint: str | None = None
    """None is huggingface_hub's own."""
    token: str | None = field(default=None, repr=False)
    """None sends none, not even one that huggingface_hub would find by itself."""
    timeout_seconds: float = 10
    """Of one step of a question: connecting, or waiting for the next bytes."""
    answer_seconds: float = 60
    """Of a question with all its tries."""
    sleep: Callable[[float], None] | None = None
    """What waits between two tries; the default ends with `answer_seconds`."""

    @property
    def host(self) -> str:
        """What messages call it."""
        return urlsplit(self.endpoint or ENDPOINT).netloc.rpartition("@")[2]

    def listing(self, repository: str, revision: str = MAIN) -> Listing:
        """All files of a repository at the commit that the revision is now.

        A gated repository is listed to everyone; only `locate` shows that the caller may read a file.

        Raises:
            HubError: the Hub does not answer, or refuses.
        """
        with self.translated(repository):
            ask = partial(self._api.model_info, files_metadata=True, timeout=self.timeout_seconds)
            info = self._retried(lambda: ask(repository, revision=revision))
            if info.sha is None or not REGEX_COMMIT_OID.fullmatch(info.sha):
                raise FileMetadataError
            return Listing(repository, info.sha, tuple(map(_hub_file, info.siblings or ())), revision)

    def paths(self, repository: str, revision: str = MAIN) -> list[str]:
        """The path of every file in a repository.

        Raises:
            HubError: the Hub does not answer, or refuses.
        """
        with self.translated(repository):
            ask = partial(self._api.model_info, timeout=self.timeout_seconds)
            info = self._retried(lambda: ask(repository, revision=revision))
            return [_path_of(sibling) for sibling in info.siblings or ()]

    def locate(self, repository: str, path: str, revision: str = MAIN) -> Location:
        """Where a file lies; the answer shows that this caller may read it.

        Raises:
            HubError: the Hub does not answer, refuses, or has no such file.
        """
        with self.translated(repository):
            asked = hf_hub_url(repository, path, revision=revision, endpoint=self.endpoint)
            found = self._retried(lambda: self._api.get_hf_file_metadata(url=asked, timeout=self.timeout_seconds))
            if found.commit_hash is None:
                raise FileMetadataError
            address = hf_hub_url(repository, path, revision=found.commit_hash, endpoint=self.endpoint)
            return Location(found.commit_hash, address, found.etag, found.size)

    def download(self, listing: Listing, cache_dir: Path) -> None:
        """Fetch the files of a listing into huggingface_hub's cache; what is there already stays as it is.

        Raises:
            HubError: one cannot be had; files that came whole stay.
        """
        with self.translated(listing.repository):
            snapshot_download(
                listing.repository,
                revision=listing.commit,
                allow_patterns=[file.path for file in listing.files],
                cache_dir=cache_dir,
                endpoint=self.endpoint,
                token=self.token or False,
            )

    @property
    def _api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint, token=self.token or False)

    def _retried(self, call: Callable[[], T]) -> T:
        """Call; 429, 5xx and broken connections are tried again, as the answer asks but within reason.

        huggingface_hub knows no limit but one a step, so a silent or dripping Hub is given up here.
        """
        deadline = Deadline(self.answer_seconds)

        def attempts() -> T:
            for attempt in range(ATTEMPTS - 1):
                try:
                    return call()
                except HfHubHTTPError as error:
                    if error.response.status_code != 429 and error.response.status_code < 500:
                        raise
                    wanted = error.response.headers.get("Retry-After", "")
                except HTTPError:
                    wanted = ""
                deadline.require()
                pause = min(float(wanted), MAX_PAUSE_SECONDS) if wanted.isdecimal() else 0.5 * 2.0**attempt
                (self.sleep or deadline.pause)(pause)
            return call()

        return run_until(deadline, attempts, close_session)

    @contextmanager
    def translated(self, repository: str) -> Iterator[None]:
        """Turn what huggingface_hub and its cache raise into a HubError."""
        try:
            yield
        except HubError:
            raise
        except Exception as raised:  # of httpx2, the library, hf_xet, the disk, and answers of another shape
            cause = raised.__cause__ if isinstance(raised, LocalEntryNotFoundError) else None
            raise self._error(cause or raised, repository) from None

    def _error(self, error: BaseException, repository: str) -> HubError:
        status, host = 0, self.host
        if isinstance(error, HfHubHTTPError):
            status, host = error.response.status_code, error.response.url.netloc.decode()
        refusal = next((refusal for kind, refusal in REFUSALS if isinstance(error, kind)), Refusal.BAD_ANSWER)
        if refusal is Refusal.STATUS and host == self.host:
            refusal = {401: Refusal.BAD_TOKEN, 403: Refusal.GATED}.get(status, refusal)
        if refusal is Refusal.DISK and isinstance(error, OSError) and error.errno is None:
            refusal = Refusal.BROKEN_OFF  # raised by the library itself
        detail = (isinstance(error, OSError) and error.strerror) or type(error).__name__
        return HubError(refusal, self, repository, detail=detail, status=status, host=host)


REFUSALS: tuple[tuple[type[Exception], Refusal], ...] = (
    (GatedRepoError, Refusal.GATED),
    (RepositoryNotFoundError, Refusal.NO_REPOSITORY),
    (RevisionNotFoundError, Refusal.NO_REVISION),
    (RemoteEntryNotFoundError, Refusal.NO_FILE),
    (DisabledRepoError, Refusal.DISABLED),
    (HfHubHTTPError, Refusal.STATUS),
    (HFValidationError, Refusal.BAD_NAME),
    (OfflineModeIsEnabled, Refusal.OFFLINE),
    (FileMetadataError, Refusal.BAD_ANSWER),
    (HTTPError, Refusal.UNREACHABLE),
    (TimeoutError, Refusal.UNREACHABLE),
    (ConnectionError, Refusal.UNREACHABLE),
    (OSError, Refusal.DISK),
)
"""The refusal of each kind of error; the first that fits counts."""


def _hub_file(sibling: RepoSibling) -> HubFile:
    digest = sibling.blob_id if sibling.lfs is None else sibling.lfs.sha256
    size_bytes = sibling.size if sibling.lfs is None else sibling.lfs.size
    if not isinstance(digest, str) or not isinstance(size_bytes, int):
        raise FileMetadataError
    return HubFile(_path_of(sibling), size_bytes, digest)


def _path_of(sibling: RepoSibling) -> str:
    """Its path, which the library takes from the answer as it is."""
    if not isinstance(sibling.rfilename, str):
        raise FileMetadataError
    return sibling.rfilename
