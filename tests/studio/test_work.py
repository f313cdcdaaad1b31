"""From a click to images, against Cog's real server; and servers that start, vanish or fail."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from studio.client import Answer, Prediction, Server, StudioError, succeeded
from studio.form import Field, Inputs
from studio.runs import kept
from studio.work import Desk, View, sweep, work
from tests.cli.test_serve import free_port

QUICK = {
    "prompt": "a red circle on a white background",
    "model": "schnell",
    "num_inference_steps": 4,
    "megapixels": "0.25",
}
LONG = {**QUICK, "num_inference_steps": 50, "num_outputs": 4, "megapixels": "1"}


def done(desk: Desk, *jobs: Inputs) -> list[View]:
    return list(work(desk, jobs, lambda prediction: True))


def test_a_run_tells_its_steps_and_is_kept(desk: Desk) -> None:
    views = done(desk, {**QUICK, "model": "dev", "num_inference_steps": 12, "seed": 7})
    steps = [view.fraction for view in views if view.fraction is not None]
    assert steps == sorted(steps)
    assert any(0 < step < 1 for step in steps), [view.message for view in views]
    assert views[-1].state == "done"
    assert "seed 7" in views[-1].message
    assert "Using seed: 7" in views[-1].log
    (run,) = views[-1].runs
    assert kept(desk.root) == [run]


def test_the_seed_that_was_drawn_is_kept_and_a_sweep_shares_it(desk: Desk) -> None:
    field = next(field for field in desk.fields if field.name == "num_inference_steps")
    views = done(desk, *sweep(QUICK, field, [1, 2]))
    first, second = views[-1].runs
    assert first.inputs["seed"] == second.inputs["seed"]
    assert [run.inputs["num_inference_steps"] for run in (first, second)] == [1, 2]
    assert any(view.message.startswith("2 of 2: ") for view in views)


@pytest.mark.parametrize("values", [[], list(range(17))])
def test_a_sweep_is_bounded(values: list[int]) -> None:
    with pytest.raises(StudioError, match="1 to 16 values"):
        sweep({}, Field("seed", "integer", "seed", "", False), values)


def test_refused_inputs_are_named(desk: Desk) -> None:
    view = done(desk, {**QUICK, "num_inference_steps": 99, "seed": "seven"})[-1]
    assert view.state == "error"
    assert set(view.refused) == {"num_inference_steps", "seed"}
    assert "num inference steps: 99 is greater than the maximum of 50" in view.message


def test_a_failure_is_said_without_prefixes(desk: Desk) -> None:
    view = done(desk, {**QUICK, "replicate_weights": "nonsense"})[-1]
    assert view.state == "error"
    assert view.message.startswith('Cannot read LoRA "nonsense"')


def test_a_busy_server_is_said(desk: Desk) -> None:
    holding = Prediction(desk.server, LONG)
    events = holding.events()
    threading.Thread(target=lambda: list(events), daemon=True).start()
    while desk.server.health().get("status") != "BUSY":
        time.sleep(0.05)
    assert "busy with another prediction" in done(desk, QUICK)[-1].message
    holding.cancel()


@pytest.mark.parametrize("route", [True, False])
def test_a_cancel_frees_the_slot_within_two_seconds(desk: Desk, route: bool) -> None:
    """By Cog's own route; and by dropping the connection, where the server does not know the id yet."""
    started: list[Prediction] = []
    cancelled_at = 0.0
    for view in work(desk, [LONG], lambda prediction: not started.append(prediction)):  # type: ignore[func-returns-value]
        if view.fraction and not cancelled_at:
            cancelled_at = time.monotonic()
            if not route:
                started[0].id = "unknown"
            started[0].cancel()
    assert (view.message, view.state) == ("Cancelled.", "warning")
    while desk.server.health().get("status") != "READY":
        time.sleep(0.02)
    assert time.monotonic() - cancelled_at < 3
    assert kept(desk.root) == []


def test_without_a_webhook_the_result_arrives(desk: Desk) -> None:
    assert done(replace(desk, webhook=None), QUICK)[-1].state == "done"


