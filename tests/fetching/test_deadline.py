"""Every request over the network ends at one deadline, and a cancellation ends it at any point within a second."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from errors import DownloadError
from fetching.deadline import Deadline, run_until
from fetching.download import Limits, download
from fetching.hub import Hub, HubError, Refusal
from fetching.network import Client
from tests.cancelling import cancelled_after
from tests.hostile import (
    Behaviour,
    HostileHost,
    dripping_body,
    dripping_handshake,
    dripping_headers,
    endless_body,
    hostile_host,
    silent,
)
from weights import Source, WeightsCache

LIMIT = 1.0
"""Seconds of the deadline in these tests."""


def network_threads() -> int:
    return sum(thread.name == "network" for thread in threading.enumerate())


def wait_for_no_network_threads() -> None:
    deadline = time.monotonic() + 3
    while network_threads():
        assert time.monotonic() < deadline, "a network thread is left"
        time.sleep(0.02)


class Slow:
    """A name look-up that hangs, as a silent name server makes it."""

    def __init__(self) -> None:
        self.going_on = threading.Event()

    def resolve(self, host: str, port: int) -> Any:
        self.going_on.wait(20)
        raise OSError


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.going_on.set()


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[HostileHost]:
    behave: Behaviour = request.param
    with hostile_host(behave) as host:
        yield host


POINTS = [(silent, "http"), (silent, "https"), (dripping_handshake, "https"), (dripping_headers, "http")]
"""Waiting for headers, for the beginning of a handshake, within a handshake, within headers."""


def client_of(host: HostileHost) -> Client:
    return Client(frozenset({host.authority}), answer_seconds=LIMIT)


@pytest.mark.parametrize(("host", "scheme"), POINTS, indirect=["host"])
def test_a_request_ends_at_its_deadline(host: HostileHost, scheme: str) -> None:
    started = time.monotonic()
    with pytest.raises(DownloadError, match=f"{host.authority} did not answer within 1 s"):
        client_of(host).get(f"{scheme}://{host.authority}/x")
    assert time.monotonic() - started < LIMIT + 0.5
    wait_for_no_network_threads()


@pytest.mark.parametrize(("host", "scheme"), [*POINTS, (dripping_body, "http")], indirect=["host"])
def test_a_question_ends_at_its_deadline_body_included(host: HostileHost, scheme: str) -> None:
    started = time.monotonic()
    with pytest.raises(DownloadError, match="did not answer within 1 s"):
        client_of(host).get_json(f"{scheme}://{host.authority}/x")
    assert time.monotonic() - started < LIMIT + 0.5
    wait_for_no_network_threads()


@pytest.mark.parametrize(("host", "scheme"), POINTS, indirect=["host"])
def test_a_request_is_cancelled_within_a_second(host: HostileHost, scheme: str) -> None:
    client = Client(frozenset({host.authority}))
    assert cancelled_after(0.3, lambda: client.get(f"{scheme}://{host.authority}/x")) < 1
    wait_for_no_network_threads()


def test_a_name_look_up_ends_at_the_deadline(slow: Slow) -> None:
    started = time.monotonic()
    with pytest.raises(DownloadError, match=r"silent\.example did not answer within 1 s"):
        Client(resolve=slow.resolve, answer_seconds=LIMIT).get("https://silent.example/x")
    assert time.monotonic() - started < LIMIT + 0.5


def test_a_name_look_up_is_cancelled_within_a_second(slow: Slow) -> None:
    assert cancelled_after(0.3, lambda: Client(resolve=slow.resolve).get("https://silent.example/x")) < 1


def test_a_connection_that_is_never_accepted_ends_at_the_deadline() -> None:
    """A full backlog: the system answers no further SYN."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        authority = f"127.0.0.1:{full.getsockname()[1]}"
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        client = Client(frozenset({authority}), answer_seconds=LIMIT)
        with pytest.raises(DownloadError, match="did not answer within 1 s"):
            client.get(f"http://{authority}/x")
        assert cancelled_after(0.3, lambda: Client(frozenset({authority})).get(f"http://{authority}/x")) < 1
        wait_for_no_network_threads()
        for filler in fillers:
            filler.close()


