"""Fetch what is missing of repositories, several files at once, none of them unverified.

Each file is fetched over plain HTTP into a partial file that stays behind when the fetch is interrupted, and the next
one goes on where it ended: huggingface_hub's own downloads begin anew, and a model's shards are up to 10 GB.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from httpx2 import HTTPError
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get

from engine.hub_access import ELSEWHERE, Hub, explained
from engine.hub_cache import MISSING, HubFile, RepositoryCache, gigabytes
from errors import SettingsError
from fetching.store import free_bytes_of

logger = logging.getLogger(__name__)

WORKERS = 8
"""Files at once: as many as FLUX.1 [dev] and [schnell] have large ones."""
LOG_EVERY_SECONDS = 10
WAIT_SECONDS = 2
"""Before a file is fetched a second time."""


@dataclass(frozen=True)
class Snapshot:
    """The files to be had of one repository, at one commit."""

    repository: str
    commit: str
    files: tuple[HubFile, ...]
    cache: RepositoryCache

    @property
    def folder(self) -> Path:
        """Where they are seen."""
        return self.cache.snapshot(self.commit)


def fetch(hub: Hub, snapshots: Sequence[Snapshot], cache_dir: Path) -> None:
    """Make every file of the snapshots be there and right.

    Raises:
        SettingsError: one cannot be had; the others' partial files stay.
    """
    missing = [sum(s.cache.missing_bytes(s.commit, file) for file in s.files) for s in snapshots]
    for snapshot, size_bytes in zip(snapshots, missing, strict=True):
        what = f"{gigabytes(size_bytes)} of {gigabytes(sum(file.size_bytes for file in snapshot.files))} to fetch"
        logger.info("%s: commit %s, %d files, %s", snapshot.repository, snapshot.commit, len(snapshot.files), what)
    _require_room(cache_dir, sum(missing))
    progress = _Progress(sum(missing))
    jobs = sorted(((s, file) for s in snapshots for file in s.files), key=lambda job: -job[1].size_bytes)
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="hub")
    try:
        for future in as_completed([pool.submit(_bring, hub, s, file, progress) for s, file in jobs]):
            future.result()
        for snapshot in snapshots:
            snapshot.cache.pin(snapshot.commit)
    finally:
        progress.stop()
        pool.shutdown(cancel_futures=True)
        for snapshot in snapshots:
            snapshot.cache.save()
    if sum(missing):
        logger.info("fetched the models: %s", progress.summary)


def _require_room(cache_dir: Path, needed_bytes: int) -> None:
    """Raise where the disk is too small, before the first byte."""
    there = next(folder for folder in (cache_dir, *cache_dir.parents) if folder.exists())
    free_bytes = free_bytes_of(there)
    if needed_bytes > free_bytes:
        raise SettingsError(
            f"The models need {gigabytes(needed_bytes)} more, and the disk of {cache_dir} has {gigabytes(free_bytes)} "
            f"left. Make room, set HF_HUB_CACHE to a folder on a larger disk, or {ELSEWHERE}."
        )


def _bring(hub: Hub, snapshot: Snapshot, file: HubFile, progress: _Progress) -> None:
    """Have one file in its place and right."""
    try:
        if snapshot.cache.flaw(snapshot.commit, file) is not None:
            with snapshot.cache.locked(file):
                _mend(hub, snapshot, file, progress)
        snapshot.cache.link(snapshot.commit, file)
    except (HTTPError, OSError) as error:
        reason = explained(error, hub, snapshot.repository)
        raise SettingsError(f"{file.path} cannot be fetched. {reason}") from None  # it may quote a signed address


def _mend(hub: Hub, snapshot: Snapshot, file: HubFile, progress: _Progress) -> None:
    """Fetch a file whose lock is held, unless another program has done so meanwhile."""
    flaw = snapshot.cache.flaw(snapshot.commit, file)
    if flaw is None:
        return
    if flaw != MISSING:
        _announce_another(snapshot, file, flaw, progress)
        snapshot.cache.remove(snapshot.commit, file)
    if (flaw := _receive(hub, snapshot, file, progress)) is not None:
        _announce_another(snapshot, file, flaw, progress)
        time.sleep(WAIT_SECONDS)
        flaw = _receive(hub, snapshot, file, progress)
    if flaw is not None:
        raise SettingsError(
            f'{file.path} of "{snapshot.repository}" at commit {snapshot.commit} was fetched twice and still {flaw}. '
            f"Try again later, or {ELSEWHERE}."
        )
    snapshot.cache.accept(file)


def _announce_another(snapshot: Snapshot, file: HubFile, flaw: str, progress: _Progress) -> None:
    logger.warning("%s: %s %s. It is fetched again.", snapshot.repository, file.path, flaw)
    progress.expect(file.size_bytes)


def _receive(hub: Hub, snapshot: Snapshot, file: HubFile, progress: _Progress) -> str | None:
    """Complete the partial file; what is wrong with it then, in words. One that came otherwise than listed is removed.

    http_get goes on by itself where a connection breaks, as long as something comes.
    """
    partial = snapshot.cache.partial(file)
    with partial.open("ab") as stream:
        if stream.tell() > file.size_bytes:
            stream.truncate(0)
        if stream.tell() < file.size_bytes:
            try:
                http_get(
                    hub.address(snapshot.repository, snapshot.commit, file),
                    stream,
                    resume_size=stream.tell(),
                    headers=dict(hub.headers),
                    displayed_filename=file.path,
                    tqdm_class=progress.bar,  # type: ignore[arg-type]  # any callable that makes a bar will do
                )
            except HfHubHTTPError as error:
                if error.response.status_code < 500:
                    raise
                return f"is answered with status {error.response.status_code}"
        stream.flush()
        os.fsync(stream.fileno())
    flaw = snapshot.cache.difference(partial, file)
    if flaw is not None:
        partial.unlink()
    return flaw


class _StoppedError(Exception):
    """Nothing more is wanted: another file failed, or the process ends."""


class _Progress:
    """Counts and logs the bytes of all files together, and can stop them. Stands where http_get makes a bar a file."""

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._done = 0
        self._started = self._told = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def bar(self, **described: object) -> Self:
        """What a file's bar is made with."""
        return self

    def update(self, size_bytes: int) -> None:
        """Count what came.

        Raises:
            _StoppedError: nothing more is wanted.
        """
        if self._stop.is_set():
            raise _StoppedError
        with self._lock:
            self._done += size_bytes
            if time.monotonic() - self._told > LOG_EVERY_SECONDS:
                self._told = time.monotonic()
                percent = 100 * self._done // max(self._total, 1)
                logger.info("fetching the models: %d %% of %s", percent, self.summary)

    def expect(self, size_bytes: int) -> None:
        """More is to come than was known."""
        with self._lock:
            self._total += size_bytes

    def stop(self) -> None:
        """Let every fetch end at its next bytes."""
        self._stop.set()

    @property
    def summary(self) -> str:
        """Size, time and speed."""
        seconds = max(time.monotonic() - self._started, 1e-3)
        return f"{gigabytes(self._total)}, {seconds:.1f} s, {self._done / 1e6 / seconds:.0f} MB/s"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing: the other files go on."""
