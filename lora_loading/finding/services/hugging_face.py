"""A file, a folder or a whole repository on the Hugging Face Hub, at the commit that its revision is now.

huggingface.co/owner/name
huggingface.co/owner/name/tree/revision/folder
huggingface.co/owner/name/blob/revision/file.safetensors
huggingface.co/owner/name/file.safetensors

PEFT keeps alpha in `adapter_config.json` beside `adapter_model.safetensors`: both are found.

The Hub is asked through its own library (`fetching/hub.py`); the file goes through the weights cache, which keeps
private files of different callers apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from urllib.parse import SplitResult, quote

from errors import DownloadError, HttpStatusError, LoraAccessError, LoraError, LoraReferenceError
from fetching.hub import MAIN, Hub, HubError, Refusal
from lora_loading.finding.services.api import bearer, sha256_digest, translating_bad_json
from lora_loading.finding.services.paths import is_safetensors, segments_of
from lora_loading.finding.services.service import (
    Access,
    LoraReference,
    Network,
    Service,
    message,
    refusal,
    refuse,
)
from weights import Source

ACCESS = Access(
    token_of=lambda tokens: tokens.hugging_face,
    given_as="hf_api_token",
    advice="Check the name. If it is private or gated, set hf_api_token to a token that may read it.",
    advice_to_holder="Check the name, or set hf_api_token to a token of an account that may read it.",
)
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFERRED_FILES = ("pytorch_lora_weights.safetensors", "lora.safetensors", PEFT_FILE)
"""What a folder is read from where no file is named: the names of diffusers, Replicate's trainer and PEFT."""
CONFIG_KEYS = (
    *("alpha", "alpha_pattern", "init_lora_weights", "lora_alpha", "num_cayley_neumann_terms", "peft_type"),
    *("r", "rank_pattern", "use_cayley_neumann", "use_rslora"),
)
"""What decides how PEFT's file acts; the rest of its configuration is left out."""
MAX_CONFIG = 2**18

_GATED = re.compile(r"gated|is restricted|authorized list")

