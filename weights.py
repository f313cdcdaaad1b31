"""Safetensors files fetched once and kept: where a file comes from, and the cache of files. Knows nothing about LoRAs.

A file is stored under the digest of its content. The index maps (reference, token digest) to a content digest and the
time of the last revalidation, so a private file is a hit only for the token that fetched it, and two references to one
content share one file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from errors import DiskError, DownloadError, HttpStatusError
from fetching.containers import check_safetensors, copy_only_safetensors
from fetching.deadline import Deadline
from fetching.download import Downloaded, Limits, Progress, download, refuse_oversize
from fetching.files import digest_of_file, free_bytes_of, megabytes
from fetching.network import Client
from fetching.store import DiskQuota, Entry, Store, closed_on_error, read_entry

logger = logging.getLogger(__name__)

FRESH_SECONDS = 600
"""How long a file whose reference names no revision is used before its host is asked again."""
RETRY_SECONDS = 60
"""How long a file is used before a host that could not be asked is asked again: each time may take a minute."""
LOG_EVERY_SECONDS = 2


class Container(Enum):
    """What is found at an address."""

    SAFETENSORS = "safetensors"
    TAR = "tar"
    """A tar with exactly one `*.safetensors` member."""


@dataclass(frozen=True)
class Source:
    """Where to get a file, and what its service says about it; made from a reference."""

    name: str
    """For messages and logs; holds no secret."""
    address: str = field(default="", repr=False)
    """`https://...`; may be signed, so it is never logged. Empty where the content is here already."""
    content: bytes | None = field(default=None, repr=False)
    """The file itself, where it came inside the request."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Secret headers, sent to the host of the address only."""
    container: Container = Container.SAFETENSORS
    revision: str | None = None
    """The service's name for exactly this content: a commit and path, a version's id, a digest."""
    immutable: bool = False
    """Whether the reference itself names the revision, so that it never has to be revalidated."""
    sha256: str | None = None
    size_bytes: int | None = None
    facts: tuple[tuple[str, str], ...] = ()
    """What the service says about the file, such as ("trigger words", "TOK")."""


@dataclass(frozen=True)
class CachedFile:
    """A complete, verified safetensors file, protected from eviction inside the `with` that gave it."""

    path: Path
    sha256: str
    size_bytes: int
    facts: tuple[tuple[str, str], ...]
    outcome: str
    """`hit`, `miss` (fetched now), `revalidated` (the host confirmed the cached file) or `stale` (the host could not be
    reached)."""
    seconds: float

    def fact(self, name: str) -> str:
        """What the service says about the file under a name; empty if it says nothing."""
        return dict(self.facts).get(name, "")


