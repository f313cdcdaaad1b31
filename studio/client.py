"""HTTP to the one Cog server that the page is for, and its answers in words.

A prediction is a synchronous PUT with an id of ours: the result comes in its answer, so that it arrives also where the
webhook, which only tells of progress, does not.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import queue
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from studio.form import Attachment, Inputs
from studio.webhook import Webhook

BUSY_SECONDS = 2.0
"""A server of Cog's answers 409 for a moment after its last answer, before the slot is free."""
PAUSE_SECONDS = 0.25
CANCELLED = "Cancelled."
MIME = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".avif": "image/avif",
}
_PREFIX = re.compile(r"^(?:Prediction failed: |Setup failed: |[A-Za-z]*(?:Error|Exception): )+")


class StudioError(Exception):
    """What could not be done, in words for the page."""


class RefusedError(StudioError):
    """The server did not accept the inputs: what is wrong with each, by name."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name.replace('_', ' ')}: {message}" for name, message in fields.items()))
        self.fields = fields


@dataclass(frozen=True)
class Answer:
    """One HTTP answer."""

    status: int
    document: dict[str, Any]


class Server:
    """The Cog server at one base URL. Redirects are not followed: all requests go there."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise StudioError(f'Cannot use the target "{url}": give an address like http://127.0.0.1:5000.')
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._parts = parts

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine, from where it can reach a listener of ours."""
        host = str(self._parts.hostname)
        with suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
        return host == "localhost"

    def connect(self, timeout: float | None) -> http.client.HTTPConnection:
        """Return a new connection; it dials at the first request."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(str(self._parts.hostname), self._parts.port, timeout=timeout)

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        connection: http.client.HTTPConnection | None = None,
        timeout: float | None = 10.0,
    ) -> Answer:
        """Send one request and return the answer.

        Raises:
            OSError, http.client.HTTPException: there is none.
        """
        connection = connection or self.connect(timeout)
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, self._parts.path.rstrip("/") + path, content, _headers(content))
            answer = connection.getresponse()
            return Answer(answer.status, _document(answer.read()))
        finally:
            connection.close()

    def health(self) -> dict[str, Any]:
        """Return the health document; empty when nothing answers."""
        try:
            return self.call("GET", "/health-check").document
        except (OSError, http.client.HTTPException):
            return {}

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document.

        Raises:
            StudioError: there is none.
        """
        try:
            answer = self.call("GET", "/openapi.json")
        except (OSError, http.client.HTTPException) as error:
            raise StudioError(self.unreachable(error)) from error
        if answer.status != 200 or "Input" not in answer.document.get("components", {}).get("schemas", {}):
            raise StudioError(f"{self.url}/openapi.json has no inputs of a Cog predictor (HTTP {answer.status}).")
        return answer.document

    def unreachable(self, error: Exception) -> str:
        """Say that no server answers."""
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return f"No server answers at {self.url}: {reason}. Start it, for example with script/serve, and run again."


def _headers(content: bytes | None) -> dict[str, str]:
    return {} if content is None else {"Content-Type": "application/json"}


def _document(content: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        document = json.loads(content)
        return document if isinstance(document, dict) else {}
    return {}


def payload(inputs: Inputs) -> dict[str, Any]:
    """Return the inputs as JSON values, files as data URIs.

    Raises:
        StudioError: a file cannot be read.
    """
    return {name: data_uri(value) if isinstance(value, Attachment) else value for name, value in inputs.items()}


def data_uri(attachment: Attachment) -> str:
    """Return a file as a data URI."""
    try:
        content = attachment.path.read_bytes()
    except OSError as error:
        raise StudioError(f"Cannot read {attachment.path}: {error.strerror}.") from error
    return f"data:{mime_of(attachment)};base64,{base64.b64encode(content).decode()}"


def mime_of(attachment: Attachment) -> str:
    """Return the type that a file's data URI names."""
    return MIME.get(attachment.path.suffix.lower(), "application/octet-stream")