_NAME = re.compile(r"\w(?:[\w.-]{0,94}\w)?", re.ASCII)
_NOT_OWNERS = {"api", "blog", "collections", "datasets", "docs", "models", "papers", "settings", "spaces"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HuggingFaceReference(LoraReference):
    """A file, a folder or a whole repository on the Hugging Face Hub, at a revision."""

    repo: str
    """owner/name"""
    revision: str = MAIN
    """A branch, a tag, a commit, or `refs/...`."""
    path: str | None = None
    """A folder, or a file when it ends in .safetensors."""

    @property
    def file(self) -> str | None:
        """The path when it names a file."""
        return self.path if self.path is not None and is_safetensors(self.path) else None

    @property
    def immutable(self) -> bool:
        """A file at a commit is fixed."""
        return self.file is not None and _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        if self.path is None and self.revision == MAIN:
            return f"huggingface.co/{self.repo}"
        kind = "tree" if self.file is None else "blob"
        path = "" if self.path is None else f"/{quote(self.path)}"
        return f"huggingface.co/{self.repo}/{kind}/{quote(self.revision, safe='')}{path}"


def parse(parts: SplitResult) -> HuggingFaceReference:
    """Read the address of a repository, or of a folder or file in one."""
    segments = segments_of(parts.path)
    if len(segments) < 2:
        refuse("there is no owner/name behind the host")
    if segments[0] in _NOT_OWNERS:
        refuse(f"{segments[0]} on Hugging Face hold no LoRA; a LoRA lies in a model's repository")
    if not all(map(_is_name, segments[:2])):
        refuse("what follows the host is no owner/name")
    repo, rest = "/".join(segments[:2]), segments[2:]
    if rest and rest[0] in ("tree", "blob", "resolve"):
        revision, path = _revision_and_path(rest[1:])
        if rest[0] != "tree" and path is None:
            refuse(f"the address names no file behind /{rest[0]}/")
    else:
        revision, path = MAIN, "/".join(rest) or None
    if path is not None and rest[0] != "tree" and not is_safetensors(path):
        refuse("the file that it names does not end in .safetensors")
    return HuggingFaceReference(repo, revision, path)


def _is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and not ("--" in name or ".." in name or name.endswith(".git"))


def _revision_and_path(segments: list[str]) -> tuple[str, str | None]:
    """Split what follows /tree/, /blob/ or /resolve/. `refs/pr/1` is one revision, escaped or not."""
    if not segments:
        return MAIN, None
    taken = 3 if segments[0] == "refs" and len(segments) >= 3 else 1
    return "/".join(segments[:taken]), "/".join(segments[taken:]) or None


def resolve(network: Network, reference: HuggingFaceReference, token: str | None) -> Source:
    """Where the named file lies, or the one LoRA of a folder.

    Raises:
        LoraAccessError: the Hub refuses it, or has no such thing.
        LoraReferenceError: the folder holds several files.
        HttpStatusError: the Hub answered with a status that says nothing more.
        DownloadError: the Hub cannot be reached, or answers with something else.
    """
    hub = Hub(network.endpoints.hugging_face, token, timeout_seconds=network.hub_timeout_seconds, sleep=network.sleep)
    try:
        path = reference.file or _choose(hub.paths(reference.repo, reference.revision), reference)
        found = hub.locate(reference.repo, path, reference.revision)
    except HubError as error:
        raise _translated(error, reference, token is not None) from error
    return Source(
        name=reference.label,
        facts=_peft_config(network, found.address, token) if path.endswith(PEFT_FILE) else (),
        address=found.address,
        headers=bearer(token),
        revision=f"{found.commit}/{path}",
        immutable=reference.immutable,
        sha256=sha256_digest(found.etag),  # the ETag of a small file is something else
        size_bytes=found.size_bytes,
    )


def _peft_config(network: Network, address: str, token: str | None) -> tuple[tuple[str, str], ...]:
    """PEFT's configuration in the folder of its file, as a fact of the file; nothing if there is none.

    Raises:
        DownloadError: it cannot be fetched, or is not JSON; without it the LoRA would act at another strength.
    """
    try:
        config = network.client.get_json(f"{address.removesuffix(PEFT_FILE)}{PEFT_CONFIG}", dict(bearer(token)))
    except HttpStatusError as error:
        if error.status == 404:
            return ()
        raise
    with translating_bad_json("Hugging Face"):
        kept = json.dumps({key: value for key, value in config.items() if key in CONFIG_KEYS}, sort_keys=True)
    return ((PEFT_CONFIG, kept),) if len(kept) <= MAX_CONFIG else ()


def explain(error: HttpStatusError, reference: HuggingFaceReference, with_token: bool) -> LoraAccessError | None:
    """What only the Hub refuses for: a gated repository. None for any other reason."""
    says_gated = error.status in (401, 403) and _GATED.search(error.body[:4096])
    return _gated(reference, with_token) if says_gated else None


def _choose(paths: Sequence[str], reference: HuggingFaceReference) -> str:
    """The file of a folder that no file is named of: one of the preferred names, or the only one.

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


def _translated(error: HubError, reference: HuggingFaceReference, with_token: bool) -> LoraError | DownloadError:
    """What the Hub's refusal means for whoever named a LoRA there."""
    match error.refusal:
        case Refusal.GATED:
            return _gated(reference, with_token)
        case Refusal.NO_REPOSITORY:
            hidden = "it is private, and the token may not read it" if with_token else "it is private"
            return refusal(reference, ACCESS, f"there is no such repository, or {hidden}", with_token)
        case Refusal.NO_REVISION:
            found, advice = f'the repository has no revision "{reference.revision}"', "Check the branch, tag or commit."
            return LoraAccessError(message(reference, found, advice))
        case Refusal.NO_FILE:
            found = f'there is no "{reference.path}" at revision "{reference.revision}"'
            return LoraAccessError(message(reference, found, "Check the file's name."))
        case Refusal.DISABLED:
            return LoraAccessError(message(reference, "the repository is disabled", "Choose another."))
        case Refusal.BAD_NAME:
            return LoraAccessError(message(reference, "it is no name of a repository", "Check the name."))
        case Refusal.OFFLINE:
            return DownloadError("the operator set HF_HUB_OFFLINE. Use a LoRA from elsewhere.")
        case Refusal.UNREACHABLE:
            return DownloadError("Hugging Face cannot be reached. Try again later.")
    if error.status:
        return HttpStatusError(f"{error.host} answered {error.status}.", status=error.status, host=error.host)
    return DownloadError("Hugging Face answered in an unknown way. Try again later.")


SERVICE = Service(
    reference=HuggingFaceReference,
    forms=(
        "huggingface.co/owner/name, with /tree/revision/folder, /blob/revision/file.safetensors or /file.safetensors",
    ),
    resolve=resolve,
    access=ACCESS,
    hosts=("huggingface.co", "hf.co"),
    parse_address=parse,
    explain=explain,
)
