"""The files below the cache's folder: stored by digest, indexed, held while in use, evicted when the disk is full.

Everything is decided from the files themselves, so a restart changes nothing and several processes can share a folder.
Knows no network. The folder must be private to this user.

    blobs/<sha256>.safetensors   complete and verified
    stamps/<sha256>              size, inode and ctime of the verified blob; modified at each use
    index/<digest>.json          (reference, token) -> content, revision, time of the last revalidation
    locks/<two digits>.lock      one process at a time fetches the file of a reference
    partial/                     being downloaded, locked by its process; whatever is not locked is removed at start

A blob whose size, inode or ctime differs from its stamp is hashed again before it is used: the ctime of a file cannot
be set back, so a modified blob is noticed even when its modification time was restored.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from errors import DiskError
from fetching.deadline import SLICE_SECONDS
from fetching.files import digest_of_file, free_bytes_of, megabytes, private_folder, write_atomically

logger = logging.getLogger(__name__)
MAX_LINES = 20_000
"""Lines of the index. Each address that a caller makes up gets one, if only its query differs."""


@dataclass(frozen=True)
class Entry:
    """A line of the index: what a reference means."""

    sha256: str
    size_bytes: int
    revision: str | None
    etag: str | None
    immutable: bool
    checked: float
    """When the host last confirmed this content, in seconds since 1970."""
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class StoredFile:
    """A stored file, as eviction sees it."""

    path: Path
    size_bytes: int
    used_ns: int


@dataclass(frozen=True)
class DiskQuota:
    """How much of the disk the cache may use."""

    min_free_bytes: int = 10 * 10**9
    max_bytes: int | None = None


def plan_eviction(
    files: Sequence[StoredFile], needed_bytes: int, free_bytes: int, quota: DiskQuota, held: Set[Path] = frozenset()
) -> list[StoredFile]:
    """The files to remove so that `needed_bytes` more fit, least recently used first; all of them if that is too few.

    Files in `held` cannot be removed.
    """
    excess = needed_bytes + quota.min_free_bytes - free_bytes
    if quota.max_bytes is not None:
        excess = max(excess, sum(file.size_bytes for file in files) + needed_bytes - quota.max_bytes)
    plan: list[StoredFile] = []
    for file in sorted((f for f in files if f.path not in held), key=lambda file: file.used_ns):
        if excess <= 0:
            break
        plan.append(file)
        excess -= file.size_bytes
    return plan


class Store:
    """One folder of files. Safe between threads and processes."""

    def __init__(
        self,
        folder: Path,
        quota: DiskQuota,
        now: Callable[[], float] = time.time,
        free_bytes: Callable[[Path], int] = free_bytes_of,
        max_lines: int = MAX_LINES,
    ) -> None:
        """Create the folder if there is none. Of the index, at most about `max_lines` are kept.

        Raises:
            SharedFolderError: other users can write to it.
            OSError: it cannot be created.
        """
        self._quota = quota
        self._now = now
        self._free_bytes = free_bytes
        self._max_lines = max_lines
        self._written = 0
        self._blobs, self._stamps, self._index, self._locks, self._partial = (
            folder / name for name in ("blobs", "stamps", "index", "locks", "partial")
        )
        for part in (folder, self._blobs, self._stamps, self._index, self._locks, self._partial):
            private_folder(part)

    def sweep(self) -> None:
        """Remove what interrupted downloads left, and lines of the index and stamps whose file is gone."""
        for leftover in self._partial.iterdir():
            with suppress(FileNotFoundError, BlockingIOError), leftover.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink(missing_ok=True)
        stored = {blob.stem for blob in self._blobs.iterdir()}
        for stamp in self._stamps.iterdir():
            if stamp.name not in stored and not stamp.name.startswith("."):  # one that is being written
                stamp.unlink(missing_ok=True)
        self._sweep_index(stored)

    def _sweep_index(self, stored: Set[str]) -> None:
        """Remove the lines of files that are gone, and where too many are left the oldest ones."""
        ages: list[tuple[float, Path]] = []
        for line in self._index.iterdir():
            entry = read_entry(line)
            if entry is None or entry.sha256 not in stored:
                line.unlink(missing_ok=True)
            else:
                ages.append((entry.checked, line))
        for _, line in sorted(ages)[: max(0, len(ages) - self._max_lines)]:
            line.unlink(missing_ok=True)

    # The index

    def index_path(self, key: str, access: str) -> Path:
        """The line of the index for `key`, for a caller with the token `access`."""
        token = hashlib.sha256(access.encode()).hexdigest() if access else ""
        digest = hashlib.sha256("\n".join((key, token)).encode()).hexdigest()
        return self._index / f"{digest}.json"

    @contextmanager
    def one_at_a_time(self, line: Path) -> Iterator[None]:
        """Wait until no other thread or process fetches the file of this line of the index."""
        with (self._locks / f"{line.name[:2]}.lock").open("ab") as file:
            while not _locked(file):
                time.sleep(SLICE_SECONDS)  # a blocking flock would delay a cancellation
            yield

    def hold(self, entry: Entry) -> BinaryIO | None:
        """The stored file, open and locked against eviction, its use noted; None if it is missing or was modified."""
        try:
            file = self.blob(entry.sha256).open("rb")
        except FileNotFoundError:
            return None
        with closed_on_error(file):
            fcntl.flock(file, fcntl.LOCK_SH)
            state = os.fstat(file.fileno())
            intact = state.st_size == entry.size_bytes and (
                self._stamp(entry.sha256) == _stamp_of(state) or digest_of_file(file) == entry.sha256
            )
            if state.st_nlink and intact:
                self._note_use(entry.sha256, state)
                return file
            if state.st_nlink:
                logger.warning("a stored file of %d bytes was modified: it is fetched again", state.st_size)
                self._remove(self.blob(entry.sha256))
        file.close()
        return None

    def blob(self, sha256: str) -> Path:
        """Where the content of this digest is."""
        return self._blobs / f"{sha256}.safetensors"

    def _stamp(self, sha256: str) -> bytes | None:
        try:
            return (self._stamps / sha256).read_bytes()
        except FileNotFoundError:
            return None

    def _note_use(self, sha256: str, state: os.stat_result) -> None:
        """Stamp a verified blob; the stamp's modification time is the blob's last use."""
        stamp, content = self._stamps / sha256, _stamp_of(state)
        if self._stamp(sha256) != content:
            write_atomically(stamp, content)
        now = int(self._now() * 1e9)
        with suppress(FileNotFoundError):  # another process evicts the file just now
            os.utime(stamp, ns=(now, now))

    def _remove(self, blob: Path) -> None:
        blob.unlink(missing_ok=True)
        (self._stamps / blob.stem).unlink(missing_ok=True)

    def write_entry(self, line: Path, entry: Entry) -> None:
        """Write a line of the index."""
        with self.new_partial() as (file, path):
            file.write(json.dumps(asdict(entry)).encode())
            file.flush()
            path.replace(line)
        self._written += 1
        seldom = self._written % max(1, self._max_lines // 40) == 0
        if seldom and sum(1 for _ in self._index.iterdir()) > self._max_lines:
            self._sweep_index({blob.stem for blob in self._blobs.iterdir()})

    # New files

    @contextmanager
    def new_partial(self) -> Iterator[tuple[BinaryIO, Path]]:
        """A new file, locked so that another process's sweep keeps it; removed at the end unless it was moved."""
        path = self._partial / f"{os.getpid()}-{secrets.token_hex(8)}"
        with path.open("x+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield file, path
            finally:
                path.unlink(missing_ok=True)

    def publish(self, file: BinaryIO, path: Path, sha256: str) -> BinaryIO:
        """Move a complete, verified partial file to its place and return it open and held, as `hold` does."""
        path.replace(self.blob(sha256))
        _sync_folder(self._blobs)
        self._note_use(sha256, os.fstat(file.fileno()))
        fcntl.flock(file, fcntl.LOCK_SH)  # shared from now on; the duplicate below keeps the lock
        return os.fdopen(os.dup(file.fileno()), "rb")

    # Eviction

    def make_room(self, needed_bytes: int) -> None:
        """Remove least recently used files that nobody holds until `needed_bytes` fit.

        Raises:
            DiskError: they do not fit even then.
        """
        if self._quota.max_bytes is not None and needed_bytes > self._quota.max_bytes:
            raise DiskError(f"The file has {megabytes(needed_bytes)}, more than the whole cache may use.")
        held: set[Path] = set()
        while plan := plan_eviction(self._stored(), needed_bytes, self._free_bytes(self._blobs), self._quota, held):
            held |= {file.path for file in plan if not self._evict(file)}
        free = self._free_bytes(self._blobs)
        if needed_bytes > free:
            raise DiskError(
                f"The file has {megabytes(needed_bytes)}, and the server's disk has {megabytes(free)} left."
            )

    def _stored(self) -> list[StoredFile]:
        found = []
        with os.scandir(self._blobs) as blobs:
            for blob in blobs:
                with suppress(FileNotFoundError):
                    path = Path(blob.path)
                    stamp = self._stamps / path.stem
                    used_ns = stamp.stat().st_mtime_ns if stamp.exists() else blob.stat().st_atime_ns
                    found.append(StoredFile(path, blob.stat().st_size, used_ns))
        return found

    def _evict(self, file: StoredFile) -> bool:
        """Remove a file unless it is held; whether it was removed."""
        with suppress(FileNotFoundError), file.path.open("rb") as blob:
            if not _locked(blob):
                return False
            self._remove(file.path)
            logger.info("removed the least recently used file, %s", megabytes(file.size_bytes))
        return True


# Files


def read_entry(line: Path) -> Entry | None:
    """A line of the index; None if there is none or it is damaged."""
    try:
        values = json.loads(line.read_bytes())
        facts = tuple((str(name), str(value)) for name, value in values.pop("facts"))
        return Entry(**values, facts=facts)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


@contextmanager
def closed_on_error(file: BinaryIO) -> Iterator[None]:
    """Close a file if the body raises."""
    try:
        yield
    except BaseException:
        file.close()
        raise


def _stamp_of(state: os.stat_result) -> bytes:
    """What changes whenever a file is written, replaced or renamed."""
    return b"%d %d %d" % (state.st_size, state.st_ino, state.st_ctime_ns)


def _locked(file: BinaryIO) -> bool:
    """Lock a file unless another process holds it; whether it is locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
