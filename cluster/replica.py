"""A replica: one GPU, one seat, one child that is the project's own server. One prediction at a time.

It is not repaired: when its child dies, it ends itself, Serve starts another one, and fronts repeat what it ran. A
prediction that has not ended at the limit is not repeated: it ends with an error, and its child with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import httpx
import ray
import uvicorn
from ray import serve
from ray.exceptions import RayError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.child import Child, free_port, prediction_path
from cluster.ledger_actor import ledger
from cluster.metrics import PREDICTION_SECONDS, REPLICAS_LOST, STUCK

logger = logging.getLogger("ray.serve")

READY = ("READY", "BUSY")
SLOT_SECONDS = 10.0
"""Cog's server answers 409 for a moment after it has answered; longer means that something else uses it."""
START_SECONDS = 3600.0
"""Loading 57 GB from a network disk takes minutes, fetching them longer."""
LIMIT_SECONDS = 900.0
"""How long a prediction may take on a replica. Four images of 50 steps take minutes, compiling and fetching too."""
CANCEL_SECONDS = 10.0
"""How long the child's server may take to answer a cancellation."""


class Replica:
    """The deployment's class; Serve makes one a replica."""

    def __init__(self, threads: int | None = None, limit_seconds: float = LIMIT_SECONDS) -> None:
        """Start the child and wait until it is ready; an exception lets Serve try again.

        Args:
            threads: as for `Child`.
            limit_seconds: how long a prediction may take here, waiting in the queue not counted.
        """
        self._limit_seconds = limit_seconds
        self._seat = str(serve.get_replica_context().rank.rank)
        _end_with_parent()
        self._child = Child(f"seat-{self._seat}", threads)
        self._client = httpx.AsyncClient(base_url=self._child.address, timeout=httpx.Timeout(None, connect=10))
        self._facts = self._wait_until_ready()
        ray.get(ledger().replica_is_ready.remote(self._facts))
        self._events = EventRelay()

    def record_replica_metadata(self) -> dict[str, str]:
        """For the router: the seat, which the replica's successor takes over."""
        return {"seat": f"seat-{self._seat}"}

    def _wait_until_ready(self) -> dict[str, Any]:
        deadline = time.monotonic() + START_SECONDS
        with httpx.Client(base_url=self._child.address, timeout=12) as client:
            while time.monotonic() < deadline:
                if not self._child.alive:
                    raise RuntimeError("the predictor did not get ready; its log says why")
                try:
                    health = client.get("/health-check").json()
                except (httpx.HTTPError, ValueError):
                    health = {}
                if health.get("status") in READY:
                    return {
                        "health": health,
                        "openapi": client.get("/openapi.json").json(),
                        "index": client.get("/").json(),
                    }
                time.sleep(0.3)
        raise RuntimeError(f"the predictor did not get ready within {START_SECONDS:.0f} s")

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises. A ledger that was started anew is told what it forgot."""
        if not self._child.alive:
            raise RuntimeError("the predictor has ended")
        with suppress(RayError, ValueError):  # it is being started
            if not await ledger().knows_a_replica.remote():
                await ledger().replica_is_ready.remote(self._facts)

    async def predict(self, id: str, body: bytes, webhook: str | None, wants_events: bool) -> tuple[int, bytes]:
        """Run one prediction on the child and return its answer: status and JSON.

        Args:
            id: the prediction's.
            body: made with `Prediction.body(webhook)`: the child sends its events to this replica.
            webhook: where the client wants its events; only those before the end are passed on here.
            wants_events: whether it wants any of them.
        """
        started = time.monotonic()
        deadline = started + self._limit_seconds
        if wants_events and webhook:
            body = await self._events.prepare(id, webhook, body)
        running = asyncio.ensure_future(self._put(id, body))
        try:
            await asyncio.wait([running], timeout=self._limit_seconds)
            if not running.done():
                await self._give_up(id, running)
                return 200, too_long(id, self._limit_seconds)
            status, answer = running.result()
        except asyncio.CancelledError:
            await self._cancel(id, running, deadline)
            raise
        finally:
            await self._events.done(id)
        PREDICTION_SECONDS.observe(time.monotonic() - started)
        return status, answer

    async def _put(self, id: str, body: bytes) -> tuple[int, bytes]:
        deadline = time.monotonic() + SLOT_SECONDS
        while True:
            try:
                answer = await self._client.put(
                    prediction_path(id), content=body, headers={"Content-Type": "application/json"}
                )
            except httpx.HTTPError as error:
                self._end(f"the predictor broke off: {type(error).__name__}")
            if answer.status_code != 409 or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.05)
        if (answer.status_code >= 409 and answer.status_code != 422) or b'"status":"failed"' in answer.content[-200:]:
            await self._require_healthy()
        return answer.status_code, answer.content

    async def _require_healthy(self) -> None:
        """A dead worker's prediction is answered with "failed": the replica ends, and the front repeats it."""
        try:
            health = (await self._client.get("/health-check", timeout=30)).json()
        except (httpx.HTTPError, ValueError):
            health = {}
        if health.get("status") not in READY:
            self._end(f"the predictor is {health.get('status', 'silent')}")

    def _end(self, why: str) -> None:
        """End this process: whoever waits for it sees that its actor died."""
        logger.error("replica %s ends: %s", self._seat, why)
        REPLICAS_LOST.inc()
        self._child.end()
        os._exit(1)

    async def _cancel(self, id: str, running: asyncio.Future[tuple[int, bytes]], deadline: float) -> None:
        """Cancel by id, again until the child has answered: Cog loses a cancellation that comes too early."""
        while not running.done():
            if time.monotonic() > deadline:
                await self._give_up(id, running)
                return
            try:
                await self._client.post(f"{prediction_path(id)}/cancel", timeout=CANCEL_SECONDS)
            except httpx.TimeoutException:
                continue
            except httpx.HTTPError:
                return
            await asyncio.wait([running], timeout=0.5)

    async def _give_up(self, id: str, running: asyncio.Future[tuple[int, bytes]]) -> None:
        """End the child, which runs a prediction that does not end; the next look at its health ends this replica."""
        logger.error("prediction %s: no end within %.0f s, so its predictor is ended", id, self._limit_seconds)
        STUCK.inc()
        running.cancel()
        await asyncio.to_thread(self._child.end)


