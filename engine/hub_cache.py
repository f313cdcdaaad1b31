"""A repository's corner of the Hub's cache on this machine, in huggingface_hub's layout. Knows no network.

    models--<owner>--<name>/
        blobs/<digest>               content: named by its sha256, or by git's sha1 where the Hub keeps it in git
        blobs/<digest>.incomplete    what has come of it so far
        snapshots/<commit>/<path>    links to the blobs
        refs/main                    the commit that was last fetched whole
        verified.json                digest -> size and modification time of what had that digest; the one file of ours

Files that other programs fetched are found, and they find ours. A file is hashed once: afterwards its size and time
tell whether it is still the one, since hashing 57 GB at every start would take longer than loading them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # re-exported without saying so
from huggingface_hub.utils.sha import git_hash

from engine.model_folders import Part, is_read

logger = logging.getLogger(__name__)

SHA256_LENGTH = 64
MISSING = "is missing"


@dataclass(frozen=True)
class HubFile:
    """One file of a repository, as the Hub lists it."""

    path: str
    """In the repository."""
    size_bytes: int
    digest: str
    """In hexadecimal digits: sha256, or the shorter one of git."""


class RepositoryCache:
    """The stored files of one repository, and which of them were verified. One thread a file."""

    def __init__(self, cache_dir: Path, repository: str) -> None:
        name = f"models--{repository.replace('/', '--')}"
        self.folder = cache_dir / name
        self._locks = cache_dir / ".locks" / name
        self._verified = _read_record(self.folder / "verified.json")
        self._known = dict(self._verified)

    def snapshot(self, commit: str) -> Path:
        """The folder of a commit."""
        return self.folder / "snapshots" / commit

    def blob(self, file: HubFile) -> Path:
        """Where the content of a file lies, or would."""
        return self.folder / "blobs" / file.digest

    def partial(self, file: HubFile) -> Path:
        """Where the content comes to lie until it is whole."""
        return self.folder / "blobs" / f"{file.digest}.incomplete"

    @contextmanager
    def locked(self, file: HubFile) -> Iterator[None]:
        """Hold the file's blob against other threads and programs that fetch it."""
        self._locks.mkdir(parents=True, exist_ok=True)
        self.partial(file).parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(self._locks / f"{file.digest}.lock"):
            yield

    def missing_bytes(self, commit: str, file: HubFile) -> int:
        """How many bytes are still to come, by sizes alone."""
        if _size(self._stored(commit, file)) == file.size_bytes:
            return 0
        so_far = _size(self.partial(file))
        return file.size_bytes - so_far if so_far <= file.size_bytes else file.size_bytes

    def flaw(self, commit: str, file: HubFile) -> str | None:
        """What is wrong with the stored file, in words; None if it is the listed one."""
        path = self._stored(commit, file)
        return self.difference(path, file) if path.exists() else MISSING

    def difference(self, path: Path, file: HubFile) -> str | None:
        """How a file on the disk differs from the listed one, in words; None if it does not."""
        found = path.stat()
        if found.st_size != file.size_bytes:
            return f"has {found.st_size} bytes instead of {file.size_bytes}"
        if self._verified.get(file.digest) == (found.st_size, found.st_mtime_ns):
            return None
        digest = _digest(path, file)
        if digest != file.digest:
            return f"has the digest {digest} instead of {file.digest}"
        self._verified[file.digest] = (found.st_size, found.st_mtime_ns)
        return None

    def accept(self, file: HubFile) -> None:
        """Make the partial file the blob."""
        self.partial(file).replace(self.blob(file))

    def link(self, commit: str, file: HubFile) -> None:
        """Let the commit's folder show the file."""
        path = self.snapshot(commit) / file.path
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_name(f".{secrets.token_hex(4)}")
        made.symlink_to(os.path.relpath(self.blob(file), path.parent))
        made.replace(path)

    def remove(self, commit: str, file: HubFile) -> None:
        """Forget a damaged file."""
        (self.snapshot(commit) / file.path).unlink(missing_ok=True)
        self.blob(file).unlink(missing_ok=True)
        self._verified.pop(file.digest, None)

    def pin(self, commit: str) -> None:
        """Remember the commit as the one that is here as a whole."""
        if self.pinned() != commit:
            self._note(self.folder / "refs" / "main", commit)

    def pinned(self) -> str | None:
        """The commit that was here as a whole when last seen."""
        try:
            return (self.folder / "refs" / "main").read_text().strip() or None
        except OSError:
            return None

    def listed(self, commit: str, parts: Iterable[Part]) -> tuple[HubFile, ...]:
        """What is here of a commit for these parts, each file under the digest that its link names."""
        folder, parts = self.snapshot(commit), tuple(parts)
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
        return tuple(
            HubFile(name, path.stat().st_size, path.readlink().name)
            for name, path in paths.items()
            if is_read(name, parts) and path.is_symlink() and path.is_file()
        )

    def save(self) -> None:
        """Write down what was verified, if there is anything new."""
        if self._verified != self._known:
            self._note(self.folder / "verified.json", json.dumps(self._verified, indent=1, sort_keys=True))

    def _note(self, path: Path, text: str) -> None:
        """Put a text file in place, whole or not at all; not where the cache may only be read."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            made = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            made.write_text(text)
            made.replace(path)
        except OSError as error:
            logger.warning("%s is not written, so that the next start may take longer: %s", path, error.strerror)

    def _stored(self, commit: str, file: HubFile) -> Path:
        shown = self.snapshot(commit) / file.path
        return shown if shown.exists() else self.blob(file)


def _size(path: Path) -> int:
    """A file's size; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _digest(path: Path, file: HubFile) -> str:
    """The digest of what lies at a path, of the kind that the Hub lists."""
    if len(file.digest) != SHA256_LENGTH:
        return git_hash(path.read_bytes())
    started = time.monotonic()
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    logger.info("hashed %s: %s in %.1f s", file.path, gigabytes(file.size_bytes), time.monotonic() - started)
    return digest


def _read_record(path: Path) -> dict[str, tuple[int, int]]:
    """Digest -> size and modification time; empty where nothing can be read, since all of it can be found out anew."""
    try:
        table = json.loads(path.read_text())
        return {str(digest): (int(size), int(mtime_ns)) for digest, (size, mtime_ns) in table.items()}
    except OSError:
        return {}
    except (AttributeError, TypeError, ValueError):
        logger.warning("%s cannot be read: the files beside it are hashed again", path)
        return {}


def gigabytes(size_bytes: int) -> str:
    """A number of bytes, for people."""
    return f"{size_bytes / 1e9:.2f} GB"
