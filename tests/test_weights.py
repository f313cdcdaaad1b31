"""The cache of files: what is fetched when, for whom, and what survives kills, full disks and meddling."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from errors import DiskError, DownloadError, HttpStatusError, LoraFormatError
from fetching.download import Limits
from fetching.files import SharedFolderError
from fetching.network import Client
from fetching.store import DiskQuota, Entry, Store, StoredFile, plan_eviction
from tests.fetching.test_containers import BAD_TARS, tar_of
from tests.paths import PROJECT
from tests.services import HTML_WITH_200, Reply, Storage
from tests.services import StoredFile as ServedFile
from weights import FRESH_SECONDS, RETRY_SECONDS, CachedFile, Container, Source, WeightsCache


def tensors(number: int, size_bytes: int = 4000) -> bytes:
    """A safetensors file that no other number has."""
    return save({"a": np.random.default_rng(number).integers(0, 255, size_bytes, dtype=np.uint8)})


CONTENT = tensors(0)


@pytest.fixture
def storage() -> Iterator[Storage]:
    with Storage("127.0.0.1") as server:
        yield server


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.time = 1_800_000_000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(storage: Storage, tmp_path: Path, clock: Clock) -> WeightsCache:
    return open_cache(storage, tmp_path, now=clock)


def open_cache(storage: Storage, folder: Path, **options: Any) -> WeightsCache:
    client = Client(frozenset({storage.authority}), sleep=lambda seconds: None)
    return WeightsCache(folder / "cache", client, **{"quota": DiskQuota(min_free_bytes=0), **options})


def get(cache: WeightsCache, source: Source, access: str = "") -> tuple[CachedFile, bytes]:
    """Open a source under its own name."""
    with cache.open(source.name, access, lambda: source) as file:
        return file, file.path.read_bytes()


def blobs(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "blobs").iterdir())


def nothing_partial(folder: Path) -> bool:
    return not list((folder / "cache" / "partial").iterdir())


# What is fetched, and when


def test_a_file_is_fetched_once_and_then_found(cache: WeightsCache, storage: Storage, tmp_path: Path) -> None:
    source = Source("x", storage.put("/x", ServedFile(CONTENT)))
    outcomes = [get(cache, source) for _ in range(3)]
    assert [file.outcome for file, _ in outcomes] == ["miss", "hit", "hit"]
    assert all(content == CONTENT for _, content in outcomes)
    assert outcomes[0][0].path == tmp_path / "cache" / "blobs" / f"{hashlib.sha256(CONTENT).hexdigest()}.safetensors"
    assert storage.count("/x") == 1


def test_a_restart_forgets_nothing(cache: WeightsCache, storage: Storage, tmp_path: Path) -> None:
    source = Source("x", storage.put("/x", ServedFile(CONTENT)), facts=(("trigger words", "TOK"),))
    get(cache, source)
    file, _ = get(open_cache(storage, tmp_path, now=Clock()), source)
    assert (file.outcome, file.facts) == ("hit", (("trigger words", "TOK"),))


def test_two_names_of_one_content_share_it(cache: WeightsCache, storage: Storage, tmp_path: Path) -> None:
    for name in ("x", "y"):
        assert get(cache, Source(name, storage.put(f"/{name}", ServedFile(CONTENT))))[1] == CONTENT
    assert len(blobs(tmp_path)) == 1


def test_a_tar_gives_its_one_file(cache: WeightsCache, storage: Storage, tmp_path: Path) -> None:
    tar = tar_of(("output/captions/a.txt", b"a photo"), ("output/flux_train_replicate/lora.safetensors", CONTENT))
    source = Source("x", storage.put("/x", ServedFile(tar)), container=Container.TAR)
    assert get(cache, source)[1] == CONTENT
    assert nothing_partial(tmp_path)


def test_content_that_came_with_the_request_is_stored(cache: WeightsCache) -> None:
    assert get(cache, Source("x", content=CONTENT, immutable=True))[1] == CONTENT


@pytest.mark.parametrize(("content", "found"), [(b"", "do not begin"), (b"x" * 100, "do not begin")])
def test_content_that_is_not_safetensors_is_refused(cache: WeightsCache, content: bytes, found: str) -> None:
    with pytest.raises(LoraFormatError, match=found):
        get(cache, Source("x", content=content))


def test_content_beyond_the_limit_is_refused(storage: Storage, tmp_path: Path) -> None:
    cache = open_cache(storage, tmp_path, limits=Limits(max_bytes=len(CONTENT) - 1))
    with pytest.raises(DownloadError, match="The data URI has more than"):
        get(cache, Source("x", content=CONTENT))


# Staleness


def test_a_name_without_revision_is_asked_about_again_after_ten_minutes(
    cache: WeightsCache, storage: Storage, clock: Clock
) -> None:
    address = storage.put("/x", ServedFile(CONTENT))
    get(cache, Source("x", address, revision="1"))
    clock.time += FRESH_SECONDS - 1
    assert get(cache, Source("x", address, revision="2"))[0].outcome == "hit"
    clock.time += 2
    assert get(cache, Source("x", address, revision="1"))[0].outcome == "revalidated"
    assert storage.count("/x") == 1


def test_a_retrained_model_is_fetched_again(cache: WeightsCache, storage: Storage, clock: Clock) -> None:
    get(cache, Source("x", storage.put("/x", ServedFile(CONTENT)), revision="1"))
    clock.time += FRESH_SECONDS + 1
    newer = tensors(1)
    file, content = get(cache, Source("x", storage.put("/x", ServedFile(newer)), revision="2"))
    assert (file.outcome, content) == ("miss", newer)


def test_an_immutable_name_is_never_asked_about_again(cache: WeightsCache, storage: Storage, clock: Clock) -> None:
    source = Source("x", storage.put("/x", ServedFile(CONTENT)), revision="1", immutable=True)
    get(cache, source)
    clock.time += 1000 * FRESH_SECONDS

    def locate() -> Source:
        raise AssertionError("the service was asked")

    with cache.open("x", "", locate) as file:
        assert file.outcome == "hit"


def test_a_digest_that_the_service_names_saves_the_download(
    cache: WeightsCache, storage: Storage, clock: Clock
) -> None:
    """A new commit of the repository that leaves the file as it is."""
    address, sha256 = storage.put("/x", ServedFile(CONTENT)), hashlib.sha256(CONTENT).hexdigest()
    get(cache, Source("x", address, revision="1", sha256=sha256))
    clock.time += FRESH_SECONDS + 1
    assert get(cache, Source("x", address, revision="2", sha256=sha256))[0].outcome == "revalidated"


def test_a_plain_address_is_checked_by_its_tag(cache: WeightsCache, storage: Storage, clock: Clock) -> None:
    source = Source("x", storage.put("/x", ServedFile(CONTENT, '"1"')))
    get(cache, source)
    clock.time += FRESH_SECONDS + 1
    storage.first.append(Reply(304))
    assert get(cache, source)[0].outcome == "revalidated"
    assert storage.requests[-1].headers["if-none-match"] == '"1"'
    clock.time += FRESH_SECONDS + 1
    newer = tensors(1)
    storage.put("/x", ServedFile(newer, '"2"'))
    assert get(cache, source)[1] == newer


@pytest.mark.parametrize(
    "error",
    [
        DownloadError("example.com did not answer in time."),
        HttpStatusError("example.com did not answer as it should.", status=429, host="example.com"),
        HttpStatusError("example.com did not answer as it should.", status=503, host="example.com"),
    ],
    ids=["away", "429", "503"],
)
def test_a_host_that_is_away_or_busy_does_not_take_the_stored_file_away(
    cache: WeightsCache, storage: Storage, clock: Clock, caplog: pytest.LogCaptureFixture, error: DownloadError
) -> None:
    """And is asked again only after a while: to wait for it may take a minute."""
    source = Source("x", storage.put("/x", ServedFile(CONTENT, '"1"')))
    get(cache, source)
    clock.time += FRESH_SECONDS + 1
    asked = 0

    def locate() -> Source:
        nonlocal asked
        asked += 1
        raise error

    for outcome in ("stale", "hit"):
        with cache.open("x", "", locate) as file:
            assert file.outcome == outcome
    assert "example.com did not answer" in caplog.text
    assert asked == 1
    clock.time += RETRY_SECONDS + 1
    storage.first.append(Reply(304))
    with cache.open("x", "", lambda: source) as file:
        assert file.outcome == "revalidated"


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_host_that_refuses_takes_the_stored_file_away(
    cache: WeightsCache, storage: Storage, clock: Clock, status: int
) -> None:
    get(cache, Source("x", storage.put("/x", ServedFile(CONTENT))))
    clock.time += FRESH_SECONDS + 1

    def locate() -> Source:
        raise HttpStatusError(f"example.com answered {status}.", status=status, host="example.com")

    with pytest.raises(HttpStatusError), cache.open("x", "", locate):
        pass


# Callers


def test_a_file_fetched_with_a_token_is_not_given_to_callers_without(cache: WeightsCache, storage: Storage) -> None:
    source = Source("x", storage.put("/x", ServedFile(CONTENT)))
    get(cache, source, access="token of the owner")

    def locate() -> Source:
        raise HttpStatusError("x answered 401.", status=401, host="x")

    for access in ("", "token of another"):
        with pytest.raises(HttpStatusError), cache.open("x", access, locate):
            pass
    assert get(cache, source, access="token of the owner")[0].outcome == "hit"


def test_no_token_and_no_name_is_written_to_the_disk(cache: WeightsCache, storage: Storage, tmp_path: Path) -> None:
    address = storage.put("/x", ServedFile(CONTENT)) + "?signature=canary-signature"
    with cache.open("https://canary-name", "canary-token", lambda: Source("x", address)):
        pass
    for path in tmp_path.rglob("*"):
        assert "canary" not in path.name
        assert path.is_dir() or b"canary" not in path.read_bytes()


# What must not be stored


BAD: dict[str, tuple[Callable[[Storage], Source], type[Exception], str]] = {
    "web page": (
        lambda s: Source("x", s.put("/x", ServedFile(b"", first=[HTML_WITH_200]))),
        LoraFormatError,
        "web page",
    ),
    "truncated": (
        lambda s: Source("x", s.put("/x", ServedFile(CONTENT, ranges=False, declared_length=50_000))),
        DownloadError,
        "cut",
    ),
    "other digest": (lambda s: Source("x", s.put("/x", ServedFile(CONTENT)), sha256="0" * 64), DownloadError, "digest"),
    "other size": (lambda s: Source("x", s.put("/x", ServedFile(CONTENT)), size_bytes=9), DownloadError, "lists 9"),
    "too large": (lambda s: Source("x", s.put("/x", ServedFile(bytes(200_000)))), DownloadError, "smaller file"),
    "not found": (lambda s: Source("x", f"{s.address}/nowhere"), HttpStatusError, "404"),
    "gzip": (lambda s: Source("x", s.put("/x", ServedFile(CONTENT, gzip=True))), DownloadError, "gzip"),
    "tar of two": (
        lambda s: Source("x", s.put("/x", ServedFile(BAD_TARS["two"][0])), container=Container.TAR),
        LoraFormatError,
        "2 safetensors files",
    ),
    "tar of no safetensors": (
        lambda s: Source("x", s.put("/x", ServedFile(tar_of(("a.safetensors", b"x" * 100)))), container=Container.TAR),
        LoraFormatError,
        "do not begin",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_leaves_nothing_behind(storage: Storage, tmp_path: Path, name: str) -> None:
    make, error, found = BAD[name]
    cache = open_cache(storage, tmp_path, limits=Limits(max_bytes=100_000))
    with pytest.raises(error, match=found):
        get(cache, make(storage))
    assert blobs(tmp_path) == []
    assert nothing_partial(tmp_path)
    good = Source("x", storage.put("/x", ServedFile(CONTENT)))
    assert get(cache, good)[1] == CONTENT


# Meddling


@pytest.mark.parametrize("meddle", [lambda p: p.write_bytes(b"x"), lambda p: p.unlink(), lambda p: os.truncate(p, 9)])
def test_a_changed_or_vanished_file_is_fetched_again(
    cache: WeightsCache, storage: Storage, tmp_path: Path, meddle: Callable[[Path], None]
) -> None:
    source = Source("x", storage.put("/x", ServedFile(CONTENT)), immutable=True)
    get(cache, source)
    meddle(blobs(tmp_path)[0])
    file, content = get(cache, source)
    assert (file.outcome, content) == ("miss", CONTENT)


def test_a_file_with_other_times_but_its_own_content_is_kept(
    cache: WeightsCache, storage: Storage, tmp_path: Path
) -> None:
    """As after a copy of the folder."""
    source = Source("x", storage.put("/x", ServedFile(CONTENT)), immutable=True)
    get(cache, source)
    os.utime(blobs(tmp_path)[0])
    assert get(cache, source)[0].outcome == "hit"


@pytest.mark.parametrize("replace", [True, False])
def test_a_changed_file_is_noticed_though_its_size_and_time_are_as_before(
    cache: WeightsCache, storage: Storage, tmp_path: Path, replace: bool
) -> None:
    source = Source("x", storage.put("/x", ServedFile(CONTENT)), immutable=True)
    get(cache, source)
    blob = blobs(tmp_path)[0]
    times = blob.stat().st_atime_ns, blob.stat().st_mtime_ns
    changed = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    if replace:
        other = tmp_path / "other"
        other.write_bytes(changed)
        other.replace(blob)
    else:
        blob.write_bytes(changed)
    os.utime(blob, ns=times)
    file, content = get(cache, source)
    assert (file.outcome, content) == ("miss", CONTENT)


def test_a_cache_of_an_earlier_version_is_kept(cache: WeightsCache, storage: Storage, tmp_path: Path) -> None:
    """It has no stamps: each file is hashed once and then has one."""
    source = Source("x", storage.put("/x", ServedFile(CONTENT)), immutable=True)
    get(cache, source)
    (stamp,) = (tmp_path / "cache" / "stamps").iterdir()
    stamp.unlink()
    assert get(cache, source)[0].outcome == "hit"
    assert stamp.exists()


def test_a_folder_that_others_can_write_to_is_refused(storage: Storage, tmp_path: Path) -> None:
    open_cache(storage, tmp_path)
    (tmp_path / "cache" / "blobs").chmod(0o777)
    with pytest.raises(SharedFolderError, match="other users can write to it"):
        open_cache(storage, tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"sha256": 3}', b"\xff" * 100])
def test_a_damaged_index_is_as_good_as_none(
    cache: WeightsCache, storage: Storage, tmp_path: Path, content: bytes
) -> None:
    source = Source("x", storage.put("/x", ServedFile(CONTENT)), immutable=True)
    get(cache, source)
    (line,) = (tmp_path / "cache" / "index").iterdir()
    line.write_bytes(content)
    assert get(cache, source)[1] == CONTENT


def test_leftovers_are_swept_at_the_start_but_not_what_others_fetch(storage: Storage, tmp_path: Path) -> None:
    cache = open_cache(storage, tmp_path)
    (tmp_path / "cache" / "partial" / "dead").write_bytes(b"x")
    orphan = tmp_path / "cache" / "index" / "0.json"
    orphan.write_text("{}")
    with cache._store.new_partial() as (file, path):
        file.write(b"live")
        open_cache(storage, tmp_path)
        assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert not orphan.exists()


# DiskQuota


def test_the_plan_takes_the_least_recently_used_until_it_fits() -> None:
    files = [StoredFile(Path(name), 10, used) for name, used in (("b", 2), ("c", 3), ("a", 1))]

    def planned(needed: int, free: int, quota: DiskQuota) -> str:
        return "".join(str(file.path) for file in plan_eviction(files, needed, free, quota))

    assert planned(5, 100, DiskQuota(50, None)) == ""
    assert planned(5, 50, DiskQuota(50, None)) == "a"
    assert planned(15, 50, DiskQuota(50, None)) == "ab"
    assert planned(500, 0, DiskQuota(50, None)) == "abc"
    assert planned(5, 1000, DiskQuota(0, 30)) == "a"
    assert planned(0, 1000, DiskQuota(0, 30)) == ""


def test_the_cache_stays_within_its_size_and_drops_the_least_recently_used(
    storage: Storage, tmp_path: Path, clock: Clock
) -> None:
    cache = open_cache(storage, tmp_path, quota=DiskQuota(0, 3 * len(CONTENT)), now=clock)
    sources = [Source(str(i), storage.put(f"/{i}", ServedFile(tensors(i))), immutable=True) for i in range(4)]
    for source in (*sources[:3], sources[0], sources[3]):
        clock.time += 1
        get(cache, source)
    assert [get(cache, sources[i])[0].outcome for i in (0, 2, 3)] == ["hit"] * 3
    assert get(cache, sources[1])[0].outcome == "miss"


def test_a_file_in_use_is_never_removed(storage: Storage, tmp_path: Path, clock: Clock) -> None:
    cache = open_cache(storage, tmp_path, quota=DiskQuota(0, 2 * len(CONTENT)), now=clock)
    sources = [Source(str(i), storage.put(f"/{i}", ServedFile(tensors(i))), immutable=True) for i in range(4)]
    with cache.open("0", "", lambda: sources[0]) as held:
        for source in sources[1:]:
            clock.time += 1
            get(cache, source)
            assert held.path.read_bytes() == tensors(0)
    assert len(blobs(tmp_path)) == 2


def test_a_disk_without_room_is_named_and_nothing_is_left(storage: Storage, tmp_path: Path) -> None:
    cache = open_cache(storage, tmp_path, free_bytes=lambda folder: 100)
    with pytest.raises(DiskError, match=r"disk has 0\.0 MB left"):
        get(cache, Source("x", storage.put("/x", ServedFile(CONTENT))))
    assert nothing_partial(tmp_path)


def test_a_disk_that_fills_up_on_the_way_is_tried_once_more_after_an_eviction(
    storage: Storage, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses to reserve space twice; the file that is stored already must go in between."""
    quota = DiskQuota(min_free_bytes=0)
    free = 10**9
    cache = open_cache(storage, tmp_path, now=clock, quota=quota, free_bytes=lambda folder: free)
    get(cache, Source("old", storage.put("/old", ServedFile(tensors(1)))))
    refusals = [OSError(errno.ENOSPC, "No space left on device")]

    def fallocate(file: int, offset: int, length: int) -> None:
        if refusals:
            raise refusals.pop()

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    assert get(cache, Source("x", storage.put("/x", ServedFile(CONTENT))))[1] == CONTENT
    assert len(blobs(tmp_path)) == 1


