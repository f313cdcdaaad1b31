"""`script/fleet` as clients meet it: real Ray, real children, the tiny FLUX; killed at every place, under load.

Slow: Ray and the replicas take half a minute to start on two cores. Run by hand with `-m slow`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.child import prediction_path
from cluster.validation import EVENTS
from tests.cli.test_serve import free_port
from tests.paths import PROJECT

pytestmark = pytest.mark.slow

QUICK: dict[str, Any] = {
    "prompt": "a red circle on a white background",
    "model": "schnell",
    "num_inference_steps": 2,
    "megapixels": "0.25",
    "output_format": "png",
    "seed": 7,
}
LONG: dict[str, Any] = {**QUICK, "num_inference_steps": 50, "num_outputs": 4, "megapixels": "1", "model": "dev"}
READY_SECONDS = 1200
QUEUE = 12


@dataclass
class Webhooks:
    """A receiver that keeps what comes, by prediction."""

    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    server: ThreadingHTTPServer | None = None

    @property
    def address(self) -> str:
        assert self.server is not None
        return f"http://127.0.0.1:{self.server.server_port}/"

    def ended(self, id: str) -> list[dict[str, Any]]:
        return [e for e in self.events.get(id, []) if e["status"] in ("succeeded", "failed", "canceled")]

    def wait(self, ids: list[str], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not all(self.ended(id) for id in ids):
            time.sleep(0.1)
        missing = [id for id in ids if not self.ended(id)]
        assert missing == []


@pytest.fixture(scope="module")
def webhooks() -> Iterator[Webhooks]:
    received = Webhooks()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.events.setdefault(event["id"], []).append(event)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        received.server = server
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield received
        server.shutdown()


@dataclass
class Fleet:
    url: str
    process: subprocess.Popen[str]
    log: Path
    mark: str
    """A variable of its environment."""

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any], Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}{path}", data, {"Content-Type": "application/json", **headers}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=400) as answer:
                return answer.status, dict(answer.headers), json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            content = error.read()
            return error.code, dict(error.headers), json.loads(content) if content[:1] in b"{[" else content

    def predict(self, **given: Any) -> dict[str, Any]:
        status, _, document = self.ask("POST", "/predictions", {"input": {**QUICK, **given}})
        assert status == 200, document
        assert isinstance(document, dict)
        return document

    def begin(self, id: str, webhooks: Webhooks, events: tuple[str, ...] = ("completed",), **given: Any) -> int:
        body = {"input": {**QUICK, **given}, "webhook": webhooks.address, "webhook_events_filter": events}
        return self.ask("PUT", prediction_path(id), body, Prefer="respond-async")[0]

    def accepted(self) -> int:
        return int(self.ask("GET", "/health-check")[2]["queue"]["accepted"])


def start(port: int, log: Path, *options: str) -> Fleet:
    command = [str(PROJECT / "script" / "fleet"), "--port", str(port), *options]
    environment = {**os.environ, "FLUX_CACHE_DIR": str(log.parent / "cache"), "FLUX_CACHE_MIN_FREE_GB": "0"}
    process = subprocess.Popen(
        command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + READY_SECONDS
    while "ready on" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    return Fleet(f"http://127.0.0.1:{port}", process, log, f"FLUX_CACHE_DIR={environment['FLUX_CACHE_DIR']}")


def stop(fleet: Fleet, seconds: float = 120) -> int:
    fleet.process.send_signal(signal.SIGINT)
    try:
        return fleet.process.wait(seconds)
    finally:
        if fleet.process.poll() is None:
            os.killpg(fleet.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    fleet = start(free_port(), folder / "log", "--replicas", "2", "--queue", str(QUEUE))
    yield fleet
    stop(fleet)


@pytest.fixture(scope="module")
def golden(fleet: Fleet) -> Any:
    return fleet.predict()["output"]


def processes() -> dict[int, str]:
    """The command line of each process."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                found[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
    return found


def family_of(fleet: Fleet) -> dict[int, str]:
    """The fleet's processes, known by a variable that they inherit, with their command lines."""
    family = {}
    for pid, command in processes().items():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if fleet.mark.encode() in environment.split(b"\0"):
            family[pid] = command
    return family


def victims(fleet: Fleet, pattern: str) -> list[int]:
    return sorted(pid for pid, command in family_of(fleet).items() if re.search(pattern, command))


def test_answers_are_those_of_one_predictor(fleet: Fleet, golden: Any) -> None:
    document = fleet.predict()
    assert document["status"] == "succeeded"
    assert document["output"] == golden
    assert document["metrics"]["seed"] == 7
    assert re.fullmatch("pred_[0-9a-f]{16}", document["id"])
    assert "Using seed: 7" in document["logs"]
    status, _, refused = fleet.ask("POST", "/predictions", {"input": {**QUICK, "num_outputs": 9}})
    assert status == 422
    assert refused["detail"][0] == {
        "loc": ["body", "input", "num_outputs"], "msg": "9 is greater than the maximum of 4", "type": "value_error"
    }  # fmt: skip
    assert fleet.ask("GET", "/health-check")[2]["status"] == "READY"
    assert "Input" in fleet.ask("GET", "/openapi.json")[2]["components"]["schemas"]
    assert fleet.ask("POST", "/predictions/none/cancel")[0] == 404


def test_beyond_the_bound_clients_are_told_when_to_come_again(fleet: Fleet, webhooks: Webhooks, golden: Any) -> None:
    ids = [f"bound-{number}" for number in range(30)]
    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda id: fleet.begin(id, webhooks), ids))
    accepted = [id for id, status in zip(ids, answers, strict=True) if status == 202]
    assert set(answers) == {202, 503}
    assert 2 + QUEUE <= len(accepted) <= 2 + QUEUE + 4  # some may have ended in between
    webhooks.wait(accepted)
    for id in accepted:
        (event,) = webhooks.ended(id)
        assert (event["status"], event["output"]) == ("succeeded", golden)
    assert not any(webhooks.events.get(id) for id in ids if id not in accepted)


