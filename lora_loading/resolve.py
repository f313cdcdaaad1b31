"""Where a LoRA lies: a reference and the caller's tokens become a `Source`. May ask the service; downloads nothing.

One function per service, one table for all. Tokens are headers of single calls: no login, none from the environment,
none that the caller did not give. What a service refuses is explained by `explain`, the same for its API and for a
download that fails later.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

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

from errors import DownloadError, HttpStatusError, LoraAccessError, LoraFormatError, LoraReferenceError
from fetching.network import Client
from lora_loading.reference import (
    CivitaiReference,
    DataReference,
    HuggingFaceReference,
    LoraReference,
    ReplicateDelivery,
    ReplicateReference,
    UrlReference,
)
from lora_loading.tokens import Tokens
from weights import Container, Source

TIMEOUT_SECONDS = 10
"""Of one step of a request to the Hub: connecting, or waiting for the next bytes."""
ATTEMPTS = 4
MAX_PAUSE_SECONDS = 30
MAX_PAGES = 10
"""Of a list: 1,000 files each on the Hub, 100 trainings each on Replicate."""
PREFERRED_FILES = ("pytorch_lora_weights.safetensors", "lora.safetensors")
BASE_MODEL = "Flux.1"
CIVITAI_HOSTS = ("civitai.com", "civitai.red", "civitai.green")
LORA_TYPES = ("lora", "locon", "dora")

logger = logging.getLogger(__name__)
Headers = tuple[tuple[str, str], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Endpoints:
    """Where the services are; mirrors and tests are elsewhere. No slash at the end."""

    hugging_face: str = "https://huggingface.co"
    civitai: str = "https://civitai.com"
    replicate: str = "https://replicate.com"
    replicate_api: str = "https://api.replicate.com"


class Resolver:
    """Finds sources; keeps nothing between two calls."""

    def __init__(
        self,
        client: Client,
        endpoints: Endpoints | None = None,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`timeout_seconds` and `sleep` are for the Hub, which is asked through its own library, not by `client`."""
        self._timeout_seconds = timeout_seconds
        self._client = client
        self._endpoints = endpoints or Endpoints()
        self._sleep = sleep

    def resolve(self, reference: LoraReference, tokens: Tokens) -> Source:
        """Return where the file lies that `reference` names, as the caller's own tokens may see it.

        Raises:
            LoraAccessError: the service refuses it, or has no such thing.
            LoraReferenceError: several files fit the name.
            LoraFormatError: the service says that it is no LoRA for FLUX.1.
            DownloadError: the service cannot be reached, or answers with something else.
        """
        try:
            return self._ask(reference, token_for(reference, tokens))
        except HttpStatusError as error:
            raise explain(error, reference, tokens) from error
        except DownloadError as error:
            raise DownloadError(f'Cannot find LoRA "{reference.label}": {error}') from error

    def _ask(self, reference: LoraReference, token: str | None) -> Source:
        match reference:
            case ReplicateReference():
                return _replicate(self._client, self._endpoints, reference, token)
            case HuggingFaceReference():
                hub = _Hub(self._endpoints.hugging_face, token, self._timeout_seconds, self._sleep)
                return _hugging_face(hub, reference)
            case CivitaiReference():
                return _civitai(self._client, self._endpoints.civitai, reference, token)
            case ReplicateDelivery():
                return Source(name=reference.label, address=reference.address, container=Container.TAR)
            case UrlReference():
                return Source(name=reference.label, address=reference.address)
            case DataReference():
                return _data(reference)


