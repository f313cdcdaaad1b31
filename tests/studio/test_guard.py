"""Requests of other origins are refused; what the page sends carries its rules."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from studio.guard import HEADERS, Guard

OWN = "127.0.0.1:7860"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"access-control-allow-origin", b"*"), (b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello"})


def answer(method: str = "GET", kind: str = "http", **headers: str) -> MutableMapping[str, Any]:
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {}

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Guard(hello, 7860)({"type": kind, "method": method, "headers": named}, receive, send))
    return sent[0]


@pytest.mark.parametrize(
    "headers",
    [
        {"host": OWN},
        {"host": "localhost:7860"},
        {"host": OWN, "origin": f"http://{OWN}", "sec_fetch_site": "same-origin"},
        {"host": OWN, "sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"},
    ],
)
def test_the_page_itself_and_a_link_to_it_are_served(headers: dict[str, str]) -> None:
    assert answer(**headers)["status"] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "evil.example:7860"},
        {"host": "127.0.0.1"},
        {"host": OWN, "origin": "http://127.0.0.1:8000"},
        {"host": OWN, "origin": "http://localhost:7860"},
        {"host": OWN, "origin": "null"},
        {"host": OWN, "sec_fetch_site": "same-site"},
        {"host": OWN, "sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"},
        {"host": OWN, "sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "iframe"},
    ],
)
def test_others_are_refused(headers: dict[str, str]) -> None:
    assert answer(**headers)["status"] == 403


def test_a_form_of_another_page_is_refused() -> None:
    opening = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert answer("POST", host=OWN, **opening)["status"] == 403


def test_no_websocket_is_opened() -> None:
    assert answer(kind="websocket", host=OWN)["type"] == "websocket.close"


def test_every_answer_names_the_only_host_and_allows_no_other_origin() -> None:
    headers = dict(answer(host=OWN)["headers"])
    assert {name.encode() for name in HEADERS} <= set(headers)
    assert b"access-control-allow-origin" not in headers
    assert headers[b"content-type"] == b"text/plain"
