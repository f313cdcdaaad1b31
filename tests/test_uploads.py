"""`image` and `mask` by address or data URI: fetched under the rules of LoRA addresses, with nothing left behind."""

from __future__ import annotations

import base64
import hashlib
import inspect
import socket
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import cog
import cog.types
import pytest

from errors import DownloadError, InputError
from fetching.network import Client
from tests.cancelling import cancelled_after
from tests.fetching.test_network import SPELLINGS
from tests.hostile import (
    Behaviour,
    bomb,
    dripping_body,
    dripping_handshake,
    dripping_headers,
    endless_body,
    hostile_host,
    silent,
)
from tests.services import Reply, Storage, StoredFile
from uploads import Upload, Uploads, defer_downloads

CONTENT = b"an image, for all that is known here"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, for this test alone; empty at its end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def host() -> Iterator[Storage]:
    with Storage("127.0.0.1") as server:
        yield server


def uploads_from(*authorities: str, max_bytes: int = 10**6, total_seconds: float = 30) -> Uploads:
    client = Client(frozenset(authorities), plain_http=True, sleep=lambda seconds: None)
    return Uploads(client, max_bytes=max_bytes, total_seconds=total_seconds)


def content(uploads: Uploads, source: str) -> bytes:
    with uploads.fetched(Upload(source), None) as (image, mask):
        assert image is not None
        assert mask is None
        return image.read_bytes()


# What Cog does


def test_the_replaced_methods_are_those_of_this_version_of_cog() -> None:
    """If this fails, read `uploads.py` and Cog's new code: is the replacement still needed, and still the right one?"""
    digests = {
        name: hashlib.sha256(inspect.getsource(source).encode()).hexdigest()[:16]
        for name, source in {"URLPath.convert": cog.types.URLPath.convert, "Path": cog.types.Path}.items()
    }
    assert (version("cog"), version("coglet")) == ("0.23.1", "0.23.1")
    assert digests == {"URLPath.convert": "65d02f89fcbc7be1", "Path": "46e310c39a9932ca"}


@pytest.mark.parametrize("text", ["http://127.0.0.1:9/x.png", "https://example.com/x", "data:image/png;base64,AAAA"])
def test_cog_hands_addresses_on_without_touching_them(text: str) -> None:
    defer_downloads()
    assert cog.types.Path.validate(text) == Upload(text)
    assert text not in repr(Upload(text))


def test_cog_hands_paths_on_as_before() -> None:
    defer_downloads()
    assert cog.types.Path.validate("/etc/hostname") == cog.Path("/etc/hostname")
    assert cog.types.Path.validate(Path("/x")) == Path("/x")


# Addresses


def test_both_files_come_and_are_gone_afterwards(host: Storage, temporary: Path) -> None:
    image, mask = host.put("/image", StoredFile(CONTENT)), host.put("/mask", StoredFile(b"mask"))
    with uploads_from(host.authority).fetched(Upload(image), Upload(mask)) as files:
        assert [file.read_bytes() for file in files if file] == [CONTENT, b"mask"]
    assert list(temporary.iterdir()) == []


def test_neither_is_needed() -> None:
    with uploads_from().fetched(None, None) as files:
        assert files == (None, None)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_this_machine_is_reached_under_no_spelling(host: Storage, scheme: str, name: str) -> None:
    port = host.authority.partition(":")[2]
    with pytest.raises(DownloadError, match="Cannot fetch the image"):
        content(uploads_from(), f"{scheme}://{name}:{port}/x.png")
    assert host.requests == []


@pytest.mark.parametrize("location", [*(f"http://{name}" for name in SPELLINGS), "https://127.0.0.1", "file:///etc/x"])
def test_no_redirect_leads_inside(host: Storage, location: str) -> None:
    with Storage("127.0.0.1") as outside:
        port = host.authority.partition(":")[2]
        outside.first.append(Reply(302, {"Location": f"{location}:{port}/x".encode().decode("latin-1")}))
        with pytest.raises(DownloadError):
            content(uploads_from(outside.authority), f"{outside.address}/y")
    assert host.requests == []


