"""Fetch one large file fast and whole, into an open file. Knows no cache and no names.

Where the server says how long the file is and that it gives parts of it, several connections fetch 16 MiB parts side
by side, since hosts limit each one; else a single connection fetches all. The digest is taken on the way, by a thread
that reads behind the others. A broken connection goes on where it stopped, if the server can, or begins again.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

from errors import DiskError, DownloadError
from fetching.network import BrokenConnectionError, Client, Response

PART_BYTES = 16 * 2**20
CONNECTIONS = 16
BUFFER_BYTES = 2**20
TRIES_A_PART = 3
JOIN_SECONDS = 2
SYNC_BYTES = 32 * 2**20

Progress = Callable[[int, int | None], None]
"""Called about once a second with the bytes that have come and, where it is known, how many there are."""


@dataclass(frozen=True)
class Limits:
    """What a download may take."""

    max_bytes: int = 2 * 2**30
    total_seconds: float = 600
    slowest_bytes_per_second: int = 100 * 1024
    slow_seconds: float = 30
    """For how long it may be slower than that."""


@dataclass(frozen=True)
class Downloaded:
    """What came: its digest and size, and the server's own tag for it."""

    sha256: str
    size_bytes: int
    etag: str | None


@dataclass
class _Part:
    start: int
    stop: int | None
    """None: to the end, wherever that is."""
    done: int = 0

    @property
    def position(self) -> int:
        return self.start + self.done

    @property
    def complete(self) -> bool:
        return self.stop is not None and self.position >= self.stop


class _BegunAgainError(Exception):
    """The server does not go on where it stopped: the whole file must be fetched in one piece."""


@dataclass
class _Transfer:
    """What the threads of one download share."""

    parts: list[_Part]
    claimed: int = 0
    stopped: bool = False
    failure: BaseException | None = None
    open_responses: list[Response] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def claim(self) -> _Part | None:
        """The next part that no one fetches yet."""
        with self.lock:
            if self.stopped or self.claimed == len(self.parts):
                return None
            self.claimed += 1
            return self.parts[self.claimed - 1]

    def fail(self, failure: BaseException) -> None:
        """End the download; the first failure is the one that counts."""
        with self.lock:
            if not self.stopped:
                self.failure = failure
        self.stop()

    def stop(self) -> None:
        """Make every thread end soon."""
        with self.lock:
            self.stopped = True
            responses = list(self.open_responses)
        for response in responses:
            response.abort()

    @contextmanager
    def reading(self, response: Response) -> Iterator[None]:
        """Have `stop` wake the thread that reads this response."""
        with self.lock:
            self.open_responses.append(response)
        try:
            yield
        finally:
            with self.lock:
                self.open_responses.remove(response)

    def bytes_done(self) -> int:
        return sum(part.done for part in self.parts)

    def complete(self) -> bool:
        return all(part.complete for part in self.parts)


def download(
    client: Client,
    response: Response,
    file: BinaryIO,
    limits: Limits,
    progress: Progress = lambda done, total: None,
) -> Downloaded:
    """Write the body of `response` into an empty `file`, flushed to the disk; closes `response`.

    Args:
        client: makes the further connections.
        response: the answer to the first request, status 200; further ones go to its address.
        file: open for writing and reading.
        limits: a download beyond them is given up.
        progress: told about once a second.

    Raises:
        DownloadError: too large, too slow, cut off, or the disk is full.
    """
    started = time.monotonic()
    try:
        with response:
            _refuse_oversize(response.length, limits, response.host)
            return _Download(client, response, file, limits, progress, started).run(_split(response))
    except _BegunAgainError:
        pass
    file.truncate(0)
    with client.get(response.address, response.secret_headers) as again:
        _refuse_oversize(again.length, limits, again.host)
        whole = [_Part(0, again.length)]
        try:
            return _Download(client, again, file, limits, progress, started).run(whole)
        except _BegunAgainError as error:
            raise DownloadError(f"{again.host} cuts the file off again and again. Try again later.") from error


