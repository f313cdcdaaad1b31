"""A listener on loopback for the progress of predictions, and what a log says of it."""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MOST_BYTES = 4 * 2**20
_STEP = re.compile(r"(\d+)/(\d+) \[")
_BAR = re.compile(r"\d+%\|.*?\| \d+/\d+ \[.*")


class Webhook:
    """Receives the logs of predictions. Its path is a secret: others on this machine cannot write into the page."""

    def __init__(self) -> None:
        self._listeners: dict[str, Callable[[str], object]] = {}
        self._secret = secrets.token_urlsafe(24)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 5

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                known = length <= MOST_BYTES and outer._receive(self.path, self.rfile.read(length))
                self.send_response(200 if known else 404)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Write nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def listen_for(self, prediction: str, listener: Callable[[str], object]) -> str:
        """Return the address that this prediction's events go to; the listener gets the log each time."""
        path = f"/{self._secret}/{prediction}"
        self._listeners[path] = listener
        return f"http://127.0.0.1:{self._server.server_port}{path}"

    def forget(self, prediction: str) -> None:
        """Listen no more."""
        self._listeners.pop(f"/{self._secret}/{prediction}", None)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def _receive(self, path: str, body: bytes) -> bool:
        listener = self._listeners.get(path)
        if listener is None:
            return False
        try:
            log = json.loads(body).get("logs", "")
        except (ValueError, AttributeError):
            return False
        listener(str(log))
        return True


def step_of(log: str) -> tuple[int, int] | None:
    """Return the step and the number of steps that the last progress bar in a log shows; None without a bar."""
    found = _STEP.findall(log)
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def images_done(log: str) -> int:
    """Return how many images of the prediction are generated."""
    return len(re.findall(r"^image \d+: generated", log, re.MULTILINE))


def without_bars(log: str) -> str:
    """Return a log's lines without progress bars."""
    lines = (part for line in log.splitlines() for part in line.split("\r"))
    return "\n".join(line for line in lines if line.strip() and not _BAR.search(line))


def seed_of(log: str) -> int | None:
    """Return the seed that a log names."""
    found = re.search(r"Using seed: (-?\d+)", log)
    return int(found[1]) if found else None