@dataclass
class Prediction:
    """One prediction, from its request to its result. `cancel` may be called from any thread; `events` repeats it."""

    server: Server
    inputs: dict[str, Any]
    webhook: Webhook | None = None
    id: str = field(default_factory=lambda: f"studio-{secrets.token_hex(8)}")
    cancelled: threading.Event = field(default_factory=threading.Event)
    _events: queue.Queue[str | Answer | Exception] = field(default_factory=queue.Queue)
    _connection: http.client.HTTPConnection | None = None

    def events(self) -> Iterator[str | Answer]:
        """Yield the log as it grows, "" each second without news, and at last the answer.

        Raises:
            OSError, http.client.HTTPException: the server did not answer, or went away.
        """
        body: dict[str, Any] = {"input": self.inputs}
        if self.webhook is not None and self.server.is_local:
            address = self.webhook.listen_for(self.id, self._events.put)
            body |= {"webhook": address, "webhook_events_filter": ["logs"]}
        try:
            threading.Thread(target=self._send, args=(body,), daemon=True).start()
            while True:
                try:
                    event = self._events.get(timeout=1.0)
                except queue.Empty:
                    event = ""
                    if self.cancelled.is_set():  # Cog loses one that comes before the prediction has begun
                        self.cancel()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Answer):
                    return
        finally:
            if self.webhook is not None:
                self.webhook.forget(self.id)

    def _send(self, body: Mapping[str, Any]) -> None:
        try:
            self._connection = self.server.connect(timeout=None)
            path = f"/predictions/{self.id}"
            self._events.put(self.server.call("PUT", path, body, self._connection))
        except (
            OSError,
            http.client.HTTPException,
            AttributeError,
            ValueError,
        ) as error:  # the last two: cut while read
            self._events.put(error if isinstance(error, OSError) else ConnectionError(str(error)))

    def cancel(self) -> None:
        """Free the server's slot: by its own route, or else by dropping the connection."""
        self.cancelled.set()
        with suppress(OSError, http.client.HTTPException):
            if self.server.call("POST", f"/predictions/{self.id}/cancel", timeout=2.0).status == 200:
                return
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)


def succeeded(answer: Answer) -> dict[str, Any]:
    """Return the document of a prediction that made images.

    Raises:
        RefusedError: inputs are wrong.
        StudioError: it failed or was cancelled; the message is in words, without the server's doubled prefixes.
    """
    if answer.status == 422:
        raise RefusedError(_refused_fields(answer.document))
    status = answer.document.get("status")
    if status == "canceled":
        raise StudioError(CANCELLED)
    if status == "failed":
        raise StudioError(_PREFIX.sub("", str(answer.document.get("error", ""))) or "The prediction failed.")
    if answer.status != 200 or status != "succeeded":
        said = answer.document.get("detail") or answer.document.get("error") or "without a reason"
        raise StudioError(f"The server answered HTTP {answer.status}: {said}")
    return answer.document


def _refused_fields(document: Mapping[str, Any]) -> dict[str, str]:
    details = document.get("detail")
    if not isinstance(details, list):
        return {"request": str(details)}
    return {str(detail["loc"][-1]): str(detail["msg"]) for detail in details}


def not_ready(health: Mapping[str, Any]) -> str | None:
    """Return why a server with this health will not predict; None while it is starting or fine."""
    status = health.get("status")
    if status == "SETUP_FAILED":
        last = str(health.get("setup", {}).get("logs", "")).strip().splitlines()[-1:]
        return f"The server's setup failed: {_PREFIX.sub('', ''.join(last))} It has to be started anew."
    if status in ("UNHEALTHY", "DEFUNCT"):
        return f"The server's worker has ended ({status}): it has to be started anew."
    return None


def wait_for_slot(since: float) -> bool:
    """Pause, and return whether a server that answered 409 is worth asking again."""
    time.sleep(PAUSE_SECONDS)
    return time.monotonic() - since < BUSY_SECONDS