def _split(response: Response) -> list[_Part]:
    length = response.length
    if length is None or length <= PART_BYTES or not _gives_parts(response):
        return [_Part(0, length)]
    return [_Part(start, min(start + PART_BYTES, length)) for start in range(0, length, PART_BYTES)]


def _gives_parts(response: Response) -> bool:
    return (response.header("Accept-Ranges") or "").strip().lower() == "bytes" and _validator(response) is not None


def _validator(response: Response) -> str | None:
    """What makes sure that two parts are of the same file."""
    etag = response.header("ETag")
    return etag if etag is not None and not etag.startswith("W/") else response.header("Last-Modified")


def _refuse_oversize(length: int | None, limits: Limits, host: str) -> None:
    if length is not None and length > limits.max_bytes:
        raise DownloadError(
            f"The file at {host} has {length / 1e6:.1f} MB, and at most {limits.max_bytes / 1e6:.1f} MB are fetched. "
            "Give a smaller file."
        )


class _Download:
    """One try at one file: threads that fetch parts, one that takes the digest, and this one, which watches."""

    def __init__(
        self,
        client: Client,
        response: Response,
        file: BinaryIO,
        limits: Limits,
        progress: Progress,
        started: float,
    ) -> None:
        self._client = client
        self._first = response
        self._file = file
        self._limits = limits
        self._progress = progress
        self._started = started

    def run(self, parts: list[_Part]) -> Downloaded:
        """Fetch every part."""
        self._transfer = transfer = _Transfer(parts)
        digest = hashlib.sha256()
        _reserve(self._file, self._first.length)
        # each thread has a file descriptor of its own: one that outlives this call writes into no other file
        firsts: list[Response | None] = [self._first, *[None] * (min(CONNECTIONS, len(parts)) - 1)]
        threads = [
            threading.Thread(target=self._work, args=(os.dup(self._file.fileno()), response), daemon=True)
            for response in firsts
        ]
        last = [
            threading.Thread(target=_take_digest, args=(os.dup(self._file.fileno()), transfer, digest), daemon=True),
            threading.Thread(target=_flush, args=(os.dup(self._file.fileno()), transfer), daemon=True),
        ]
        threads += last
        for thread in threads:
            thread.start()
        try:
            for thread in last:
                self._watch(thread, self._first.length)
        finally:
            transfer.stop()
            for thread in threads:
                thread.join(timeout=JOIN_SECONDS)
        if transfer.failure is not None:
            raise transfer.failure
        return Downloaded(digest.hexdigest(), transfer.bytes_done(), self._first.header("ETag"))

    def _watch(self, last: threading.Thread, total: int | None) -> None:
        limits, transfer = self._limits, self._transfer
        window_began, window_bytes, told = time.monotonic(), 0, time.monotonic()
        while last.is_alive():
            last.join(timeout=0.2)
            now, done = time.monotonic(), transfer.bytes_done()
            if now - told >= 1:
                told = now
                self._progress(done, total)
            if transfer.stopped or transfer.complete():
                continue
            if now - self._started > limits.total_seconds:
                transfer.fail(self._too_slow(f"not done after {limits.total_seconds:.0f} s"))
            elif now - window_began > limits.slow_seconds:
                rate = (done - window_bytes) / (now - window_began)
                if rate < limits.slowest_bytes_per_second:
                    transfer.fail(self._too_slow(f"{rate / 1024:.0f} KiB/s over {limits.slow_seconds:.0f} s"))
                window_began, window_bytes = now, done

    def _too_slow(self, found: str) -> DownloadError:
        return DownloadError(f"{self._first.host} sends the file too slowly: {found}. Try again later.")

    def _work(self, file: int, response: Response | None) -> None:
        try:
            while (part := self._transfer.claim()) is not None:
                self._fetch(file, part, response)
                response = None
        except BaseException as failure:
            self._transfer.fail(failure)
        finally:
            os.close(file)

    def _fetch(self, file: int, part: _Part, response: Response | None) -> None:
        for attempt in range(TRIES_A_PART):
            try:
                with response or self._ask(part) as answer:
                    self._read(file, part, answer)
                return
            except BrokenConnectionError:
                if self._transfer.stopped:
                    return
                if not _gives_parts(self._first):
                    raise _BegunAgainError from None
                if attempt == TRIES_A_PART - 1:
                    raise
                response = None

    def _ask(self, part: _Part) -> Response:
        last = "" if part.stop is None else part.stop - 1
        headers = {"Range": f"bytes={part.position}-{last}", "If-Range": _validator(self._first) or ""}
        answer = self._client.get(self._first.address, self._first.secret_headers, headers, accept=(200, 206))
        began = (answer.header("Content-Range") or "").startswith(f"bytes {part.position}-")
        if answer.status != 206 or not began:
            answer.close()
            raise _BegunAgainError
        return answer

    def _read(self, file: int, part: _Part, response: Response) -> None:
        transfer = self._transfer
        with transfer.reading(response):
            while not part.complete and not transfer.stopped:
                wanted = BUFFER_BYTES if part.stop is None else min(BUFFER_BYTES, part.stop - part.position)
                data = response.read_some(wanted)
                if not data and part.stop is not None:
                    raise BrokenConnectionError(f"{response.host} cut the file off. Try again later.")
                if not data:
                    part.stop = part.position
                self._refuse_excess(part.position + len(data))
                _write(file, memoryview(data), part.position)
                part.done += len(data)

    def _refuse_excess(self, position: int) -> None:
        if position > self._limits.max_bytes:
            raise DownloadError(
                f"The file at {self._first.host} has more than {self._limits.max_bytes / 1e6:.1f} MB, the most that is "
                "fetched. Give a smaller file."
            )


