"""Fetching one file: whole, in parts or in one piece, and what happens when the server fails on the way."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import fetching.download as download_module
from errors import DiskError, DownloadError
from fetching.download import PART_BYTES, Downloaded, Limits, download
from fetching.network import Client
from tests.services import Reply, Storage, StoredFile

LARGE = random.Random(0).randbytes(3 * PART_BYTES + 12345)
SMALL = LARGE[:100_000]


@pytest.fixture
def storage() -> Iterator[Storage]:
    with Storage("127.0.0.1") as server:
        yield server


def fetch(storage: Storage, file: StoredFile, folder: Path, limits: Limits | None = None) -> tuple[Downloaded, bytes]:
    """Fetch a served file; nothing but the file remains open or running."""
    address = storage.put("/x", file)
    client = Client(frozenset({storage.authority}), sleep=lambda seconds: None)
    with (folder / "x").open("w+b") as target:
        came = download(client, client.get(address), target, limits or Limits())
    return came, (folder / "x").read_bytes()


@pytest.mark.parametrize("content", [SMALL, LARGE, b"x"], ids=["small", "large", "one byte"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_comes_whole_with_its_digest(storage: Storage, tmp_path: Path, content: bytes, ranges: bool) -> None:
    came, got = fetch(storage, StoredFile(content, '"tag"', ranges), tmp_path)
    assert got == content
    assert came == Downloaded(hashlib.sha256(content).hexdigest(), len(content), '"tag"')


def test_a_large_file_comes_in_parts_side_by_side(storage: Storage, tmp_path: Path) -> None:
    fetch(storage, StoredFile(LARGE, '"tag"', bytes_per_second=60e6), tmp_path)
    asked = sorted(request.headers.get("range", "") for request in storage.requests)
    starts = [part * PART_BYTES for part in range(4)]
    ends = [*(start - 1 for start in starts[1:]), len(LARGE) - 1]
    assert asked == sorted(["", *(f"bytes={a}-{b}" for a, b in zip(starts[1:], ends[1:], strict=True))])
    assert all(request.headers["if-range"] == '"tag"' for request in storage.requests if "range" in request.headers)


@pytest.mark.parametrize(("tag", "ranges"), [(None, True), ('W/"weak"', True), ('"tag"', False)])
def test_without_ranges_or_a_strong_tag_one_request_fetches_all(
    storage: Storage, tmp_path: Path, tag: str | None, ranges: bool
) -> None:
    assert fetch(storage, StoredFile(LARGE, tag, ranges), tmp_path)[1] == LARGE
    assert len(storage.requests) == 1


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_a_broken_connection_goes_on_where_it_stopped(storage: Storage, tmp_path: Path, content: bytes) -> None:
    _, got = fetch(storage, StoredFile(content, '"tag"', cuts=[70_000, 5]), tmp_path)
    assert got == content
    assert (
        "bytes=70000-" in "".join(request.headers.get("range", "") for request in storage.requests) or content == LARGE
    )


def test_a_broken_connection_without_ranges_begins_again(storage: Storage, tmp_path: Path) -> None:
    _, got = fetch(storage, StoredFile(SMALL, ranges=False, cuts=[70_000]), tmp_path)
    assert got == SMALL
    assert len(storage.requests) == 2


def test_a_server_that_always_cuts_is_given_up(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="cut"):
        fetch(storage, StoredFile(SMALL, ranges=False, cuts=[70_000] * 9), tmp_path)


def test_a_file_that_changes_between_its_parts_is_fetched_again_in_one_piece(storage: Storage, tmp_path: Path) -> None:
    """The server promises ranges and answers them with the whole of a newer file."""
    newer = bytes(reversed(LARGE))

    class Changing(Storage):
        def reply(self, request: object) -> Reply:
            file = self.files["/x"]
            if "range" in getattr(request, "headers", {}):
                self.files["/x"] = replace(file, content=newer, etag='"new"')
            return super().reply(request)  # type: ignore[arg-type]

    with Changing("127.0.0.1") as changing:
        came, got = fetch(changing, StoredFile(LARGE, '"old"'), tmp_path)
    assert got == newer
    assert came.sha256 == hashlib.sha256(newer).hexdigest()
    assert came.etag == '"new"'


@pytest.mark.parametrize("declared", [len(SMALL) + 10, 10**7])
def test_a_body_shorter_than_declared_is_refused(storage: Storage, tmp_path: Path, declared: int) -> None:
    with pytest.raises(DownloadError, match="cut"):
        fetch(storage, StoredFile(SMALL, ranges=False, declared_length=declared), tmp_path)


@pytest.mark.parametrize("declared", [None, 10])
def test_more_than_the_limit_is_refused(storage: Storage, tmp_path: Path, declared: int | None) -> None:
    limits = Limits(max_bytes=50_000)
    file = StoredFile(SMALL, ranges=False, declared_length=declared)
    if declared is None:
        with pytest.raises(DownloadError, match=r"at most 0\.1 MB"):
            fetch(storage, file, tmp_path, limits)
    else:
        assert len(fetch(storage, file, tmp_path, limits)[1]) == declared  # the rest is never read


def test_a_drip_is_given_up(storage: Storage, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(DownloadError, match=r"too slowly: \d+ KiB/s"):
        fetch(storage, StoredFile(SMALL, bytes_per_second=20_000), tmp_path, Limits(slow_seconds=0.5))
    assert time.monotonic() - started < 4


def test_a_download_that_takes_too_long_is_given_up(storage: Storage, tmp_path: Path) -> None:
    limits = Limits(total_seconds=0.5, slowest_bytes_per_second=0)
    with pytest.raises(DownloadError, match="not done after 0 s"):
        fetch(storage, StoredFile(SMALL, bytes_per_second=20_000), tmp_path, limits)


def test_a_full_disk_is_named(storage: Storage) -> None:
    client = Client(frozenset({storage.authority}))
    address = storage.put("/x", StoredFile(SMALL))
    with Path("/dev/full").open("r+b", buffering=0) as full, pytest.raises(DiskError, match="needs more room"):
        download(client, client.get(address), full, Limits())


def test_progress_is_told(storage: Storage, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    client = Client(frozenset({storage.authority}))
    address = storage.put("/x", StoredFile(SMALL, bytes_per_second=50_000))
    with (tmp_path / "x").open("w+b") as target:
        download(client, client.get(address), target, Limits(), lambda done, total: told.append((done, total)))
    assert told
    assert all(0 < done <= len(SMALL) and total == len(SMALL) for done, total in told)


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["one piece", "parts"])
def test_an_interruption_ends_it_at_once_and_leaves_no_thread(storage: Storage, tmp_path: Path, content: bytes) -> None:
    """As a cancelled prediction does: the exception rises in the watching thread, wherever it happens to be."""

    class Cancelled(BaseException):
        pass

    def cancel(done: int, total: int | None) -> None:
        raise Cancelled

    before = set(threading.enumerate())
    client = Client(frozenset({storage.authority}))
    address = storage.put("/x", StoredFile(content, '"tag"', bytes_per_second=40_000))
    started = time.monotonic()
    with (tmp_path / "x").open("w+b") as target, pytest.raises(Cancelled):
        download(client, client.get(address), target, Limits(), cancel)
    assert time.monotonic() - started < 3
    fetching = [t for t in set(threading.enumerate()) - before if download_module.__name__ in repr(t._target)]  # type: ignore[attr-defined]
    assert fetching == []
