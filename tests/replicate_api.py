"""A small stand-in of Replicate's API in front of one server of Cog's: models, predictions, files, webhooks, cancel.

It answers as far as the official clients ask: `POST /v1/models/{owner}/{name}/predictions`, `POST /v1/files`,
`GET /v1/predictions/{id}`, `POST /v1/predictions/{id}/cancel`. Predictions wait in a queue, as they do there.
"""

from __future__ import annotations

import json
import queue
import re
import secrets
import threading
import time
import urllib.error
import urllib.request
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

TOKEN = "r8_" + 37 * "x"
FINAL = ("succeeded", "failed", "canceled")


class ReplicateApi:
    """The server; `address` is what REPLICATE_BASE_URL is set to. `webhooks` holds what came to /webhook."""

    def __init__(self) -> None:
        self.cog = ""
        """The address of Cog's server; set once that runs, since it has to trust this server's address before."""
        self.predictions: dict[str, dict[str, Any]] = {}
        self.files: dict[str, tuple[str, bytes]] = {}
        self.webhooks: list[dict[str, Any]] = []
        self._queue: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self.authority = f"127.0.0.1:{self._server.server_port}"
        self.address = f"http://{self.authority}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        """Queue a prediction."""
        name = secrets.token_hex(13)
        urls = {
            "get": f"{self.address}/v1/predictions/{name}",
            "cancel": f"{self.address}/v1/predictions/{name}/cancel",
        }
        self.predictions[name] = {
            "id": name, "model": "owner/flux", "version": "hidden", "status": "starting", "input": body["input"],
            "output": None, "error": None, "logs": "", "metrics": {}, "urls": urls, "source": "api",
            "created_at": "2026-01-01T00:00:00Z", "started_at": None, "completed_at": None,
        }  # fmt: skip
        self._queue.put((name, body))
        return self.predictions[name]

    def wait(self, name: str, seconds: float) -> dict[str, Any]:
        """The prediction when it has ended, or after this time."""
        deadline = time.monotonic() + seconds
        while self.predictions[name]["status"] not in FINAL and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.predictions[name]

    def cancel(self, name: str) -> dict[str, Any]:
        """Cancel a prediction, whether it waits or runs."""
        if self.predictions[name]["status"] == "starting":
            self.predictions[name]["status"] = "canceled"
        else:
            self._ask("POST", f"/predictions/{name}/cancel", {})
        return self.predictions[name]

    def _work(self) -> None:
        while True:
            name, body = self._queue.get()
            prediction = self.predictions[name]
            if prediction["status"] == "canceled":
                continue
            prediction["status"] = "processing"
            passed_on = {key: body[key] for key in ("input", "webhook", "webhook_events_filter") if key in body}
            answer = self._ask("PUT", f"/predictions/{name}", passed_on)
            known = ("output", "error", "logs", "metrics", "status")
            prediction.update({key: answer[key] for key in known if key in answer})

    def _ask(self, method: str, path: str, body: object) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.cog + path, data, {"Content-Type": "application/json"}, method=method)
        while True:
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != 409:
                    return {"status": "failed", "error": error.read().decode()}
                time.sleep(0.1)


def handler_of(api: ReplicateApi) -> type[BaseHTTPRequestHandler]:
    """The routes."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, body: object) -> None:
            self.send(status, "application/json", json.dumps(body).encode())

        def send(self, status: int, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            if match := re.fullmatch(r"/v1/predictions/(\w+)", self.path):
                self.reply(200, api.predictions[match[1]])
            elif match := re.fullmatch(r"/files/(\w+)(?:\.safetensors)?", self.path):
                self.send(200, *api.files[match[1]])
            else:
                self.reply(404, {"detail": f"no such thing: {self.path}"})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path == "/webhook":
                api.webhooks.append(json.loads(content))
                self.reply(200, {})
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.reply(401, {"detail": "Unauthenticated"})
            elif self.path == "/v1/models/owner/flux/predictions":
                prediction = api.create(json.loads(content))
                prefer = self.headers.get("Prefer", "")
                self.reply(201, api.wait(prediction["id"], 60) if prefer.startswith("wait") else prediction)
            elif match := re.fullmatch(r"/v1/predictions/(\w+)/cancel", self.path):
                self.reply(200, api.cancel(match[1]))
            elif self.path == "/v1/files":
                self.reply(201, self.stored(content))
            else:
                self.reply(404, {"detail": f"no such thing: {self.path}"})

        def stored(self, content: bytes) -> dict[str, Any]:
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parts: Any = BytesParser().parsebytes(head + content).get_payload()
            part = next(p for p in parts if p.get_param("name", header="content-disposition") == "content")
            data, name = part.get_payload(decode=True), secrets.token_hex(8)
            api.files[name] = (part.get_content_type(), data)
            return {
                "id": name, "name": part.get_filename() or name, "content_type": part.get_content_type(),
                "size": len(data), "etag": name, "checksums": {}, "metadata": {}, "created_at": "2026-01-01T00:00:00Z",
                "expires_at": None, "urls": {"get": f"{api.address}/files/{name}"},
            }  # fmt: skip

        def log_message(self, *_: object) -> None: ...

    return Handler
