"""The files under the cache's folder: stored under their digest, indexed, held while in use, evicted when it is full.

Everything is decided from the files themselves, so that a restart changes nothing and several processes may share one
folder. Knows no network.

    blobs/<sha256>.safetensors   whole and checked; its access time is the last use, its modification time a sentinel
    index/<digest>.json          reference and token -> content, revision, time of the last check
    locks/<two digits>.lock      one process at a time fetches for a reference
    partial/                     what is being fetched, locked by its process; the rest is swept at start
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
from fetching.files import VERIFIED_MTIME_NS, digest_of_file, free_bytes_of, megabytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A line of the index."""

    sha256: str
    size_bytes: int
    revision: str | None
    etag: str | None
    immutable: bool
    checked: float
    """When the host last said that this is the content, in seconds since 1970."""
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class StoredFile:
    """What an eviction is planned with."""

    path: Path
    size_bytes: int
    used_ns: int


@dataclass(frozen=True)
class DiskQuota:
    """How much of the disk the cache may have."""

    min_free_bytes: int = 10 * 10**9
    max_bytes: int | None = None


def plan_eviction(
    files: Sequence[StoredFile], needed_bytes: int, free_bytes: int, quota: DiskQuota, held: Set[Path] = frozenset()
) -> list[StoredFile]:
    """The least recently used files to remove, in order, so that `needed_bytes` more fit; all, if they do not.

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
    ) -> None:
        """Make the folder where there is none.

        Raises:
            OSError: it cannot be made or written.
        """
        self._quota = quota
        self._now = now
        self._free_bytes = free_bytes
        self._blobs, self._index, self._locks, self._partial = (
            folder / name for name in ("blobs", "index", "locks", "partial")
        )
        for part in (folder, self._blobs, self._index, self._locks, self._partial):
            part.mkdir(parents=True, exist_ok=True, mode=0o700)

    def sweep(self) -> None:
        """Remove what interrupted downloads left behind, and lines of the index whose file is gone."""
        for leftover in self._partial.iterdir():
            with suppress(FileNotFoundError, BlockingIOError), leftover.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink(missing_ok=True)
        stored = {blob.stem for blob in self._blobs.iterdir()}
        for line in self._index.iterdir():
            entry = read_entry(line)
            if entry is None or entry.sha256 not in stored:
                line.unlink(missing_ok=True)

    # The index

    def index_path(self, key: str, access: str) -> Path:
        """Where the index says what `key` is to a caller with the token `access`."""
        token = hashlib.sha256(access.encode()).hexdigest() if access else ""
        digest = hashlib.sha256("\n".join((key, token)).encode()).hexdigest()
        return self._index / f"{digest}.json"

    @contextmanager
    def one_at_a_time(self, line: Path) -> Iterator[None]:
        """Wait until no other thread or process brings what this line of the index is about."""
        with (self._locks / f"{line.name[:2]}.lock").open("ab") as file:
            while not _locked(file):
                time.sleep(SLICE_SECONDS)  # a blocking flock would not let a cancellation through
            yield

    def hold(self, entry: Entry) -> BinaryIO | None:
        """The stored file, open and locked against eviction and its use noted; None where it is gone or was changed."""
        try:
            file = self.blob(entry.sha256).open("rb")
        except FileNotFoundError:
            return None
        with closed_on_error(file):
            fcntl.flock(file, fcntl.LOCK_SH)
            state = os.fstat(file.fileno())
            sealed = state.st_mtime_ns == VERIFIED_MTIME_NS and state.st_size == entry.size_bytes
            if state.st_nlink and (sealed or digest_of_file(file) == entry.sha256):
                self._note_use(file)
                return file
            if state.st_nlink:
                logger.warning("a stored file of %d bytes was changed: it is fetched again", state.st_size)
                self.blob(entry.sha256).unlink(missing_ok=True)
        file.close()
        return None

    def blob(self, sha256: str) -> Path:
        """Where the content of this digest lies."""
        return self._blobs / f"{sha256}.safetensors"

    def _note_use(self, file: BinaryIO) -> None:
        os.utime(file.fileno(), ns=(int(self._now() * 1e9), VERIFIED_MTIME_NS))

    def write_entry(self, line: Path, entry: Entry) -> None:
        """Set a line of the index."""
        with self.new_partial() as (file, path):
            file.write(json.dumps(asdict(entry)).encode())
            file.flush()
            path.replace(line)

    # New files

    @contextmanager
    def new_partial(self) -> Iterator[tuple[BinaryIO, Path]]:
        """A new file that the sweep of another process leaves alone; removed at the end, if it is still there."""
        path = self._partial / f"{os.getpid()}-{secrets.token_hex(8)}"
        with path.open("x+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield file, path
            finally:
                path.unlink(missing_ok=True)

    def publish(self, file: BinaryIO, path: Path, sha256: str) -> BinaryIO:
        """Put a whole, checked partial file in its place and return it open and held, as `hold` does."""
        self._note_use(file)
        path.replace(self.blob(sha256))
        _sync_folder(self._blobs)
        fcntl.flock(file, fcntl.LOCK_SH)  # from being fetched to being in use; the copy below keeps the lock
        return os.fdopen(os.dup(file.fileno()), "rb")

    # Eviction

    def make_room(self, needed_bytes: int) -> None:
        """Remove the least recently used files that nobody holds until `needed_bytes` fit.

        Raises:
            DiskError: they do not fit even so.
        """
        if self._quota.max_bytes is not None and needed_bytes > self._quota.max_bytes:
            raise DiskError(f"The file has {megabytes(needed_bytes)}, more than the whole cache may have.")
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
                    state = blob.stat()
                    found.append(StoredFile(Path(blob.path), state.st_size, state.st_atime_ns))
        return found

    def _evict(self, file: StoredFile) -> bool:
        """Remove a file unless somebody holds it; whether it is gone."""
        with suppress(FileNotFoundError), file.path.open("rb") as blob:
            if not _locked(blob):
                return False
            file.path.unlink(missing_ok=True)
            logger.info("removed the least recently used file, %s", megabytes(file.size_bytes))
        return True


# Files


def read_entry(line: Path) -> Entry | None:
    """A line of the index; None where there is none or it is damaged."""
    try:
        values = json.loads(line.read_bytes())
        facts = tuple((str(name), str(value)) for name, value in values.pop("facts"))
        return Entry(**values, facts=facts)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


@contextmanager
def closed_on_error(file: BinaryIO) -> Iterator[None]:
    """Close a file where what is done with it fails."""
    try:
        yield
    except BaseException:
        file.close()
        raise


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
