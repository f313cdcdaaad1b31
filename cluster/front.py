"""The Cog API in front of the replicas: admission, ids, repetition, webhooks. Clients see one predictor, queued."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
import uuid
from collections.abc import Mapping
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

import httpx
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException, RequestCancelledError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from cluster.ledger import Entry, Verdict
from cluster.ledger_actor import ledger
from cluster.metrics import ACCEPTED, LORA_FETCHES, REQUESTS, RETRIES, WAITING_SECONDS
from cluster.replica import PLACEHOLDER
from cluster.validation import Prediction, RefusedError, input_schema, read

logger = logging.getLogger("ray.serve")

ATTEMPTS = 3
"""How often a prediction is begun whose replica is lost; one that kills each must end too."""
WEBHOOK_ATTEMPTS = 12
"""Of the last event, with pauses of 0.1 s, doubled up to 30 s, as Cog does."""
LEDGER_SECONDS = 10.0
"""How long a front waits for a ledger that is being started anew."""


@dataclass
class Running:
    """A prediction that this front answers for."""

    prediction: Prediction
    entry: Entry
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[tuple[int, bytes]] | None = None


class Front:
    """Answers for the predictions that it accepted; see `ledger` for what happens to them when it dies."""

    def __init__(self, replicas: Any) -> None:  # noqa: ANN401 - a deployment handle
        """Take the handle of the replicas."""
        self._replicas = replicas
        self._name = uuid.uuid4().hex
        self._running: dict[str, Running] = {}
        self._ledger = ledger()
        self._inputs: Mapping[str, Any] | None = None
        self._webhooks = httpx.AsyncClient(timeout=10)
        self._listening: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[Any]] = set()

    def __serve_build_asgi_app__(self) -> Starlette:
        """The ASGI application, for `serve.ingress()`."""
        routes = [
            Route("/predictions", self._predict, methods=["POST"]),
            # An id may hold slashes, which clients escape and Starlette gives as they are.
            Route("/predictions/{id:path}", self._predict, methods=["PUT"]),
            Route("/predictions/{id:path}/cancel", self._cancel, methods=["POST"]),
            Route("/health-check", self._health, methods=["GET"]),
            Route("/openapi.json", self._openapi, methods=["GET"]),
            Route("/", self._index, methods=["GET"]),
        ]
        return Starlette(routes=routes)

    # Requests

    async def _predict(self, request: Request) -> Response:
        asynchronous = "respond-async" in request.headers.get("prefer", "")
        new_id = f"pred_{uuid.uuid4().hex[:16]}"
        try:
            content = await request.body()
            prediction = read(content, request.path_params.get("id"), new_id, await self._schema())
        except RefusedError as refused:
            REQUESTS.inc(tags={"outcome": "refused"})
            return Response(refused.content, refused.status, media_type=refused.media_type)
        running = Running(prediction, Entry(prediction.id, self._name, _kept(prediction) if asynchronous else None))
        verdict = await self._ask("accept", running.entry)
        if verdict.outcome == "known":
            return JSONResponse({"id": prediction.id, "status": "processing"}, 202)
        if verdict.outcome != "accepted":
            return _unavailable(verdict)
        task = self._begin(running)
        if asynchronous:
            return JSONResponse({"id": prediction.id, "status": "starting"}, 202)
        return await self._answer_of(running, task, request)

    async def _answer_of(self, running: Running, task: asyncio.Task[tuple[int, bytes]], request: Request) -> Response:
        """The answer to a synchronous request; when its client is gone, the prediction is cancelled."""
        watching = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait([task, watching], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                running.cancelled.set()
            status, content = await asyncio.shield(task)
            return Response(content, status, media_type="application/json")
        except asyncio.CancelledError:
            running.cancelled.set()
            raise
        finally:
            watching.cancel()

    async def _cancel(self, request: Request) -> Response:
        id = request.path_params["id"]
        running = self._running.get(id)
        if running is not None:
            running.cancelled.set()
        known = running is not None or await self._ask("cancel", id)
        return JSONResponse({}, 200 if known else 404)

    async def _health(self, request: Request) -> Response:
        health, state = await self._ask("health")
        if not health:
            return JSONResponse({"status": "STARTING"})
        ACCEPTED.set(state["accepted"])
        status = "DEFUNCT" if state["closed"] else "BUSY" if state["accepted"] >= state["bound"] else "READY"
        return JSONResponse({**health, "status": status, "queue": state})

    async def _openapi(self, request: Request) -> Response:
        facts = await self._ask("replica")
        return JSONResponse(facts["openapi"]) if facts else PlainTextResponse("no replica is ready yet", 503)

    async def _index(self, request: Request) -> Response:
        facts = await self._ask("replica")
        return JSONResponse(facts["index"]) if facts else PlainTextResponse("no replica is ready yet", 503)

    async def _schema(self) -> Mapping[str, Any] | None:
        if self._inputs is None and (facts := await self._ask("replica")):
            self._inputs = input_schema(facts["openapi"])
        return self._inputs

    # Predictions

    def _begin(self, running: Running) -> asyncio.Task[tuple[int, bytes]]:
        self._running[running.prediction.id] = running
        # In a context of its own: with a request, Serve cancels all that was begun in the request's context.
        running.task = asyncio.create_task(self._run(running), context=Context())
        return running.task

    async def _run(self, running: Running) -> tuple[int, bytes]:
        """Run it, repeat it where its replica is lost, deliver the last webhook, and forget it.

        The ledger keeps a result only where another front may have to deliver it; else it is told once, at the end.
        """
        started, prediction = time.monotonic(), running.prediction
        status, content = 200, running.entry.answer
        delivers = prediction.webhook is not None and "completed" in prediction.events
        if content is None:
            status, content = await self._result(running)
            if delivers:
                await self._ask("answered", prediction.id, content)
        seconds = time.monotonic() - started
        WAITING_SECONDS.observe(seconds)
        _count(content)
        if delivers:
            delivery = asyncio.ensure_future(self._deliver(running, content, seconds))
            self._background.add(delivery)
            delivery.add_done_callback(self._background.discard)
        else:
            await self._forget(running, seconds)
        return status, content

    async def _deliver(self, running: Running, content: bytes, seconds: float) -> None:
        prediction, pause = running.prediction, 0.1
        webhook, event = str(prediction.webhook), _with_input(content, prediction)
        for _ in range(WEBHOOK_ATTEMPTS):
            try:
                headers = {"Content-Type": "application/json"}
                answer = await self._webhooks.post(webhook, content=event, headers=headers)
                if answer.status_code < 400 or answer.status_code in (400, 404, 405, 410):
                    break
            except (httpx.HTTPError, httpx.InvalidURL):
                pass
            await asyncio.sleep(pause)
            pause = min(2 * pause, 30.0)
        await self._forget(running, seconds)

    async def _forget(self, running: Running, seconds: float) -> None:
        self._running.pop(running.prediction.id, None)
        await self._ask("finished", running.prediction.id, self._name, seconds)

    async def _result(self, running: Running) -> tuple[int, bytes]:
        prediction = running.prediction
        wants_events = prediction.webhook is not None and any(event != "completed" for event in prediction.events)
        body = prediction.body(PLACEHOLDER.decode() if wants_events else None)
        for _ in range(ATTEMPTS):
            handle = self._replicas.options(multiplexed_model_id=prediction.key)
            response = handle.predict.remote(prediction.id, body, prediction.webhook, wants_events)
            try:
                return await self._unless_cancelled(running, response)
            except RayActorError:
                RETRIES.inc()
                logger.warning("prediction %s: its replica was lost, so it is begun again", prediction.id)
            except RequestCancelledError:
                return 200, _document(running, "canceled")
            except (RayError, RayServeException) as error:
                logger.exception("prediction %s", prediction.id)
                return 200, _document(running, "failed", f"The fleet could not run it: {type(error).__name__}.")
            if running.cancelled.is_set():
                break
        if running.cancelled.is_set():
            return 200, _document(running, "canceled")
        return 200, _document(running, "failed", f"{ATTEMPTS} replicas were lost while they ran this prediction.")

    async def _unless_cancelled(self, running: Running, response: Any) -> tuple[int, bytes]:  # noqa: ANN401
        result = asyncio.ensure_future(_awaited(response))
        cancelled = asyncio.ensure_future(running.cancelled.wait())
        try:
            await asyncio.wait([result, cancelled], return_when=asyncio.FIRST_COMPLETED)
            if result.done() and not result.cancelled():
                return result.result()
            running.cancelled.set()
            response.cancel()
            result.add_done_callback(lambda done: done.cancelled() or done.exception())
            return 200, _document(running, "canceled")
        finally:
            cancelled.cancel()

    # The ledger

    async def _ask(self, method: str, *arguments: Any) -> Any:  # noqa: ANN401
        """Ask the ledger; while it is being started anew, ask again."""
        deadline = time.monotonic() + LEDGER_SECONDS
        while True:
            try:
                return await getattr(self._ledger, method).remote(*arguments)
            except RayActorError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)

    def _start_listening(self) -> None:
        if self._listening is None or self._listening.done():
            self._listening = asyncio.ensure_future(self._listen())

    async def _listen(self) -> None:
        """Hear of cancellations and of predictions to take over, and tell the ledger that this front lives."""
        while True:
            try:
                news = await self._ledger.listen.remote(self._name, list(self._running))
            except RayError:
                await asyncio.sleep(0.2)
                continue
            if news is None:
                await self._ask("register", [running.entry for running in self._running.values()])
                continue
            for id in news.cancelled:
                if id in self._running:
                    self._running[id].cancelled.set()
            for entry in news.adopted:
                logger.warning("prediction %s: taken over from a front that is gone", entry.id)
                self._begin(Running(_restored(entry), entry))

    async def check_health(self) -> None:
        """Serve calls it every second, and so from the start on."""
        self._start_listening()

    async def __del__(self) -> None:
        """Serve calls it when it stops the front: wait until nothing is left to answer for."""
        while self._running:
            await asyncio.sleep(0.1)


def _kept(prediction: Prediction) -> dict[str, Any]:
    return {"input": prediction.input, "webhook": prediction.webhook, "events": prediction.events}


def _restored(entry: Entry) -> Prediction:
    kept = entry.request or {}
    return Prediction(entry.id, kept["input"], kept["webhook"], tuple(kept["events"]))


def _unavailable(verdict: Verdict) -> Response:
    REQUESTS.inc(tags={"outcome": "unavailable"})
    if verdict.outcome == "closed":
        error = "The fleet is ending. Ask again when it is back."
        return JSONResponse({"error": error, "status": "failed"}, 503, {"Retry-After": "10"})
    seconds = max(1, math.ceil(verdict.mean_seconds))
    error = f"All {verdict.bound} places are taken. Ask again in {seconds} s."
    return JSONResponse({"error": error, "status": "failed"}, 503, {"Retry-After": str(seconds)})


def _document(running: Running, status: str, error: str | None = None) -> bytes:
    prediction, told = running.prediction, {"error": error} if error else {}
    document = {"id": prediction.id, "input": dict(prediction.input), "logs": "", **told, "status": status}
    return json.dumps(document, separators=(",", ":")).encode()


def _with_input(content: bytes, prediction: Prediction) -> bytes:
    """The answer as an event, which also holds the inputs, as Cog's do."""
    if b'"input":' in content[:4096] or not content.startswith(b"{"):
        return content
    return b'{"input":' + json.dumps(prediction.input, separators=(",", ":")).encode() + b"," + content[1:]


def _count(content: bytes) -> None:
    """Count the outcome, and what the answer's metrics say of LoRAs."""
    try:
        document = json.loads(content)
    except ValueError:
        document = {}
    REQUESTS.inc(tags={"outcome": str(document.get("status", "refused"))})
    for lora in (document.get("metrics") or {}).get("loras") or ():
        LORA_FETCHES.inc(tags={"outcome": str(lora.get("cache"))})


async def _awaited(response: Any) -> tuple[int, bytes]:  # noqa: ANN401
    answer: tuple[int, bytes] = await response
    return answer


async def _disconnected(request: Request) -> None:
    """Return when the client is gone. Starlette's `is_disconnected` does not wait, so it never hears it from Serve."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
