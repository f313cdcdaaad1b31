"""Download one large file, fast and complete, into an open file. Knows no cache and no references.

If the server announces the length and supports ranges, several connections fetch 16 MiB parts in parallel, since hosts
limit the speed of each; otherwise one connection fetches everything. The digest is computed on the way by a thread that
reads what the others have written. A broken connection is resumed if the server supports ranges, or restarted.
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
from fetching.deadline import SLICE_SECONDS, Deadline
from fetching.network import BrokenConnectionError, Client, Response

PART_BYTES = 16 * 2**20
CONNECTIONS = 16
BUFFER_BYTES = 2**20
TRIES_A_PART = 3
JOIN_SECONDS = 0.5
"""For all threads together to end after a failure or a cancellation; daemons end by themselves soon after."""
SYNC_BYTES = 32 * 2**20

Progress = Callable[[int, int | None], None]
"""Called about once a second with the bytes received and, if known, the total."""


@dataclass(frozen=True)
class Limits:
    """The limits of a download."""

    max_bytes: int = 2 * 2**30
    total_seconds: float = 600
    slowest_bytes_per_second: int = 100 * 1024
    slow_seconds: float = 30
    """How long it may be slower than that."""


@dataclass(frozen=True)
class Downloaded:
    """A finished download: digest, size, and the server's ETag."""

    sha256: str
    size_bytes: int
    etag: str | None


@dataclass
class _Part:
    start: int
    stop: int | None
    """None: up to the end, as the length is unknown."""
    done: int = 0

    @property
    def position(self) -> int:
        return self.start + self.done

    @property
    def complete(self) -> bool:
        return self.stop is not None and self.position >= self.stop


class RestartRequired(Exception):  # noqa: N818 - an event, not a fault
    """The server cannot resume: the whole file has to be fetched again, in one piece."""


@dataclass
class _Transfer:
    """The state that the threads of one download share."""

    parts: list[_Part]
    deadline: Deadline
    claimed: int = 0
    stopped: bool = False
    failure: BaseException | None = None
    open_responses: list[Response] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def claim(self) -> _Part | None:
        """The next part that no thread has taken."""
        with self.lock:
            if self.stopped or self.claimed == len(self.parts):
                return None
            self.claimed += 1
            return self.parts[self.claimed - 1]

    def fail(self, failure: BaseException) -> None:
        """End the download; the first failure is the one that is reported."""
        with self.lock:
            if not self.stopped:
                self.failure = failure
        self.stop()

    def stop(self) -> None:
        """Make every thread end soon."""
        self.deadline.expire()
        with self.lock:
            self.stopped = True
            responses = list(self.open_responses)
        for response in responses:
            response.abort()

    @contextmanager
    def reading(self, response: Response) -> Iterator[None]:
        """Let `stop` wake the thread that reads this response."""
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
    deadline: Deadline | None = None,
) -> Downloaded:
    """Write the body of `response` into an empty `file`, flushed to the disk; closes `response`.

    Args:
        client: makes the further connections.
        response: the answer to the first request, status 200; further ones go to its address.
        file: open for writing and reading.
        limits: a download that exceeds them is given up.
        progress: called about once a second.
        deadline: a further one, such as the one that `response` was asked for under.

    Raises:
        DownloadError: too large, too slow, cut off, or the disk is full.
    """
    deadline = Deadline(limits.total_seconds, deadline)
    try:
        with response:
            refuse_oversize(response.length, limits, response.host)
            return _Download(client, response, file, limits, progress, deadline).run(_split(response))
    except RestartRequired:
        pass
    file.truncate(0)
    with client.get(response.address, response.secret_headers, deadline=deadline) as again:
        refuse_oversize(again.length, limits, again.host)
        whole = [_Part(0, again.length)]
        try:
            return _Download(client, again, file, limits, progress, deadline).run(whole)
        except RestartRequired as error:
            raise DownloadError(f"{again.host} cuts the file off every time. Try again later.") from error


def _split(response: Response) -> list[_Part]:
    length = response.length
    if length is None or length <= PART_BYTES or not _gives_parts(response):
        return [_Part(0, length)]
    return [_Part(start, min(start + PART_BYTES, length)) for start in range(0, length, PART_BYTES)]


def _gives_parts(response: Response) -> bool:
    return (response.header("Accept-Ranges") or "").strip().lower() == "bytes" and _validator(response) is not None


def _validator(response: Response) -> str | None:
    """The tag that proves that two parts belong to the same file."""
    etag = response.header("ETag")
    return etag if etag is not None and not etag.startswith("W/") else response.header("Last-Modified")


def refuse_oversize(length: int | None, limits: Limits, host: str) -> None:
    """Refuse a file whose announced length exceeds the limit.

    Raises:
        DownloadError: it does.
    """
    if length is not None and length > limits.max_bytes:
        raise DownloadError(
            f"The file at {host} has {length / 1e6:.1f} MB, and at most {limits.max_bytes / 1e6:.1f} MB are fetched. "
            "Give a smaller file."
        )


class _Download:
    """One try at one file: threads fetch parts, one computes the digest, one flushes, and the caller's watches."""

    def __init__(
        self,
        client: Client,
        response: Response,
        file: BinaryIO,
        limits: Limits,
        progress: Progress,
        deadline: Deadline,
    ) -> None:
        self._client = client
        self._first = response
        self._file = file
        self._limits = limits
        self._progress = progress
        self._deadline = deadline

    def run(self, parts: list[_Part]) -> Downloaded:
        """Fetch every part."""
        self._transfer = transfer = _Transfer(parts, Deadline(self._limits.total_seconds, self._deadline))
        digest = hashlib.sha256()
        _reserve(self._file, self._first.length)
        # each thread has its own file descriptor, so that one that outlives this call cannot write into another file
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
            ending = Deadline(JOIN_SECONDS)
            for thread in threads:
                thread.join(timeout=ending.left())
        if transfer.failure is not None:
            raise transfer.failure
        return Downloaded(digest.hexdigest(), transfer.bytes_done(), self._first.header("ETag"))

    def _watch(self, last: threading.Thread, total: int | None) -> None:
        limits, transfer = self._limits, self._transfer
        window_began, window_bytes, last_logged = time.monotonic(), 0, time.monotonic()
        while last.is_alive():
            last.join(timeout=SLICE_SECONDS)
            now, done = time.monotonic(), transfer.bytes_done()
            if now - last_logged >= 1:
                last_logged = now
                self._progress(done, total)
            if transfer.stopped or transfer.complete():
                continue
            if not self._deadline.left():
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
                    raise RestartRequired from None
                if attempt == TRIES_A_PART - 1:
                    raise
                response = None

    def _ask(self, part: _Part) -> Response:
        last = "" if part.stop is None else part.stop - 1
        headers = {"Range": f"bytes={part.position}-{last}", "If-Range": _validator(self._first) or ""}
        answer = self._client.get(
            self._first.address, self._first.secret_headers, headers, (200, 206), self._transfer.deadline
        )
        began = (answer.header("Content-Range") or "").startswith(f"bytes {part.position}-")
        if answer.status != 206 or not began:
            answer.close()
            raise RestartRequired
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
    """Hash what the other threads have written, in order, so that the digest is ready with the last byte."""
    try:
        for part in transfer.parts:
            _follow(file, part, transfer, digest)
    except BaseException as failure:
        transfer.fail(failure)
    finally:
        os.close(file)


def _flush(file: int, transfer: _Transfer) -> None:
    """Flush to the disk as the data arrives: flushing everything at the end takes as long as the download did."""
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