# Processes


def _fetch_in_child(folder: Path, authority: str, name: str) -> str:
    cache = WeightsCache(folder / "cache", Client(frozenset({authority})), quota=DiskQuota(0))
    with cache.open(name, "", lambda: Source(name, f"http://{authority}/{name}")) as file:
        return f"{file.outcome} {hashlib.sha256(file.path.read_bytes()).hexdigest()}"


def test_fifty_processes_want_one_file_and_one_get_brings_it(storage: Storage, tmp_path: Path) -> None:
    content = tensors(0, 3_000_000)
    storage.put("/x", ServedFile(content, bytes_per_second=3e6))
    context = multiprocessing.get_context("fork")
    with context.Pool(50) as pool:
        found = pool.starmap(_fetch_in_child, [(tmp_path, storage.authority, "x")] * 50, chunksize=1)
    digest = hashlib.sha256(content).hexdigest()
    assert sorted(found) == [f"hit {digest}"] * 49 + [f"miss {digest}"]
    assert storage.count("/x") == 1


CHILD = """
import sys
from pathlib import Path
from fetching.files import SharedFolderError
from fetching.network import Client
from fetching.store import DiskQuota
from weights import Source, WeightsCache
folder, authority = sys.argv[1:]
cache = WeightsCache(Path(folder), Client(frozenset({authority})), quota=DiskQuota(0))
print("ready", flush=True)
for name in sys.stdin:
    name = name.strip()
    with cache.open(name, "", lambda: Source(name, f"http://{authority}/{name}")):
        print(name, flush=True)
"""