def too_long(id: str, limit_seconds: float) -> bytes:
    """The answer to a prediction that was ended at the limit."""
    error = (
        f"The prediction did not end within {limit_seconds:g} s, the fleet's limit, and was stopped with its predictor."
        " Ask for fewer steps or outputs, or let the operator raise --limit."
    )
    document = {"id": id, "logs": "", "error": error, "status": "failed"}
    return json.dumps(document, separators=(",", ":")).encode()


class EventRelay:
    """Passes the child's events on to clients, in order and all but the last one, which the front sends."""

    def __init__(self) -> None:
        self._targets: dict[str, str] = {}
        self._queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._port: int | None = None
        self._client = httpx.AsyncClient(timeout=5)

    async def prepare(self, id: str, webhook: str, body: bytes) -> bytes:
        """Return the body with the child's events directed to this relay."""
        if self._port is None:
            await self._start()
        self._targets[id] = webhook
        address = f"http://127.0.0.1:{self._port}/of-{quote(id, safe='')}"  # no segment that clients take for ".."
        before, _, after = body.rpartition(PLACEHOLDER)  # the last one: inputs come first and may hold it
        return before + address.encode() + after

    async def done(self, id: str) -> None:
        """Pass the rest on."""
        if self._targets.pop(id, None) is not None:
            await self._queue.join()

    async def _start(self) -> None:
        self._port = free_port()
        app = Starlette(routes=[Route("/of-{id:path}", self._receive, methods=["POST"])])
        config = uvicorn.Config(app, host="127.0.0.1", port=self._port, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        self._tasks = [asyncio.ensure_future(server.serve()), asyncio.ensure_future(self._pass_on())]
        while not server.started:
            await asyncio.sleep(0.01)

    async def _receive(self, request: Request) -> Response:
        content = await request.body()
        target = self._targets.get(request.path_params["id"])
        if target is not None and not _is_terminal(content):
            self._queue.put_nowait((target, content))
        return Response()

    async def _pass_on(self) -> None:
        while True:
            target, content = await self._queue.get()
            with suppress(httpx.HTTPError, httpx.InvalidURL):  # events before the last one are sent once
                await self._client.post(target, content=content, headers={"Content-Type": "application/json"})
            self._queue.task_done()


PLACEHOLDER = b"http://relay.invalid/"
"""The child's webhook in a body, before the relay's address is known."""


def _is_terminal(content: bytes) -> bool:
    return any(f'"status":"{status}"'.encode() in content for status in ("succeeded", "failed", "canceled"))


def _end_with_parent() -> None:
    """End this process when Ray's raylet is gone: Ray leaves actors alive that it has lost."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
