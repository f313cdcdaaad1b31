"""Repositories' files on this disk, in huggingface_hub's cache: fetched by it, verified here.

One commit of a repository is taken, and only the files that are read. Connections, Xet, locks and resumption are the
library's business: it continues a file whose connection breaks, but the next start begins a file anew that the last
one did not finish (huggingface_hub 2.4 writes to a new temporary name each time); finished files stay.

The library verifies the content of Xet transfers alone, so every file is compared with the size and digest that the
Hub lists: once, then its modification time is set to a sentinel, since hashing 57 GB at every start would take longer
than loading them. Any other time means a new or modified file. A file that differs is fetched again.

    models--<owner>--<name>/
        blobs/<digest>               content: named by its sha256, or by git's sha1 where the Hub keeps it in git
        snapshots/<commit>/<path>    links to the blobs
        refs/main                    the commit that was last fetched whole
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.utils.sha import git_hash

from fetching.files import VERIFIED_MTIME_NS, free_bytes_of, gigabytes, write_atomically
from fetching.hub import MAIN, Hub, HubError, HubFile, Listing, Refusal

logger = logging.getLogger(__name__)

SHA256_LENGTH = 64
HASHING_THREADS = 8
LOG_EVERY_SECONDS = 10


@dataclass(frozen=True)
class HubCache:
    """The cache of huggingface_hub on this machine, filled from the Hub."""

    hub: Hub
    folder: Path = Path(HF_HUB_CACHE)

    def snapshot(self, listing: Listing) -> Path:
        """Where the files of a listing are seen, once fetched."""
        return self._repository(listing.repository) / "snapshots" / listing.commit

    def cached(self, repository: str) -> Listing | None:
        """What is here of the commit that was last fetched whole, each file under the digest that its link names."""
        try:
            commit = (self._repository(repository) / "refs" / MAIN).read_text().strip()
        except OSError:
            return None
        folder = self.snapshot(Listing(repository, commit, ()))
        links = [path for path in sorted(folder.rglob("*")) if path.is_symlink() and path.is_file()]
        files = (HubFile(p.relative_to(folder).as_posix(), p.stat().st_size, p.readlink().name) for p in links)
        return Listing(repository, commit, tuple(files))

    def fetch(self, listings: Sequence[Listing]) -> None:
        """Have every file of the listings here, of the listed size and digest.

        Raises:
            HubError: one cannot be had; files that came whole stay.
        """
        missing = [self.missing(listing) for listing in listings]
        for listing, part in zip(listings, missing, strict=True):
            size = f"{gigabytes(self._bytes_to_come(part))} of {gigabytes(sum(f.size_bytes for f in listing.files))}"
            logger.info("%s: commit %s, %s to fetch", listing.repository, listing.commit, size)
        self._require_room(missing)
        for listing, part in zip(listings, missing, strict=True):
            if part.files:
                self._bring(part)
            self._note_commit(listing)

    def _note_commit(self, listing: Listing) -> None:
        """Let this and other programs find the commit by its branch, now that it is here as a whole."""
        ref = self._repository(listing.repository) / "refs" / listing.revision
        if listing.revision != listing.commit and not (ref.exists() and ref.read_text() == listing.commit):
            try:
                write_atomically(ref, listing.commit.encode())
            except OSError as error:
                logger.warning("%s cannot be written, so it serves no start without the Hub: %s", ref, error.strerror)

    def _bring(self, missing: Listing) -> None:
        """Fetch files that are not here; once more where they come damaged or the Hub fails for a moment."""
        try:
            self._download(missing)
        except HubError as error:
            if error.refusal not in (Refusal.BROKEN_OFF, Refusal.BAD_ANSWER) and error.status < 500:
                raise  # the library itself tries again where no one answers
            logger.warning("%s It is tried once more.", error)
            (self.hub.sleep or time.sleep)(2)
        if (again := self.missing(missing)).files:
            self._download(again)
            if still := self.missing(again).files:
                raise HubError(Refusal.DAMAGED, self.hub, missing.repository, detail=still[0].path)

    def _download(self, missing: Listing) -> None:
        started, size_bytes = time.monotonic(), self._bytes_to_come(missing)
        with _progress_logged(self._repository(missing.repository) / "blobs", size_bytes):
            self.hub.download(missing, self.folder)
        seconds = max(time.monotonic() - started, 1e-3)
        speed = size_bytes / 1e6 / seconds
        logger.info("fetched %s: %s, %.1f s, %.0f MB/s", missing.repository, gigabytes(size_bytes), seconds, speed)

    def _require_room(self, missing: Sequence[Listing]) -> None:
        """Raise where the disk is too small, before the first byte."""
        needed, free = sum(map(self._bytes_to_come, missing)), free_bytes_of(self.folder)
        if needed > free:
            detail = f"{gigabytes(needed)} are to be fetched, and {self.folder} has room for {gigabytes(free)}"
            raise HubError(Refusal.DISK, self.hub, ", ".join(part.repository for part in missing), detail=detail)

    def _bytes_to_come(self, missing: Listing) -> int:
        """How much of the missing files is not here under another commit either."""
        blobs = self._repository(missing.repository) / "blobs"
        return sum(file.size_bytes for file in missing.files if not (blobs / file.digest).exists())

    def _repository(self, name: str) -> Path:
        """The repository's folder in huggingface_hub's layout."""
        return self.folder / f"models--{name.replace('/', '--')}"

    def missing(self, listing: Listing) -> Listing:
        """The files that are not here; damaged ones are named in the log and removed."""
        folder = self.snapshot(listing)
        with self.hub.translated(listing.repository), ThreadPoolExecutor(HASHING_THREADS) as pool:
            flaws = pool.map(lambda file: _flaw(folder / file.path, file), listing.files)
            missing = [(file, flaw) for file, flaw in zip(listing.files, flaws, strict=True) if flaw]
            for file, flaw in missing:
                path = folder / file.path
                if path.exists():
                    logger.warning("%s: %s %s, so it is removed", listing.repository, file.path, flaw)
                    path.resolve().unlink()
                path.unlink(missing_ok=True)
        return replace(listing, files=tuple(file for file, _ in missing))


@contextmanager
def _progress_logged(blobs: Path, total_bytes: int) -> Iterator[None]:
    """Log how much has come into a folder now and then, while the library fetches."""
    stop, started, before = threading.Event(), time.monotonic(), _bytes_in(blobs)

    def watch() -> None:
        while not stop.wait(LOG_EVERY_SECONDS):
            done = _bytes_in(blobs) - before
            speed = done / 1e6 / (time.monotonic() - started)
            logger.info("fetching: %s of %s, %.0f MB/s", gigabytes(done), gigabytes(total_bytes), speed)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.glob("*"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def _flaw(path: Path, file: HubFile) -> str | None:
    """How a stored file differs from the listed one, in words; None, and marked as verified, if it does not."""
    if not path.exists():
        return "is missing"
    found = path.stat()
    if found.st_size != file.size_bytes:
        return f"has {found.st_size} bytes instead of {file.size_bytes}"
    if found.st_mtime_ns == VERIFIED_MTIME_NS:
        return None
    if (digest := _digest(path, file)) != file.digest:
        return f"has the digest {digest} instead of {file.digest}"
    with suppress(OSError):  # a cache that may only be read is hashed at every start
        os.utime(path, ns=(found.st_atime_ns, VERIFIED_MTIME_NS))
    return None


def _digest(path: Path, file: HubFile) -> str:
    """The digest of a file, of the kind that the Hub lists."""
    if len(file.digest) != SHA256_LENGTH:
        return git_hash(path.read_bytes())
    started = time.monotonic()
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    logger.info("hashed %s: %s in %.1f s", file.path, gigabytes(file.size_bytes), time.monotonic() - started)
    return digest