def token_for(reference: LoraReference, tokens: Tokens) -> str | None:
    """The token that plays a part in finding `reference`: what is found with it is for its holders alone.

    Raises:
        LoraAccessError: it cannot be sent.
    """
    match reference:
        case HuggingFaceReference():
            token = tokens.hugging_face
        case CivitaiReference():
            token = tokens.civitai
        case ReplicateReference():
            token = tokens.replicate
        case _:
            return None
    token = (token or "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        name = _HELP[type(reference)].token_name
        raise LoraAccessError(_message(reference, f"{name} holds characters that no token has", "Give it anew."))
    return token or None


def _bearer(token: str | None) -> Headers:
    return () if token is None else (("Authorization", f"Bearer {token}"),)


@contextmanager
def _known_shape(service: str) -> Iterator[None]:
    """Turn what unexpected JSON raises into a DownloadError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DownloadError(f"{service} answered with JSON of a shape that we do not know. Try again later.") from error


# Replicate


def _replicate(client: Client, endpoints: Endpoints, reference: ReplicateReference, token: str | None) -> Source:
    """The training's own tar where a token shows it, else the public address of the weights."""
    version, address = reference.version, None
    if token is not None:
        try:
            version = version or _latest_version(client, endpoints.replicate_api, reference, token)
            address = _trained_weights(client, endpoints.replicate_api, reference, version, token)
        except HttpStatusError as error:
            logger.warning("Replicate's API answered %s; trying the public address", error.status)
    path = f"/versions/{version}" if version else ""
    public = f"{endpoints.replicate}/{reference.owner}/{reference.name}{path}/_weights"
    return Source(
        name=reference.label,
        address=address or public,
        container=Container.TAR,
        revision=version,
        immutable=reference.immutable,
    )


def _latest_version(client: Client, api: str, reference: ReplicateReference, token: str) -> str | None:
    model = client.get_json(f"{api}/v1/models/{reference.owner}/{reference.name}", dict(_bearer(token)))
    with _known_shape("Replicate"):
        return str(model["latest_version"]["id"]) if model["latest_version"] else None


def _trained_weights(
    client: Client, api: str, reference: ReplicateReference, version: str | None, token: str
) -> str | None:
    """The address of the tar that a training of the token's account made, or None. The newest training comes first."""
    headers = dict(_bearer(token))
    for training in _trainings(client, api, headers):
        with _known_shape("Replicate"):
            if training["status"] == "succeeded" and _made(training["output"], reference, version):
                found = client.get_json(f"{api}/v1/trainings/{quote(training['id'], safe='')}", headers)
                weights = found["output"].get("weights")
                return weights if isinstance(weights, str) else None
    return None


def _trainings(client: Client, api: str, headers: dict[str, str]) -> Iterator[Any]:
    address: str | None = f"{api}/v1/trainings"
    for _ in range(MAX_PAGES):
        if address is None:
            return
        page = client.get_json(address, headers)
        with _known_shape("Replicate"):
            yield from page["results"]
            address = _moved(page["next"], api) if page.get("next") else None


def _made(output: dict[str, Any] | None, reference: ReplicateReference, version: str | None) -> bool:
    """Whether a training's output is the model's wanted version, or any of its versions where none is known."""
    model, _, made = str((output or {}).get("version") or "").rpartition(":")
    same_model = model.lower() == f"{reference.owner}/{reference.name}".lower()
    return made.startswith(version or "") and (same_model or (not model and version is not None))


def _moved(address: str, endpoint: str) -> str:
    """An address of a service at our endpoint for it: a mirror, or the service itself, and so safe for its token."""
    parts = urlsplit(address)
    return f"{endpoint}{parts.path}{'?' if parts.query else ''}{parts.query}"


# Hugging Face


@dataclass(frozen=True)
class _Hub:
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
            address = _moved(following, self.endpoint)
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
            headers=_bearer(self.token),
            revision=f"{found.commit_hash}/{path}",
            immutable=reference.immutable,
            sha256=_sha256(found.etag),
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


def _hugging_face(hub: _Hub, reference: HuggingFaceReference) -> Source:
    with _hub_errors(reference, hub.token is not None):
        path = reference.file or _choose(hub.list_files(reference.repo, reference.revision), reference)
        return hub.look_at(reference, path)


def _choose(paths: Sequence[str], reference: HuggingFaceReference) -> str:
    """The file that is meant when none is named: one of the preferred names at the top, or the only one.

    Raises:
        LoraAccessError: there is none.
        LoraReferenceError: there are several.
    """
    top = f"{reference.path}/" if reference.path else ""
    found = sorted(p for p in paths if p.startswith(top) and p.lower().endswith(".safetensors"))
    for name in PREFERRED_FILES:
        if f"{top}{name}" in found:
            return f"{top}{name}"
    if len(found) == 1:
        return found[0]
    asked = f'Cannot read LoRA "{reference.label}"'
    if not found:
        where = "folder" if reference.path else "repository"
        raise LoraAccessError(f"{asked}: the {where} holds no .safetensors file. Check the name.")
    listed = ", ".join(found[:20]) + (", ..." if len(found) > 20 else "")
    example = f"huggingface.co/{reference.repo}/blob/{quote(reference.revision, safe='')}/{quote(found[0])}"
    raise LoraReferenceError(
        f"{asked}: it holds {len(found)} files, and none is named: {listed}. Name one, such as {example}."
    )


def _sha256(text: str | None) -> str | None:
    """The digest in lower case if the text is one; the ETag of a small file on the Hub is something else."""
    return text.lower() if text is not None and re.fullmatch(r"[0-9A-Fa-f]{64}", text) else None


@contextmanager
def _hub_errors(reference: HuggingFaceReference, with_token: bool) -> Iterator[None]:
    """Translate what huggingface_hub raises."""
    try:
        yield
    except GatedRepoError as error:
        found = "the repository is gated" + (" and the token has no access" if with_token else "")
        raise _refusal(reference, found, with_token) from error
    except RepositoryNotFoundError as error:
        hidden = "it is private, and the token may not read it" if with_token else "it is private"
        raise _refusal(reference, f"there is no such repository, or {hidden}", with_token) from error
    except RevisionNotFoundError as error:
        found = f'the repository has no revision "{reference.revision}"'
        raise LoraAccessError(_message(reference, found, "Check the branch, tag or commit.")) from error
    except RemoteEntryNotFoundError as error:
        found = f'there is no "{reference.path}" at revision "{reference.revision}"'
        raise LoraAccessError(_message(reference, found, "Check the file's name.")) from error
    except DisabledRepoError as error:
        raise LoraAccessError(_message(reference, "the repository is disabled", "Choose another.")) from error
    except HfHubHTTPError as error:
        status, host = error.response.status_code, error.response.url.host
        raise HttpStatusError(f"{host} answered {status}.", status=status, host=host) from error
    except OfflineModeIsEnabled as error:
        raise DownloadError("the operator set HF_HUB_OFFLINE. Use a LoRA from elsewhere.") from error
    except HFValidationError as error:
        raise LoraAccessError(_message(reference, "it is no name of a repository", "Check the name.")) from error
    except HTTPError as error:
        raise DownloadError("Hugging Face cannot be reached. Try again later.") from error
    except (FileMetadataError, KeyError, TypeError, ValueError) as error:
        raise DownloadError("Hugging Face answered in a way that we do not know. Try again later.") from error


# CivitAI


@dataclass(frozen=True)
class _CivitaiFile:
    id: int
    address: str | None
    sha256: str | None
    primary: bool


@dataclass(frozen=True)
class _CivitaiVersion:
    id: int
    model_id: int | None
    model_type: str
    base_model: str
    published_at: str
    """ISO 8601 in UTC, so that the newest is the greatest; empty for a draft."""
    trigger_words: tuple[str, ...]
    files: tuple[_CivitaiFile, ...]
    """The safetensors files of type Model."""


def _civitai(client: Client, endpoint: str, reference: CivitaiReference, token: str | None) -> Source:
    version = _civitai_version(client, endpoint, reference, dict(_bearer(token)))
    file = next(iter(sorted(version.files, key=lambda file: not file.primary)), None)
    if file is None:
        raise LoraFormatError(
            _message(reference, f"version {version.id} has no safetensors file", "Choose another version.")
        )
    address = _civitai_address(file.address, version.id, endpoint)
    return Source(
        name=reference.label,
        address=address,
        headers=_bearer(token) if address.startswith(f"{endpoint}/") else (),
        revision=f"version {version.id}, file {file.id}",
        immutable=reference.immutable,
        sha256=file.sha256,
        facts=(("trigger words", ", ".join(version.trigger_words)),) if version.trigger_words else (),
    )


def _civitai_version(
    client: Client, endpoint: str, reference: CivitaiReference, headers: dict[str, str]
) -> _CivitaiVersion:
    """The version that is named, else the newest for FLUX.1; either is a LoRA for FLUX.1.

    Raises:
        LoraAccessError: the version belongs to another model.
        LoraFormatError: it is for another base model, or no LoRA.
    """
    if reference.version_id is None:
        answer = client.get_json(f"{endpoint}/api/v1/models/{reference.model_id}", headers)
        with _known_shape("CivitAI"):
            return _newest_for_flux([_read_version(v, answer) for v in answer["modelVersions"]], reference)
    answer = client.get_json(f"{endpoint}/api/v1/model-versions/{reference.version_id}", headers)
    with _known_shape("CivitAI"):
        version = _read_version(answer, answer.get("model") or {})
    if reference.model_id not in (None, version.model_id):
        found = f"version {version.id} belongs to model {version.model_id}, not to model {reference.model_id}"
        raise LoraAccessError(_message(reference, found, "Check both numbers."))
    return _newest_for_flux([version], reference)


def _newest_for_flux(versions: Sequence[_CivitaiVersion], reference: CivitaiReference) -> _CivitaiVersion:
    fitting = [version for version in versions if version.base_model.startswith(BASE_MODEL)]
    if not fitting:
        found = ", ".join(sorted({_one_line(version.base_model) for version in versions})) or "nothing"
        raise LoraFormatError(_message(reference, f"it is made for {found}", f"Choose a LoRA for {BASE_MODEL}."))
    newest = max(fitting, key=lambda version: (version.published_at, version.id))
    if newest.model_type and newest.model_type.lower() not in LORA_TYPES:
        raise LoraFormatError(_message(reference, f"it is a {_one_line(newest.model_type)}", "Choose a LoRA."))
    return newest


def _read_version(version: dict[str, Any], model: dict[str, Any]) -> _CivitaiVersion:
    """Read a version out of its JSON; `model` is the JSON around it, or as much as is told."""
    files = [f for f in version["files"] if f.get("type") == "Model"]
    return _CivitaiVersion(
        id=int(version["id"]),
        model_id=version.get("modelId"),
        model_type=str(model.get("type") or ""),
        base_model=str(version["baseModel"]),
        published_at=str(version.get("publishedAt") or ""),
        trigger_words=tuple(_one_line(str(word)) for word in version.get("trainedWords") or ()),
        files=tuple(_read_file(f) for f in files if (f.get("metadata") or {}).get("format") == "SafeTensor"),
    )


def _read_file(file: dict[str, Any]) -> _CivitaiFile:
    return _CivitaiFile(
        id=int(file["id"]),
        address=file.get("downloadUrl"),
        sha256=_sha256((file.get("hashes") or {}).get("SHA256")),
        primary=bool(file.get("primary")),
    )


def _civitai_address(address: str | None, version_id: int, endpoint: str) -> str:
    if not address:
        return f"{endpoint}/api/download/models/{version_id}"
    return _moved(address, endpoint) if urlsplit(address).hostname in CIVITAI_HOSTS else address


# Data


def _data(reference: DataReference) -> Source:
    """A tar's digest and size are not its member's, so only a bare file has them."""
    return Source(
        name=reference.label,
        address=str(reference),
        container=Container.TAR if reference.is_tar else Container.SAFETENSORS,
        revision=f"sha256:{reference.sha256}",
        immutable=True,
        sha256=None if reference.is_tar else reference.sha256,
        size_bytes=None if reference.is_tar else len(reference.content),
    )


# Refusals


@dataclass(frozen=True)
class _Help:
    """What can be done when a service gives nothing."""

    token_name: str
    without_token: str
    with_token: str


_HELP: dict[type[LoraReference], _Help] = {
    HuggingFaceReference: _Help(
        "hf_api_token",
        "Check the name. If it is private or gated, set hf_api_token to a token that may read it.",
        "Check the name, or set hf_api_token to a token of an account that may read it.",
    ),
    CivitaiReference: _Help(
        "civitai_api_token",
        "Set civitai_api_token to the API key of a CivitAI account that may download it.",
        "Set civitai_api_token to the API key of another CivitAI account, one that may download it.",
    ),
    ReplicateReference: _Help(
        "REPLICATE_API_TOKEN",
        "Check the name. If the model is private, the operator must set REPLICATE_API_TOKEN to a token of its owner.",
        "Check the name, and that the operator's REPLICATE_API_TOKEN is a token of the model's owner.",
    ),
}
_ADDRESS_HELP = _Help(
    "", *2 * ("Give an address that anyone may read; a signed one expires, so it may have to be signed again.",)
)
_REFUSALS = {401: "asks for a login", 403: "refuses it", 404: "has no such thing", 410: "no longer has it: archived"}
"""What a host does with these statuses."""
_REFUSALS_WITH_TOKEN = {401: "does not accept the token", 403: "refuses it: the token has no access"}


def explain(error: HttpStatusError, reference: LoraReference, tokens: Tokens) -> LoraAccessError | DownloadError:
    """What a status means for the user: an error to raise `from` the first, without a token or an address."""
    with_token = token_for(reference, tokens) is not None
    if isinstance(reference, CivitaiReference) and (deadline := _early_access(error)) is not None:
        advice = f"Wait until then, or set {_help(reference).token_name} to the key of an account that bought access."
        return LoraAccessError(_message(reference, f"it is in early access until {deadline}", advice))
    if error.status in (401, 403) and isinstance(reference, HuggingFaceReference) and _says_gated(error):
        found = "the repository is gated" + (" and the token has no access" if with_token else "")
        return _refusal(reference, found, with_token)
    if error.status in _REFUSALS:
        does = (_REFUSALS_WITH_TOKEN if with_token else {}).get(error.status, _REFUSALS[error.status])
        return _refusal(reference, f"{error.host} {does}{_said(error, tokens)}", with_token)
    found = f"{error.host} limits how often it is asked" if error.status == 429 else f"{error.host} failed"
    return DownloadError(_message(reference, f"{found} (status {error.status})", "Try again in some minutes."))


def _refusal(reference: LoraReference, found: str, with_token: bool) -> LoraAccessError:
    help_ = _help(reference)
    return LoraAccessError(_message(reference, found, help_.with_token if with_token else help_.without_token))


def _message(reference: LoraReference, found: str, advice: str) -> str:
    return f'Cannot read LoRA "{reference.label}": {found}. {advice}'


def _help(reference: LoraReference) -> _Help:
    return _HELP.get(type(reference), _ADDRESS_HELP)


def _body(error: HttpStatusError) -> dict[str, Any]:
    """The JSON object of an answer, empty if it is none."""
    try:
        body = json.loads(error.body)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _early_access(error: HttpStatusError) -> str | None:
    """The end of CivitAI's early access, if that is the reason."""
    body = _body(error)
    if body.get("error") != "Early Access":
        return None
    return _one_line(str(body.get("deadline") or "some later day"))


def _says_gated(error: HttpStatusError) -> bool:
    return re.search(r"gated|is restricted|authorized list", error.body[:4096]) is not None


def _said(error: HttpStatusError, tokens: Tokens) -> str:
    """The server's own words, without addresses and tokens; empty if it said nothing in JSON."""
    body = _body(error)
    words = next((v for v in map(body.get, ("message", "error", "detail")) if isinstance(v, str) and v.strip()), "")
    for token in (tokens.hugging_face, tokens.civitai, tokens.replicate):
        words = words.replace(token.strip(), "...") if token and token.strip() else words
    words = _one_line(re.sub(r"\S*://\S*", "...", words)).rstrip(".")
    return f' ("{words}")' if words else ""


def _one_line(text: str, limit: int = 200) -> str:
    """The text with everything unprintable as blanks, shortened."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
