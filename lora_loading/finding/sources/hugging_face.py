"""A file on the Hugging Face Hub, at the commit that its revision is now. Asked through the Hub's own library."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

from httpx2 import HTTPError
from huggingface_hub import HfApi, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # exported when it runs

from errors import DownloadError, HttpStatusError, LoraAccessError, LoraReferenceError
from lora_loading.finding.reference import HuggingFaceReference
from lora_loading.finding.references.path import is_safetensors
from lora_loading.finding.sources.access import Access, message, refusal
from lora_loading.finding.sources.api import bearer, moved, sha256_digest
from weights import Source

ACCESS = Access(
    token_of=lambda tokens: tokens.hugging_face,
    given_as="hf_api_token",
    advice="Check the name. If it is private or gated, set hf_api_token to a token that may read it.",
    advice_to_holder="Check the name, or set hf_api_token to a token of an account that may read it.",
)
TIMEOUT_SECONDS = 10
"""Of one step of a request to the Hub: connecting, or waiting for the next bytes."""
ATTEMPTS = 4
MAX_PAUSE_SECONDS = 30
MAX_PAGES = 10
"""Of the list of files, 1,000 each."""
PREFERRED_FILES = ("pytorch_lora_weights.safetensors", "lora.safetensors")

_GATED = re.compile(r"gated|is restricted|authorized list")
T = TypeVar("T")


@dataclass(frozen=True)
class Hub:
    """The Hub as one caller sees it."""

    endpoint: str
    token: str | None = field(repr=False)
    timeout_seconds: float
    sleep: Callable[[float], None]

    def list_files(self, repo: str, revision: str) -> list[str]:
        """Every path in the repository.

        HfApi.list_repo_tree takes no time limit and obeys any Retry-After (huggingface_hub 2.4), hence this loop.
        """
        revision = quote(revision, safe="")
        address = f"{self.endpoint}/api/models/{repo}/tree/{revision}?recursive=true&expand=false"
        paths: list[str] = []
        for _ in range(MAX_PAGES):
            page, following = self._retried(partial(self._page, address))
            paths += [entry["path"] for entry in page if entry["type"] == "file"]
            if following is None:
                break
            address = moved(following, self.endpoint)
        return paths

    def _page(self, address: str) -> tuple[Any, str | None]:
        headers = build_hf_headers(token=self.token or False)
        response = get_session().get(address, headers=headers, timeout=self.timeout_seconds)
        hf_raise_for_status(response)
        return response.json(), response.links.get("next", {}).get("url")

    def look_at(self, reference: HuggingFaceReference, path: str) -> Source:
        """Where a file lies at the commit that the revision is now; the answer shows that the caller may read it."""
        api = HfApi(endpoint=self.endpoint, token=self.token or False)
        address = hf_hub_url(reference.repo, path, revision=reference.revision, endpoint=self.endpoint)
        found = self._retried(partial(api.get_hf_file_metadata, url=address, timeout=self.timeout_seconds))
        if found.commit_hash is None:
            raise FileMetadataError("no commit")
        return Source(
            name=reference.label,
            address=hf_hub_url(reference.repo, path, revision=found.commit_hash, endpoint=self.endpoint),
            headers=bearer(self.token),
            revision=f"{found.commit_hash}/{path}",
            immutable=reference.immutable,
            sha256=sha256_digest(found.etag),  # a small file's ETag is something else
            size_bytes=found.size,
        )

    def _retried(self, call: Callable[[], T]) -> T:
        """Call; 429, 5xx and broken connections are tried again, as the answer asks but within reason."""
        for attempt in range(ATTEMPTS - 1):
            try:
                return call()
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status != 429 and status < 500:
                    raise
                wanted = error.response.headers.get("Retry-After", "")
            except HTTPError:
                wanted = ""
            self.sleep(min(float(wanted), MAX_PAUSE_SECONDS) if wanted.isdecimal() else 0.5 * 2.0**attempt)
        return call()


def resolve(hub: Hub, reference: HuggingFaceReference) -> Source:
    """Where the file lies that is meant.

    Raises:
        LoraAccessError: the Hub refuses it, or has no such thing.
        LoraReferenceError: several files fit the name.
        DownloadError: the Hub cannot be reached, or answers with something else.
    """
    with _translated(reference, hub.token is not None):
        path = reference.file or _choose(hub.list_files(reference.repo, reference.revision), reference)
        return hub.look_at(reference, path)


def explain(error: HttpStatusError, reference: HuggingFaceReference, with_token: bool) -> LoraAccessError | None:
    """What only the Hub refuses for: that a repository is gated. None for any other reason."""
    says_gated = error.status in (401, 403) and _GATED.search(error.body[:4096])
    return _gated(reference, with_token) if says_gated else None


def _choose(paths: Sequence[str], reference: HuggingFaceReference) -> str:
    """The file that is meant when none is named: one of the preferred names at the top, or the only one.

    Raises:
        LoraAccessError: there is none.
        LoraReferenceError: there are several.
    """
    top = f"{reference.path}/" if reference.path else ""
    found = sorted(path for path in paths if path.startswith(top) and is_safetensors(path))
    for name in PREFERRED_FILES:
        if f"{top}{name}" in found:
            return f"{top}{name}"
    if len(found) == 1:
        return found[0]
    if not found:
        where = "folder" if reference.path else "repository"
        raise LoraAccessError(message(reference, f"the {where} holds no .safetensors file", "Check the name."))
    listed = ", ".join(found[:20]) + (", ..." if len(found) > 20 else "")
    several = f"it holds {len(found)} files, and none is named: {listed}"
    raise LoraReferenceError(message(reference, several, f"Name one, such as {replace(reference, path=found[0])}."))


def _gated(reference: HuggingFaceReference, with_token: bool) -> LoraAccessError:
    found = "the repository is gated" + (" and the token has no access" if with_token else "")
    return refusal(reference, ACCESS, found, with_token)


@contextmanager
def _translated(reference: HuggingFaceReference, with_token: bool) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors of ours."""
    try:
        yield
    except GatedRepoError as error:
        raise _gated(reference, with_token) from error
    except RepositoryNotFoundError as error:
        hidden = "it is private, and the token may not read it" if with_token else "it is private"
        raise refusal(reference, ACCESS, f"there is no such repository, or {hidden}", with_token) from error
    except RevisionNotFoundError as error:
        found = f'the repository has no revision "{reference.revision}"'
        raise LoraAccessError(message(reference, found, "Check the branch, tag or commit.")) from error
    except RemoteEntryNotFoundError as error:
        found = f'there is no "{reference.path}" at revision "{reference.revision}"'
        raise LoraAccessError(message(reference, found, "Check the file's name.")) from error
    except DisabledRepoError as error:
        raise LoraAccessError(message(reference, "the repository is disabled", "Choose another.")) from error
    except HfHubHTTPError as error:
        status, host = error.response.status_code, error.response.url.host
        raise HttpStatusError(f"{host} answered {status}.", status=status, host=host) from error
    except OfflineModeIsEnabled as error:
        raise DownloadError("the operator set HF_HUB_OFFLINE. Use a LoRA from elsewhere.") from error
    except HFValidationError as error:
        raise LoraAccessError(message(reference, "it is no name of a repository", "Check the name.")) from error
    except HTTPError as error:
        raise DownloadError("Hugging Face cannot be reached. Try again later.") from error
    except (FileMetadataError, KeyError, TypeError, ValueError) as error:
        raise DownloadError("Hugging Face answered in a way that we do not know. Try again later.") from error