def test_plain_http_may_be_public_but_not_private() -> None:
    def resolve(host: str, port: int) -> list[tuple[object, object, object, str, tuple[str, int]]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port))]

    uploads = Uploads(Client(plain_http=True, resolve=resolve))
    with pytest.raises(DownloadError, match=r"image: The host images\.example is not on the public internet"):
        content(uploads, "http://images.example/x.png")


def test_no_error_shows_the_query(host: Storage) -> None:
    with pytest.raises(DownloadError, match=f"Cannot fetch the image: {host.authority} answered 404") as caught:
        content(uploads_from(host.authority), f"{host.address}/x?signature=canary")
    assert "canary" not in f"{caught.value!r}"


@pytest.mark.parametrize(
    ("behave", "found"), [(bomb, "gzip encoding, which is not accepted"), (endless_body, "has more than 1.0 MB")]
)
def test_more_than_the_limit_is_refused(behave: Behaviour, found: str, temporary: Path) -> None:
    with hostile_host(behave) as hostile, pytest.raises(DownloadError, match=found):
        content(uploads_from(hostile.authority), f"http://{hostile.authority}/x.png")
    assert list(temporary.iterdir()) == []


POINTS = [
    (silent, "http"),
    (silent, "https"),
    (dripping_handshake, "https"),
    (dripping_headers, "http"),
    (dripping_body, "http"),
]


@pytest.mark.parametrize(("behave", "scheme"), POINTS)
def test_both_files_share_one_deadline(behave: Behaviour, scheme: str, host: Storage, temporary: Path) -> None:
    slow = host.put("/image", StoredFile(CONTENT, bytes_per_second=100))
    with hostile_host(behave) as hostile:
        uploads = uploads_from(hostile.authority, host.authority, total_seconds=1)
        started = time.monotonic()
        with (
            pytest.raises(DownloadError, match="Cannot fetch the mask"),
            uploads.fetched(Upload(slow), Upload(f"{scheme}://{hostile.authority}/x.png")),
        ):
            pass
    assert time.monotonic() - started < 2
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("behave", "scheme"), POINTS)
def test_a_cancellation_lands_within_a_second(behave: Behaviour, scheme: str, temporary: Path) -> None:
    with hostile_host(behave) as hostile:
        uploads = uploads_from(hostile.authority)
        assert cancelled_after(0.3, lambda: content(uploads, f"{scheme}://{hostile.authority}/x.png")) < 1
    assert list(temporary.iterdir()) == []


# Data URIs


@pytest.mark.parametrize(
    "text",
    [
        "data:image/png;base64," + base64.b64encode(CONTENT).decode(),
        "data:;base64," + base64.encodebytes(CONTENT).decode().replace("\n", "%0A"),
        "data:," + CONTENT.decode().replace(" ", "%20"),
    ],
)
def test_a_data_uri_is_decoded(text: str) -> None:
    assert content(uploads_from(), text) == CONTENT


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("data:image/png;base64,AAA", "cannot be decoded"),
        ("data:image/png;base64", "is empty"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64," + "A" * 1_400_000, "more than 0 MiB"),
        ("data:image/png," + "%41" * 1_000_001, "more than 0 MiB"),
    ],
)
def test_a_data_uri_that_is_refused_says_why(text: str, found: str, temporary: Path) -> None:
    with pytest.raises(InputError, match=found) as caught:
        content(uploads_from(), text)
    assert len(str(caught.value)) < 200
    assert list(temporary.iterdir()) == []


# Files of the server


def test_a_stored_file_is_taken_as_it_is_and_stays(temporary: Path) -> None:
    stored = temporary / "upload"
    stored.write_bytes(CONTENT)
    with uploads_from().fetched(stored, None) as (image, _):
        assert image == stored
    assert stored.exists()


@pytest.mark.parametrize("given", ["/etc/hostname", "", "file:///etc/hostname", Path("/etc/hostname"), 3])
def test_anything_else_is_refused(given: object) -> None:
    with pytest.raises(InputError, match="mask is not an uploaded file"), uploads_from().fetched(None, given):
        pass