class WeightsCache:
    """The files below one folder. Safe to use from several threads and processes."""

    def __init__(
        self,
        folder: Path,
        client: Client,
        *,
        limits: Limits | None = None,
        quota: DiskQuota | None = None,
        now: Callable[[], float] = time.time,
        free_bytes: Callable[[Path], int] = free_bytes_of,
    ) -> None:
        """Open the cache, create its folder if needed, and delete what interrupted downloads left.

        Raises:
            OSError: the folder cannot be created or written.
        """
        self._client = client
        self._limits = limits or Limits()
        self._now = now
        self._store = Store(folder, quota or DiskQuota(), now, free_bytes)
        self._store.sweep()

    @contextmanager
    def open(self, key: str, access: str, locate: Callable[[], Source]) -> Iterator[CachedFile]:
        """Give the file of a reference, after fetching it if it is not cached or has changed.

        Args:
            key: the canonical reference.
            access: the caller's token for this host, or ""; a file fetched with one token is no hit for another.
            locate: asks the service where the file is; called only when the cache cannot answer by itself.

        Raises:
            DownloadError: it cannot be fetched.
            LoraFormatError: the downloaded file is not a safetensors file.
        """
        started = time.monotonic()
        line = self._store.index_path(key, access)
        hold, entry, outcome = self._find(line) or self._find_or_fetch(line, locate)
        with hold:
            seconds = time.monotonic() - started
            yield CachedFile(
                self._store.blob(entry.sha256), entry.sha256, entry.size_bytes, entry.facts, outcome, seconds
            )

    def _find(self, line: Path) -> Found | None:
        entry = read_entry(line)
        if entry is None or not (entry.immutable or 0 <= self._now() - entry.checked < FRESH_SECONDS):
            return None
        hold = self._store.hold(entry)
        return None if hold is None else (hold, entry, "hit")

    def _find_or_fetch(self, line: Path, locate: Callable[[], Source]) -> Found:
        with self._store.one_at_a_time(line):
            if (found := self._find(line)) is not None:  # fetched by another process meanwhile
                return found
            entry = read_entry(line)
            hold = None if entry is None else self._store.hold(entry)
            if entry is None or hold is None:
                found = *self._fetch(locate()), "miss"
            else:
                with closed_on_error(hold):
                    found = self._revalidated(hold, entry, locate)
            self._store.write_entry(line, found[1])
            return found

    def _revalidated(self, hold: BinaryIO, entry: Entry, locate: Callable[[], Source]) -> Found:
        """Ask the host whether the cached file is still the current one; fetch the new one if not."""
        try:
            source = locate()
            same = _names_content_of(source, entry) or self._is_unmodified(source, entry)
        except DownloadError as error:
            if isinstance(error, HttpStatusError) and error.status != 429 and error.status < 500:
                raise  # the host refuses the file
            logger.warning("the cached file is used, as its host cannot be asked: %s", error)
            return hold, replace(entry, checked=self._now() - FRESH_SECONDS + RETRY_SECONDS), "stale"
        if same:
            return hold, replace(entry, checked=self._now(), facts=source.facts or entry.facts), "revalidated"
        fetched = self._fetch(source)
        hold.close()
        return *fetched, "miss"

    def _is_unmodified(self, source: Source, entry: Entry) -> bool:
        if entry.etag is None or source.revision is not None or source.content is not None:
            return False
        with self._client.get(
            source.address, dict(source.headers), {"If-None-Match": entry.etag}, accept=(200, 304)
        ) as response:
            return response.status == 304

    # Fetching

    def _fetch(self, source: Source) -> tuple[BinaryIO, Entry]:
        """Fetch and store the file; other processes see it only once it is complete and verified."""
        try:
            return self._fetch_once(source)
        except DiskError:
            with suppress(DiskError):
                self._store.make_room(self._limits.max_bytes)  # other programs may have filled the disk meanwhile
            return self._fetch_once(source)

    def _fetch_once(self, source: Source) -> tuple[BinaryIO, Entry]:
        try:
            return self._fetch_verified(source)
        except OSError as error:
            found = error.strerror or type(error).__name__
            raise DiskError(f"The file cannot be stored: {found}. The server's disk needs more room.") from error

    def _fetch_verified(self, source: Source) -> tuple[BinaryIO, Entry]:
        with self._store.new_partial() as (file, path):
            downloaded = self._receive(source, file)
            _require_same_content(source, downloaded)
            if source.container is Container.TAR:
                with self._store.new_partial() as (member, member_path):
                    self._store.make_room(downloaded.size_bytes)
                    size = copy_only_safetensors(path, member)
                    os.fsync(member.fileno())
                    stored = Downloaded(digest_of_file(member), size, downloaded.etag)
                    return self._publish(source, stored, member, member_path)
            return self._publish(source, downloaded, file, path)

    def _receive(self, source: Source, file: BinaryIO) -> Downloaded:
        if source.content is not None:
            return self._store_content(source.content, file)
        deadline = Deadline(self._limits.total_seconds)
        with self._client.get(source.address, dict(source.headers), deadline=deadline) as response:
            announced = response.length or source.size_bytes or 0
            refuse_oversize(announced, self._limits, response.host)  # before anything is evicted for it
            self._store.make_room(announced)
            progress = _logged_progress(source.name)
            return download(self._client, response, file, self._limits, progress, deadline)

    def _store_content(self, content: bytes, file: BinaryIO) -> Downloaded:
        self._store.make_room(len(content))
        if len(content) > self._limits.max_bytes:
            raise DownloadError(f"The data URI has more than {megabytes(self._limits.max_bytes)}. Give a smaller file.")
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return Downloaded(hashlib.sha256(content).hexdigest(), len(content), None)

    def _publish(self, source: Source, stored: Downloaded, file: BinaryIO, path: Path) -> tuple[BinaryIO, Entry]:
        check_safetensors(path)
        hold = self._store.publish(file, path, stored.sha256)
        entry = Entry(
            stored.sha256, stored.size_bytes, source.revision, stored.etag, source.immutable, self._now(), source.facts
        )
        return hold, entry


Found = tuple[BinaryIO, Entry, str]


def _names_content_of(source: Source, entry: Entry) -> bool:
    if source.revision is not None and source.revision == entry.revision:
        return True
    return source.sha256 is not None and source.sha256 == entry.sha256


def _require_same_content(source: Source, downloaded: Downloaded) -> None:
    if source.size_bytes is not None and source.size_bytes != downloaded.size_bytes:
        raise DownloadError(
            f"{source.name} has {downloaded.size_bytes} bytes, its service lists {source.size_bytes}. Try again later."
        )
    if source.sha256 is not None and source.sha256.lower() != downloaded.sha256:
        raise DownloadError(
            f"The digest of {source.name} differs from the one that its service lists. Try again later."
        )


def _logged_progress(name: str) -> Progress:
    started = last_logged = time.monotonic()

    def log(done: int, total: int | None) -> None:
        nonlocal last_logged
        now = time.monotonic()
        if now - last_logged < LOG_EVERY_SECONDS:
            return
        last_logged = now
        part = f"{100 * done // total} % of {megabytes(total)}" if total else megabytes(done)
        logger.info("fetching %s: %s, %.1f MB/s", name, part, done / 1e6 / (now - started))

    return log