def kill_at_random(storage: Storage, tmp_path: Path, kills: int) -> None:
    """Kill a process that fetches at random moments; whatever the cache then gives must be whole."""
    content = tensors(0, 600_000)
    rng = random.Random(0)
    for index in range(kills):
        name = str(index)
        storage.put(f"/{name}", ServedFile(content, '"tag"', bytes_per_second=20e6))
        command = [sys.executable, "-c", CHILD, str(tmp_path / "cache"), storage.authority]
        with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.stdin.write(f"{name}\n")
            child.stdin.flush()
            time.sleep(rng.uniform(0, 0.05))
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        for blob in blobs(tmp_path):
            assert blob.read_bytes() == content
        cache = open_cache(storage, tmp_path)
        assert nothing_partial(tmp_path)
        assert get(cache, Source(name, f"{storage.address}/{name}"))[1] == content
        for blob in blobs(tmp_path):
            blob.unlink()


def test_a_kill_at_any_moment_leaves_no_broken_file(storage: Storage, tmp_path: Path) -> None:
    kill_at_random(storage, tmp_path, 12)


@pytest.mark.slow
def test_two_hundred_kills_leave_no_broken_file(storage: Storage, tmp_path: Path) -> None:
    kill_at_random(storage, tmp_path, 200)


@pytest.mark.parametrize("declared", ["9" * 12, "9" * 400, "9" * 5000])
def test_a_length_that_a_host_makes_up_evicts_nothing(storage: Storage, tmp_path: Path, declared: str) -> None:
    cache = open_cache(storage, tmp_path)
    get(cache, Source("x", storage.put("/x", ServedFile(CONTENT))))
    address = storage.put("/y", ServedFile(b"y"))
    storage.first.append(Reply(200, {}, b"y", declared_length=declared))  # type: ignore[arg-type]
    with pytest.raises(DownloadError, match="at most"):
        get(cache, Source("y", address))
    assert len(blobs(tmp_path)) == 1