def _take_digest(file: int, transfer: _Transfer, digest: hashlib._Hash) -> None:
    """Read behind the threads that write, in order, so that the digest is there when the last byte is."""
    try:
        for part in transfer.parts:
            _follow(file, part, transfer, digest)
    except BaseException as failure:
        transfer.fail(failure)
    finally:
        os.close(file)


def _flush(file: int, transfer: _Transfer) -> None:
    """Let the disk have what has come now and then: all at the end would take as long as the download did."""
    flushed = 0
    try:
        while not (transfer.stopped or transfer.complete()):
            done = transfer.bytes_done()
            if done - flushed >= SYNC_BYTES:
                os.fdatasync(file)
                flushed = done
            else:
                time.sleep(0.002)
        if not transfer.stopped:
            os.fsync(file)
    except OSError as failure:
        transfer.fail(_disk_error(failure))
    except BaseException as failure:
        transfer.fail(failure)
    finally:
        os.close(file)


def _follow(file: int, part: _Part, transfer: _Transfer, digest: hashlib._Hash) -> None:
    seen = 0
    while not (part.complete and seen == part.done):
        if transfer.stopped:
            break
        if seen == part.done:
            time.sleep(0.002)
        while seen < part.done:
            chunk = os.pread(file, min(BUFFER_BYTES, part.done - seen), part.start + seen)
            digest.update(chunk)
            seen += len(chunk)


def _reserve(file: BinaryIO, total: int | None) -> None:
    if total:
        try:
            os.posix_fallocate(file.fileno(), 0, total)
        except OSError as error:
            raise _disk_error(error) from error


def _write(file: int, data: memoryview, position: int) -> None:
    try:
        while data:
            written = os.pwrite(file, data, position)
            data, position = data[written:], position + written
    except OSError as error:
        raise _disk_error(error) from error


def _disk_error(error: OSError) -> DiskError:
    return DiskError(f"The file cannot be stored: {error.strerror}. The server's disk needs more room.")
