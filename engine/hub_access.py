"""Ask the Hub what a repository holds, and put its refusals in words. Stores nothing.

The Hub's own errors quote addresses, and those of its storage are signed: no message of theirs is passed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from httpx2 import HTTPError
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.constants import ENDPOINT, REGEX_COMMIT_OID
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling

from engine.hub_cache import HubFile
from errors import SettingsError

LISTING_SECONDS = 30
ELSEWHERE = "set FLUX_DEV or FLUX_SCHNELL to a local folder in diffusers layout"
"""The remedy that always remains."""


@dataclass(frozen=True)
class Hub:
    """Where the Hub is, and how to be let in."""

    endpoint: str | None
    """None is huggingface_hub's own."""
    token: str | None = field(repr=False)
    """None sends none, not even one that huggingface_hub would find by itself."""

    @property
    def host(self) -> str:
        """What messages call it."""
        return urlsplit(self.endpoint or ENDPOINT).netloc.rpartition("@")[2]

    @property
    def headers(self) -> Mapping[str, str]:
        """What a download is asked with; the token goes to the Hub and not to its storage."""
        return {} if self.token is None else {"authorization": f"Bearer {self.token}"}

    def address(self, repository: str, commit: str, file: HubFile) -> str:
        """Where a file is asked for."""
        return hf_hub_url(repository, file.path, revision=commit, endpoint=self.endpoint)

    def listing(self, repository: str) -> tuple[str, tuple[HubFile, ...]]:
        """The commit of the main branch, and all files at it.

        Raises:
            HTTPError, OSError: the Hub does not answer, or refuses; `explained` says how.
            HFValidationError: the name is none of a repository.
            SettingsError: it answers, but not as the Hub does.
        """
        api = HfApi(endpoint=self.endpoint, token=self.token or False)
        info = api.model_info(repository, files_metadata=True, timeout=LISTING_SECONDS)
        files = [_hub_file(sibling) for sibling in info.siblings or ()]
        known = tuple(file for file in files if file is not None)
        if info.sha is None or not REGEX_COMMIT_OID.fullmatch(info.sha) or len(known) < len(files):
            raise SettingsError(
                f'{self.host} does not list the commit, sizes and digests of "{repository}". Set HF_ENDPOINT to a '
                f"complete mirror of the Hub, unset it, or {ELSEWHERE}."
            )
        return info.sha, known


def _hub_file(sibling: RepoSibling) -> HubFile | None:
    """The file, if the listing says how large it is and which digest it has."""
    digest = sibling.blob_id if sibling.lfs is None else sibling.lfs.sha256
    size_bytes = sibling.size if sibling.lfs is None else sibling.lfs.size
    if digest is None or size_bytes is None or not digest.isalnum():  # it becomes the name of a file
        return None
    return HubFile(sibling.rfilename, size_bytes, digest)


def explained(error: HTTPError | OSError, hub: Hub, repository: str) -> str:
    """A failure in words, and what to do."""
    page = f"https://huggingface.co/{repository}"
    status, answering = None, hub.host
    if isinstance(error, HfHubHTTPError):
        status, answering = error.response.status_code, error.response.url.netloc.decode()
    if isinstance(error, GatedRepoError) or (status == 403 and answering == hub.host):
        if hub.token is None:
            return (
                f'The Hub gives "{repository}" only to accounts that accepted its licence. Accept it at {page} and set '
                f"HF_TOKEN to a token of that account, or {ELSEWHERE}."
            )
        return (
            f'The Hub does not give "{repository}" to the account of HF_TOKEN. Accept the licence at {page} with that '
            f"account, and let the token read gated repositories; or {ELSEWHERE}."
        )
    if isinstance(error, RepositoryNotFoundError):
        shown = "does not show it to the account of HF_TOKEN" if hub.token else "shows it only with a token in HF_TOKEN"
        return (
            f'The Hub has no model "{repository}", or {shown}; nor is there a folder of that name. Correct FLUX_DEV or '
            "FLUX_SCHNELL."
        )
    if status == 401:
        return "The Hub does not know HF_TOKEN. Set it to a valid token, or unset it where nothing is gated."
    if status is not None:
        return f"{answering} answers with status {status}. Try again later, or {ELSEWHERE}."
    if isinstance(error, HTTPError) or error.errno is None:
        return (
            f"The Hub ({hub.host}) cannot be reached ({type(error).__name__}). Give this machine access to it, set "
            f"HF_ENDPOINT to a mirror, or {ELSEWHERE}."
        )
    return (
        f"The Hub's cache cannot be used: {error.strerror}. Make room, set HF_HUB_CACHE to another folder, or "
        f"{ELSEWHERE}."
    )