def test_addresses_that_callers_make_up_do_not_fill_the_index(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", DiskQuota(0), max_lines=10)
    blob = store.blob("a" * 64)
    blob.touch()
    lines = [store.index_path(f"https://e.com/x?{number}", "") for number in range(60)]
    for number, line in enumerate(lines):
        sha256 = ("a" if number % 3 else "b") * 64  # the content of every third is gone
        store.write_entry(line, Entry(sha256, 0, None, None, False, float(number)))
    left = set((tmp_path / "cache" / "index").iterdir())
    assert len(left) <= 10
    assert left <= set(lines[-20:])


# Speed


def test_a_stored_file_is_found_in_under_five_milliseconds_among_ten_thousand(storage: Storage, tmp_path: Path) -> None:
    cache = open_cache(storage, tmp_path)
    source = Source("x", storage.put("/x", ServedFile(CONTENT)), immutable=True)
    get(cache, source)
    blob, (line,) = blobs(tmp_path)[0], (tmp_path / "cache" / "index").iterdir()
    for index in range(10_000):
        digest = hashlib.sha256(str(index).encode()).hexdigest()
        (blob.parent / f"{digest}.safetensors").touch()
        (line.parent / f"{digest}.json").write_bytes(line.read_bytes())
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        get(cache, source)
        seconds.append(time.perf_counter() - started)
    assert sorted(seconds)[25] < 0.005