def test_the_webhook_takes_only_what_knows_its_path(desk: Desk) -> None:
    heard: list[str] = []
    assert desk.webhook is not None
    address = desk.webhook.listen_for("mine", heard.append)
    base = address.rpartition("/")[0].rpartition("/")[0]
    for url, expected in ((address, 200), (f"{base}/guess/mine", 404), (f"{address}x", 404)):
        request = urllib.request.Request(url, json.dumps({"logs": "1/4 ["}).encode(), method="POST")
        try:
            assert urllib.request.urlopen(request).status == expected
        except urllib.error.HTTPError as error:
            assert error.code == expected
    assert heard == ["1/4 ["]


class JsonHandler(BaseHTTPRequestHandler):
    """Answers with documents, and logs nothing."""

    def answer(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server with this handler."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextmanager
def answering(*answers: tuple[int, dict[str, Any]], health: str = "STARTING") -> Iterator[str]:
    """A server that gives each prediction the next answer; without one it hangs up."""
    left = list(answers)

    class Handler(JsonHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if left:
                self.answer(*left.pop(0))
            else:
                self.connection.close()

        def do_GET(self) -> None:
            self.answer(200, {"status": health, "setup": {"logs": "loading\nSetup failed: no weights."}})

    with serving(Handler) as url:
        yield url


def at(url: str, root: Path) -> Desk:
    return Desk(Server(url), (), root)


def test_a_starting_server_is_waited_for(tmp_path: Path) -> None:
    made = {"status": "succeeded", "output": ["data:image/png;base64,QUJD"], "metrics": {"seed": 3}}
    with answering((503, {}), (503, {}), (200, made)) as url:
        views = done(at(url, tmp_path), {"prompt": "a"})
    assert "loading its models" in views[0].message
    assert views[-1].state == "done"
    assert views[-1].runs[0].images[0].read_bytes() == b"ABC"


@pytest.mark.parametrize(
    ("health", "said"), [("SETUP_FAILED", "setup failed: no weights."), ("DEFUNCT", "has to be started anew")]
)
def test_a_server_that_will_never_answer_is_said(tmp_path: Path, health: str, said: str) -> None:
    with answering((503, {}), health=health) as url:
        assert said in done(at(url, tmp_path), {})[-1].message


@contextmanager
def losing_the_first_cancellation() -> Iterator[tuple[str, list[str]]]:
    """A server whose prediction ends at the second cancellation, since Cog loses one that comes too early."""
    cancels: list[str] = []
    ended = threading.Event()

    class Handler(JsonHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            ended.wait(20)
            self.answer(200, {"status": "canceled" if ended.is_set() else "succeeded", "output": []})

        def do_POST(self) -> None:
            cancels.append(self.path)
            if len(cancels) > 1:
                ended.set()
            self.answer(200, {})

    with serving(Handler) as url:
        yield url, cancels


def test_a_cancellation_is_repeated_until_the_prediction_has_ended() -> None:
    with losing_the_first_cancellation() as (url, cancels):
        prediction = Prediction(Server(url), {"prompt": "a"})
        started = time.monotonic()
        prediction.cancel()
        events = list(prediction.events())
    assert isinstance(events[-1], Answer)
    assert events[-1].document["status"] == "canceled"
    assert len(cancels) == 2
    assert time.monotonic() - started < 10


def test_withheld_images_are_said(tmp_path: Path) -> None:
    made = {"status": "succeeded", "output": ["data:image/png;base64,QUJD"], "metrics": {"safety_withheld": 2}}
    with answering((200, made)) as url:
        view = done(at(url, tmp_path), {})[-1]
    assert (view.state, "withheld 2 more" in view.message) == ("warning", True)


def test_a_server_that_hangs_up_is_said(tmp_path: Path) -> None:
    with answering() as url:
        assert "went away" in done(at(url, tmp_path), {})[-1].message


def test_no_server_is_said(tmp_path: Path) -> None:
    message = done(at(f"http://127.0.0.1:{free_port()}", tmp_path), {})[-1].message
    assert message.startswith("No server answers at http://127.0.0.1:")
    assert "script/serve" in message


def test_a_target_must_be_an_address() -> None:
    for url in ("ftp://a", "http://", "http://user@host"):
        with pytest.raises(StudioError, match="Cannot use the target"):
            Server(url)


def test_an_image_is_no_success_without_a_status() -> None:
    from studio.client import Answer

    with pytest.raises(StudioError, match="HTTP 500"):
        succeeded(Answer(500, {}))
