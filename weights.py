"""Files fetched once and kept: what to fetch, and the cache of it. Knows nothing about LoRAs.

A file is stored under the digest of its content. An index beside it says, for a reference and the token it was fetched
with, which content that was and when the host last said so: a private file is thus found again by its owner alone, and
two references to one content share it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from errors import DiskError, DownloadError, HttpStatusError
from fetching.containers import check_safetensors, copy_only_safetensors
from fetching.download import Downloaded, Limits, Progress, download
from fetching.files import digest_of_file, free_bytes_of, megabytes
from fetching.network import Client
from fetching.store import DiskQuota, Entry, Store, closed_on_error, read_entry

logger = logging.getLogger(__name__)

FRESH_SECONDS = 600
"""For how long a file whose reference names no revision is used without asking its host again."""
LOG_EVERY_SECONDS = 2


class Container(Enum):
    """What lies at an address."""

    SAFETENSORS = "safetensors"
    TAR = "tar"
    """A tar with exactly one `*.safetensors` among its members."""


@dataclass(frozen=True)
class Source:
    """Where a file lies, and how to know it again. Made from a reference, with whatever its service told about it."""

    name: str
    """What messages and logs call it; holds no secret."""
    address: str = field(repr=False)
    """`https://...` or `data:...`; may be signed, so it is never logged."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Secret headers, sent to the address's own host alone."""
    container: Container = Container.SAFETENSORS
    revision: str | None = None
    """A name of exactly this content that the service gave: a commit and path, a version's id, a digest."""
    immutable: bool = False
    """Whether the reference itself names the revision, so that the service need not be asked again."""
    sha256: str | None = None
    size_bytes: int | None = None
    facts: tuple[tuple[str, str], ...] = ()
    """What the service tells about the file, such as ("trigger words", "TOK")."""


@dataclass(frozen=True)
class CachedFile:
    """A whole, checked safetensors file that stays in place as long as the `with` that gave it."""

    path: Path
    sha256: str
    size_bytes: int
    facts: tuple[tuple[str, str], ...]
    outcome: str
    """`hit`; `checked`, a hit that the host was asked about, `unchecked` in vain; `miss`, fetched now."""
    seconds: float


