"""Who may talk to the page: its own browser tabs and programs on this machine, no page of another origin."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "media-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""The browser itself refuses requests to other hosts. Gradio needs inline scripts and `new Function`."""
HEADERS = {
    "content-security-policy": _POLICY,
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """An ASGI application in front of another: refuses foreign origins and host names, and adds `HEADERS`.

    A name of somebody else's that leads to 127.0.0.1 (DNS rebinding) shows in the Host header; another page, also one
    on another loopback port, shows in Origin and Sec-Fetch-Site. A link from elsewhere may open the page, no more.
    """

    def __init__(self, app: App, port: int) -> None:
        self._app = app
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope.get("headers", ())}
        if scope["type"] != "http" or not self.allows(scope["method"], headers):
            return await _refuse(scope, send)

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                kept = [
                    (name, value)
                    for name, value in message.get("headers", ())
                    if name.decode("latin-1").lower() not in HEADERS and not name.lower().startswith(b"access-control-")
                ]
                message["headers"] = kept + [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        return await self._app(scope, receive, with_headers)

    def allows(self, method: str, headers: MutableMapping[str, str]) -> bool:
        """Whether a request with these headers, in lower case, comes from the page itself or from no page."""
        host = headers.get("host", "")
        if host not in self._hosts:
            return False
        if headers.get("origin", f"http://{host}") != f"http://{host}":
            return False
        opens = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        top = headers.get("sec-fetch-dest") == "document"
        return headers.get("sec-fetch-site", "none") in ("same-origin", "none") or (opens and top)


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})
    text = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 403, "headers": text})
    await send({"type": "http.response.body", "body": b"Refused: this page answers only to itself.\n"})