def test_running_and_queued_predictions_are_cancelled(fleet: Fleet, webhooks: Webhooks) -> None:
    ids = [f"cancel-{number}" for number in range(5)]  # two run, three wait
    assert [fleet.begin(id, webhooks, **LONG) for id in ids] == [202] * 5
    time.sleep(3)
    for id in ids:
        started = time.monotonic()
        assert fleet.ask("POST", f"/predictions/{id}/cancel")[0] == 200
        webhooks.wait([id], 10)
        assert time.monotonic() - started < 5
        assert webhooks.ended(id)[0]["status"] == "canceled"
    assert fleet.predict()["status"] == "succeeded"


@pytest.mark.parametrize("id", ["tenant/7", "job?7", "../shutdown?", 'quoted" id'])
def test_any_id_has_all_its_events_and_is_cancelled(fleet: Fleet, webhooks: Webhooks, golden: Any, id: str) -> None:
    assert fleet.begin(id, webhooks, EVENTS) == 202
    webhooks.wait([id])
    first, *_, last = webhooks.events[id]
    assert (first["status"], last["status"], last["output"]) == ("processing", "succeeded", golden)
    other = f"{id} again"
    assert fleet.begin(other, webhooks, **LONG) == 202
    time.sleep(2)
    assert fleet.ask("POST", f"{prediction_path(other)}/cancel")[0] == 200
    webhooks.wait([other], 10)
    assert webhooks.ended(other)[0]["status"] == "canceled"


def test_one_id_runs_once(fleet: Fleet, webhooks: Webhooks) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: fleet.begin("once", webhooks), range(8)))
    assert answers == [202] * 8
    webhooks.wait(["once"])
    time.sleep(2)
    assert len(webhooks.ended("once")) == 1


PLACES = {
    "the worker": "coglet.server._run_worker",
    "the server": "cog.server.http",
    "the guardian": r"-m cluster\.child",
    "the supervisor": r"^\S*/\.venv/bin/python -m cli\.serve",
    "a replica": r"ray::ServeReplica:flux:replica",
    "a front": r"ray::ServeReplica:flux:front",
    "the ledger": r"ray::Ledger",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_under_load_loses_nothing_and_repeats_no_answer(
    fleet: Fleet, webhooks: Webhooks, golden: Any, place: str
) -> None:
    name = re.sub(r"\W+", "-", place)
    ids = [f"{name}-{number}" for number in range(8)]
    assert [fleet.begin(id, webhooks) for id in ids] == [202] * len(ids)
    found = victims(fleet, PLACES[place])
    assert found
    os.kill(found[0], signal.SIGKILL)
    webhooks.wait(ids)
    time.sleep(2)
    for id in ids:
        (event,) = webhooks.ended(id)
        assert (event["status"], event.get("output")) == ("succeeded", golden)
    deadline = time.monotonic() + 120
    while len(victims(fleet, PLACES[place])) < len(found) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(victims(fleet, PLACES[place])) == len(found)
    assert fleet.predict()["output"] == golden


def test_a_client_that_goes_away_frees_its_place(fleet: Fleet) -> None:
    connection = HTTPConnection(fleet.url.removeprefix("http://"), timeout=3)
    connection.request("POST", "/predictions", json.dumps({"input": LONG}), {"Content-Type": "application/json"})
    with pytest.raises(TimeoutError):
        connection.getresponse()
    assert fleet.accepted() == 1
    connection.close()
    deadline = time.monotonic() + 15
    while fleet.accepted() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert fleet.accepted() == 0


def test_one_port_is_open_and_all_else_is_on_loopback_or_named(fleet: Fleet) -> None:
    family = family_of(fleet)
    inodes = {}
    for pid in family:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes[target[8:-1]] = family[pid]
    open_to_all = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            everywhere = set(columns[1].split(":")[0]) == {"0"}
            if columns[3] == "0A" and everywhere and columns[9] in inodes:
                open_to_all.add(re.split(r"[ :]+", inodes[columns[9]])[0].rpartition("/")[2])
    assert open_to_all <= {"gcs_server", "raylet", "python", "python3.11", "ray"}, (
        "docs/scaling.md lists what Ray opens"
    )


def test_ctrl_c_ends_accepted_predictions_first_and_leaves_nothing(
    tmp_path: Path, webhooks: Webhooks, fleet: Fleet, golden: Any
) -> None:
    family = family_of(fleet)
    ids = [f"last-{number}" for number in range(4)]
    assert [fleet.begin(id, webhooks) for id in ids] == [202] * 4
    assert stop(fleet) == 0
    for id in ids:
        (event,) = webhooks.ended(id)
        assert event["output"] == golden
    assert wait_until(lambda: not (set(family) & set(processes())), 20)
    assert "stopped" in fleet.log.read_text()


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    return condition()


def test_nothing_outlives_a_killed_raylet(tmp_path: Path) -> None:
    fleet = start(free_port(), tmp_path / "log", "--replicas", "1", "--fronts", "1")
    family = family_of(fleet)
    (raylet,) = [pid for pid, command in family.items() if "/raylet/raylet" in command.split(" ")[0]]
    os.kill(raylet, signal.SIGKILL)
    children = {
        pid
        for pid, command in family.items()
        if "cli.serve" in command or "cog.server" in command or "coglet" in command
    }
    assert children
    assert wait_until(lambda: not (children & set(processes())), 20)
    fleet.process.kill()
    fleet.process.wait()