class WeightsCache:
    """The files under one folder. Safe between threads and processes."""

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
        """Open the cache, making the folder where there is none, and sweep what was left behind.

        Raises:
            OSError: the folder cannot be made or written.
        """
        self._client = client
        self._limits = limits or Limits()
        self._now = now
        self._store = Store(folder, quota or DiskQuota(), now, free_bytes)
        self._store.sweep()

    @contextmanager
    def open(self, key: str, access: str, locate: Callable[[], Source]) -> Iterator[CachedFile]:
        """Hold the file that a reference stands for, fetching it first where it is not here or may have changed.

        Args:
            key: the canonical reference.
            access: the token that it is asked for with, or "": what one caller may have, another may not.
            locate: asks the service where the file lies; called when there is no telling without.

        Raises:
            DownloadError: it cannot be fetched.
            LoraFormatError: what came is no safetensors file.
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
            if (found := self._find(line)) is not None:  # another has brought it meanwhile
                return found
            entry = read_entry(line)
            hold = None if entry is None else self._store.hold(entry)
            if entry is None or hold is None:
                found = *self._fetch(locate()), "miss"
            else:
                with closed_on_error(hold):
                    found = self._check(hold, entry, locate)
            self._store.write_entry(line, found[1])
            return found

    def _check(self, hold: BinaryIO, entry: Entry, locate: Callable[[], Source]) -> Found:
        """Ask the host whether a stored file is still the one; bring the new one if not."""
        try:
            source = locate()
            same = _names_content_of(source, entry) or self._is_unmodified(source, entry)
        except HttpStatusError:
            raise
        except DownloadError as error:
            logger.warning("the stored file is used, as its host does not answer: %s", error)
            return hold, entry, "unchecked"
        if same:
            return hold, replace(entry, checked=self._now(), facts=source.facts or entry.facts), "checked"
        brought = self._fetch(source)
        hold.close()
        return *brought, "miss"

    def _is_unmodified(self, source: Source, entry: Entry) -> bool:
        if entry.etag is None or source.revision is not None or not source.address.startswith("http"):
            return False
        with self._client.get(
            source.address, dict(source.headers), {"If-None-Match": entry.etag}, accept=(200, 304)
        ) as response:
            return response.status == 304

    # Fetching

    def _fetch(self, source: Source) -> tuple[BinaryIO, Entry]:
        """Bring the file in; nothing of it is seen before it is whole and checked."""
        try:
            return self._fetch_once(source)
        except DiskError:
            with suppress(DiskError):
                self._store.make_room(self._limits.max_bytes)  # others may have filled the disk meanwhile
            return self._fetch_once(source)

    def _fetch_once(self, source: Source) -> tuple[BinaryIO, Entry]:
        try:
            return self._fetch_checked(source)
        except OSError as error:
            raise DiskError(
                f"The file cannot be stored: {error.strerror}. The server's disk needs more room."
            ) from error

    def _fetch_checked(self, source: Source) -> tuple[BinaryIO, Entry]:
        with self._store.new_partial() as (file, path):
            came = self._receive(source, file)
            _refuse_other_content(source, came)
            if source.container is Container.TAR:
                with self._store.new_partial() as (member, member_path):
                    self._store.make_room(came.size_bytes)
                    size = copy_only_safetensors(path, member)
                    os.fsync(member.fileno())
                    stored = Downloaded(digest_of_file(member), size, came.etag)
                    return self._publish(source, stored, member, member_path)
            return self._publish(source, came, file, path)

    def _receive(self, source: Source, file: BinaryIO) -> Downloaded:
        if source.address.startswith("data:"):
            content = decoded_data_uri(source.address, self._limits.max_bytes)
            self._store.make_room(len(content))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            return Downloaded(hashlib.sha256(content).hexdigest(), len(content), None)
        with self._client.get(source.address, dict(source.headers)) as response:
            self._store.make_room(response.length or source.size_bytes or 0)
            return download(self._client, response, file, self._limits, _logged_progress(source.name))

    def _publish(self, source: Source, stored: Downloaded, file: BinaryIO, path: Path) -> tuple[BinaryIO, Entry]:
        check_safetensors(path)
        hold = self._store.publish(file, path, stored.sha256)
        entry = Entry(
            stored.sha256, stored.size_bytes, source.revision, stored.etag, source.immutable, self._now(), source.facts
        )
        return hold, entry


Found = tuple[BinaryIO, Entry, str]


def decoded_data_uri(address: str, max_bytes: int) -> bytes:
    """The bytes of a `data:` URI.

    Raises:
        DownloadError: it cannot be decoded, or has more than `max_bytes`.
    """
    head, comma, payload = address.partition(",")
    if len(payload) > 2 * max_bytes:
        raise DownloadError(f"The data URI has more than {megabytes(max_bytes)}. Give an https address instead.")
    try:
        content = unquote_to_bytes(payload)
        if head.endswith(";base64"):
            content = b64decode(content, validate=True)
    except (Base64Error, ValueError) as error:
        raise DownloadError("The data URI cannot be decoded. Give it in base64, or an https address.") from error
    if not comma or len(content) > max_bytes:
        raise DownloadError(f"The data URI has no data, or more than {megabytes(max_bytes)}.")
    return content


def _names_content_of(source: Source, entry: Entry) -> bool:
    if source.revision is not None and source.revision == entry.revision:
        return True
    return source.sha256 is not None and source.sha256 == entry.sha256


def _refuse_other_content(source: Source, came: Downloaded) -> None:
    if source.size_bytes is not None and source.size_bytes != came.size_bytes:
        raise DownloadError(
            f"{source.name} came with {came.size_bytes} bytes, and its service names {source.size_bytes}. Try again."
        )
    if source.sha256 is not None and source.sha256.lower() != came.sha256:
        raise DownloadError(f"{source.name} came with another digest than its service names. Try again later.")


def _logged_progress(name: str) -> Progress:
    started = told = time.monotonic()

    def log(done: int, total: int | None) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < LOG_EVERY_SECONDS:
            return
        told = now
        part = f"{100 * done // total} % of {megabytes(total)}" if total else megabytes(done)
        logger.info("fetching %s: %s, %.1f MB/s", name, part, done / 1e6 / (now - started))

    return log