def test_pauses_between_tries_count(host_that_is_busy: HostileHost) -> None:
    """A busy server that asks to wait beyond the deadline is reported at once."""
    started = time.monotonic()
    with pytest.raises(DownloadError, match="answered 503"):
        client_of(host_that_is_busy).get(f"http://{host_that_is_busy.authority}/x")
    assert time.monotonic() - started < 1


@pytest.fixture
def host_that_is_busy() -> Iterator[HostileHost]:
    def busy(peer: socket.socket, closing: threading.Event) -> None:
        peer.sendall(b"HTTP/1.1 503 Busy\r\nRetry-After: 20\r\nContent-Length: 0\r\n\r\n")

    with hostile_host(busy) as host:
        yield host


# Bodies


@pytest.mark.parametrize("host", [dripping_body, endless_body], indirect=True)
def test_headers_and_body_share_one_deadline(host: HostileHost, tmp_path: Path) -> None:
    limits = Limits(max_bytes=2**40, total_seconds=60)
    deadline, client = Deadline(LIMIT), client_of(host)
    with (tmp_path / "x").open("w+b") as file, pytest.raises(DownloadError, match="too slowly"):
        download(client, client.get(f"http://{host.authority}/x"), file, limits, deadline=deadline)
    assert deadline.elapsed() < LIMIT + 1


@pytest.mark.parametrize("host", [dripping_body, endless_body], indirect=True)
def test_a_body_is_cancelled_within_a_second(host: HostileHost, tmp_path: Path) -> None:
    client = client_of(host)

    def work() -> None:
        with (tmp_path / "x").open("w+b") as file:
            download(client, client.get(f"http://{host.authority}/x"), file, Limits(max_bytes=2**40))

    assert cancelled_after(0.5, work) < 1


@pytest.mark.parametrize("host", [dripping_headers], indirect=True)
def test_waiting_for_another_download_of_the_same_file_is_cancelled_within_a_second(
    host: HostileHost, tmp_path: Path
) -> None:
    cache = WeightsCache(tmp_path / "cache", Client(frozenset({host.authority}), answer_seconds=2))

    def fetch() -> None:
        with cache.open("x", "", lambda: Source("x", f"http://{host.authority}/x")):
            pass

    def first() -> None:
        with pytest.raises(DownloadError):
            fetch()

    other = threading.Thread(target=first)
    other.start()
    time.sleep(0.3)
    assert cancelled_after(0.3, fetch) < 1
    other.join()


# The Hub, through its own library


@pytest.mark.parametrize("host", [silent, dripping_headers, dripping_body], indirect=True)
def test_a_question_to_the_hub_ends_at_its_deadline(host: HostileHost) -> None:
    hub = Hub(f"http://{host.authority}", answer_seconds=LIMIT)
    started = time.monotonic()
    with pytest.raises(HubError, match="cannot be reached") as caught:
        hub.listing("owner/name")
    assert caught.value.refusal is Refusal.UNREACHABLE
    assert time.monotonic() - started < LIMIT + 0.5


@pytest.mark.parametrize("host", [silent, dripping_headers], indirect=True)
def test_a_question_to_the_hub_is_cancelled_within_a_second(host: HostileHost) -> None:
    hub = Hub(f"http://{host.authority}")
    assert cancelled_after(0.3, lambda: hub.locate("owner/name", "x.safetensors")) < 1


# The helper


def test_work_that_returns_or_raises_does_so_in_the_waiting_thread() -> None:
    assert run_until(Deadline(5), lambda: 3, lambda: None) == 3
    with pytest.raises(ValueError, match="invalid literal"):
        run_until(Deadline(5), lambda: int("x"), lambda: None)


def test_an_outer_deadline_holds_too() -> None:
    outer = Deadline(100)
    inner = Deadline(50, outer)
    assert 49 < inner.left() <= 50
    outer.expire()
    assert inner.left() == 0
    with pytest.raises(TimeoutError):
        inner.pause(0.01)
