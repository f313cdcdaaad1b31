"""A file, a folder or a whole repository on the Hugging Face Hub.

huggingface.co/owner/name
huggingface.co/owner/name/tree/revision/folder
huggingface.co/owner/name/blob/revision/file.safetensors
huggingface.co/owner/name/file.safetensors
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, quote

from lora_loading.finding.references.named import Named, refuse
from lora_loading.finding.references.path import is_safetensors, segments_of

FORMS = ("huggingface.co/owner/name, with /tree/revision/folder, /blob/revision/file.safetensors or /file.safetensors",)
HOSTS = ("huggingface.co", "hf.co")
DEFAULT_REVISION = "main"

_NAME = re.compile(r"\w(?:[\w.-]{0,94}\w)?", re.ASCII)
_NOT_OWNERS = {"api", "blog", "collections", "datasets", "docs", "models", "papers", "settings", "spaces"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HuggingFaceReference(Named):
    """A file, a folder or a whole repository on the Hugging Face Hub, at a revision."""

    repo: str
    """owner/name"""
    revision: str = DEFAULT_REVISION
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
        if self.path is None and self.revision == DEFAULT_REVISION:
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
        revision, path = DEFAULT_REVISION, "/".join(rest) or None
    if path is not None and rest[0] != "tree" and not is_safetensors(path):
        refuse("the file that it names is no .safetensors")
    return HuggingFaceReference(repo, revision, path)


def _is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and not ("--" in name or ".." in name or name.endswith(".git"))


def _revision_and_path(segments: list[str]) -> tuple[str, str | None]:
    """Split what follows /tree/, /blob/ or /resolve/. `refs/pr/1` is one revision, escaped or not."""
    if not segments:
        return DEFAULT_REVISION, None
    taken = 3 if segments[0] == "refs" and len(segments) >= 3 else 1
    return "/".join(segments[:taken]), "/".join(segments[taken:]) or None
