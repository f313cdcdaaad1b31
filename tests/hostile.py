"""Hosts that misbehave below HTTP: silent, dripping, endless. Each accepts connections and answers badly."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

DRIP_SECONDS = 0.5
OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"

Behaviour = Callable[[socket.socket, threading.Event], None]


@dataclass
class HostileHost:
    """One misbehaving host on this machine."""

    authority: str
    connections: list[float] = field(default_factory=list)
    """When each connection was accepted."""


def silent(peer: socket.socket, closing: threading.Event) -> None:
    """Accepts, reads, never answers: neither a TLS handshake nor a request."""
    closing.wait()


def dripping_headers(peer: socket.socket, closing: threading.Event) -> None:
    """Sends a header a byte at a time, for ever."""
    peer.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    drip(peer, closing)


def dripping_body(peer: socket.socket, closing: threading.Event) -> None:
    """Promises a megabyte and sends it a byte at a time."""
    peer.sendall(OK + b"Content-Length: 1000000\r\n\r\n")
    drip(peer, closing)


def dripping_handshake(peer: socket.socket, closing: threading.Event) -> None:
    """Begins a TLS record of 16 KiB and sends it a byte at a time."""
    peer.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")
    drip(peer, closing)


def endless_body(peer: socket.socket, closing: threading.Event) -> None:
    """Sends zeros as fast as they are taken, without a length."""
    peer.sendall(OK + b"Connection: close\r\n\r\n")
    while not closing.is_set():
        peer.sendall(bytes(1 << 20))


def bomb(peer: socket.socket, closing: threading.Event) -> None:
    """200 MiB of zeros as 200 KB of gzip."""
    body = gzip.compress(bytes(200 << 20), 9)
    peer.sendall(OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def drip(peer: socket.socket, closing: threading.Event) -> None:
    """Send a byte now and then until the other side hangs up."""
    while not closing.wait(DRIP_SECONDS):
        peer.sendall(b"a")


@contextmanager
def hostile_host(behave: Behaviour) -> Iterator[HostileHost]:
    """Run a host with one behaviour."""
    listener = socket.create_server(("127.0.0.1", 0))
    host, closing = HostileHost(f"127.0.0.1:{listener.getsockname()[1]}"), threading.Event()

    def serve(peer: socket.socket) -> None:
        with peer, suppress(OSError):
            if behave not in (silent, dripping_handshake):
                peer.recv(65536)
            behave(peer, closing)

    def accept() -> None:
        while not closing.is_set():
            with suppress(OSError):
                peer, _ = listener.accept()
                host.connections.append(time.monotonic())
                threading.Thread(target=serve, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield host
    finally:
        closing.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
