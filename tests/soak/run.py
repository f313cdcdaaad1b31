"""The soak's run: goldens from a server of its own, then requests in a random order until the time is up."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.serve import start_server, stop_server, wait_until_ready
from tests.cli.test_serve import Client, free_port
from tests.faults import FAULT_FILE, MARK
from tests.services import Storage
from tests.soak import plan
from tests.soak.plan import Cancelled, Faulty, Good, Hopeless, Step
from tests.soak.probe import Probe
from tests.test_faults import children, resident_bytes

PLAIN, FAULTY = "predict.py:Predictor", "tests/faults.py:FaultyPredictor"
START_SECONDS = 300
Goldens = list[str]
"""A digest of the output of each good request."""


@dataclass
class Tally:
    """What came of all requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """`good`, `good failed`, `wrong image`, `fault`, `fault not reached`, `refused`, `not refused`, `cancelled`, ..."""
    kinds: Counter[str] = field(default_factory=Counter)
    """How often each fault was injected at each stage."""
    complaints: list[str] = field(default_factory=list)
    cancel_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each good request."""
    sent: int = 0
    """Requests that reached the predictor."""
    counted: float = 0
    """What the server's metrics say."""

    @property
    def good(self) -> int:
        """How many good requests were sent."""
        return sum(self.outcomes[name] for name in ("good", "good failed", "wrong image"))

    @property
    def passed(self) -> bool:
        """Whether no image was wrong, nothing bad was served, and 99.9 % of the good requests succeeded."""
        bad = self.outcomes["wrong image"] + self.outcomes["not refused"] + self.outcomes["fault wrong"]
        return not bad and self.outcomes["good"] >= 0.999 * self.good


@dataclass
class Server:
    """A running server, and where it keeps its files."""

    client: Client
    process: int
    worker: int
    folder: Path
    metrics_port: int

    def arm(self, stage: str, fault: str) -> None:
        written = self.folder / "fault.new"
        written.write_text(json.dumps({"stage": stage, "fault": fault}))
        written.replace(self.folder / "fault.json")

    def disarm(self) -> None:
        (self.folder / "fault.json").unlink(missing_ok=True)

    def ended(self) -> float:
        """How many predictions ended, by its metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("flux_predictions_total{"))


@contextmanager
def serving(storage: Storage, predictor: str, folder: Path) -> Iterator[Server]:
    """Cog's server with a cache for eight LoRAs and a temporary folder of its own."""
    port, metrics_port = free_port(), free_port()
    (folder / "tmp").mkdir()
    given = {
        "FLUX_CACHE_DIR": str(folder / "cache"),
        "FLUX_CACHE_MIN_FREE_GB": "0",
        "FLUX_CACHE_MAX_GB": f"{plan.cache_gigabytes(storage):.9f}",
        "FLUX_TRUSTED_HOSTS": storage.authority,
        "FLUX_METADATA": "mark",
        "FLUX_METRICS_PORT": f"127.0.0.1:{metrics_port}",
        FAULT_FILE: str(folder / "fault.json"),
    }
    os.environ.update(given)
    with (folder / "server.log").open("w") as log:
        server = start_server("127.0.0.1", port, predictor=predictor, temporary=folder / "tmp", output=log.fileno())
        try:
            status = wait_until_ready(server, "127.0.0.1", port, START_SECONDS)
            if status != "READY":
                raise RuntimeError(f"the server is {status}")
            worker = max(children(server.pid), key=resident_bytes)
            yield Server(Client(f"http://127.0.0.1:{port}"), server.pid, worker, folder, metrics_port)
        finally:
            stop_server(server, 20)


def digest(answer: Any) -> str:
    """The digest of an answer's images; an error's text where it has none."""
    if answer["status"] != "succeeded":
        return f"{answer['status']}: {answer['error']}"
    return hashlib.sha256(json.dumps(answer["output"]).encode()).hexdigest()


class Soak:
    """Sends requests and judges the answers."""

    def __init__(self, server: Server, table: list[dict[str, Any]], goldens: Goldens) -> None:
        self._server = server
        self._table = table
        self._goldens = goldens
        self._count = 0
        self.tally = Tally()

    def take(self, step: Step) -> None:
        """Send one request and count what came of it."""
        self._count += 1
        match step:
            case Good(number):
                self._good(number)
            case Faulty(number, stage, fault):
                self._faulty(number, stage, fault)
            case Hopeless(inputs):
                answer = self._predict(inputs)
                self._note("refused" if answer["status"] == "failed" else "not refused", inputs, answer)
            case Cancelled(number, after_seconds):
                self._cancelled(number, after_seconds)

    def _predict(self, inputs: dict[str, Any]) -> Any:
        while True:  # the slot is free a moment after the answer before
            status, answer = self._server.client.call("POST", "/predictions", {"input": inputs})
            if status != 409:
                break
            time.sleep(0.02)
        assert status == 200, answer
        self.tally.sent += 1
        return answer

    def _good(self, number: int) -> None:
        started = time.monotonic()
        answer = self._predict(self._table[number])
        self.tally.seconds.append(time.monotonic() - started)
        outcome = "good" if digest(answer) == self._goldens[number] else "wrong image"
        self._note("good failed" if answer["status"] != "succeeded" else outcome, number, answer)

    def _faulty(self, number: int, stage: str, fault: str) -> None:
        inputs = dict(self._table[number])
        if stage in plan.NEED_A_FETCH and "replicate_weights" in inputs:
            inputs["replicate_weights"] += f"?{self._count}"  # known to no cache
        if stage == "encode the prompt":
            inputs["prompt"] += f", number {self._count}"
        self._server.arm(stage, fault)
        try:
            answer = self._predict(inputs)
        finally:
            self._server.disarm()
        self.tally.kinds[f"{fault} / {stage}"] += 1
        if answer["status"] == "failed":
            self._note("fault" if MARK in answer["error"] else "fault in other words", stage, answer)
        else:
            golden = digest(answer) == self._goldens[number]
            self._note("fault not reached" if golden else "fault wrong", f"{number} {stage} {fault}", answer)

    def _cancelled(self, number: int, after_seconds: float) -> None:
        client, name = self._server.client, f"soak-{self._count}"
        inputs = {**self._table[number], "num_outputs": 4}
        client.wait_for_slot()
        status, answer = client.call("PUT", f"/predictions/{name}", {"input": inputs}, Prefer="respond-async")
        assert status == 202, answer
        self.tally.sent += 1
        time.sleep(after_seconds)
        cancelled = time.monotonic()
        status, _ = client.call("POST", f"/predictions/{name}/cancel")
        client.wait_for_slot()
        self.tally.cancel_seconds.append(time.monotonic() - cancelled)
        self._note("cancelled" if status == 200 else "cancelled too late", name, {"error": None})

    def _note(self, outcome: str, what: object, answer: Any) -> None:
        self.tally.outcomes[outcome] += 1
        if outcome in ("wrong image", "good failed", "not refused", "fault wrong"):
            self.tally.complaints.append(f"{self._count} {outcome}: {what}: {answer.get('error')}"[:500])


def soak(minutes: float, seed: int, say: Callable[[str], None]) -> tuple[Tally, Probe]:
    """Run it and return what came of it, and what was sampled meanwhile."""
    with Storage("127.0.0.1") as storage, tempfile.TemporaryDirectory(prefix="soak-") as folder:
        table = plan.good_inputs(plan.publish(storage))
        (Path(folder) / "first").mkdir()
        (Path(folder) / "second").mkdir()
        with serving(storage, PLAIN, Path(folder) / "first") as server:
            golden = Soak(server, table, [""] * len(table))
            goldens = [digest(golden._predict(inputs)) for inputs in table]
        failed = [text for text in goldens if " " in text]
        if failed or len(set(goldens)) != len(table):
            raise RuntimeError(f"the goldens are no goldens: {failed or 'two are equal'}")
        hopeless = plan.hopeless_inputs(storage)
        with serving(storage, FAULTY, Path(folder) / "second") as server:
            say(f"goldens of {len(table)} requests are made; soaking for {minutes:g} minutes")
            run = Soak(server, table, goldens)
            temporary, cache = server.folder / "tmp", server.folder / "cache"
            probe = Probe(server.process, server.worker, temporary, cache)
            probe.start()
            end, said = time.monotonic() + 60 * minutes, time.monotonic()
            told = 0
            order = plan.steps(random.Random(seed), len(table), hopeless)
            while time.monotonic() < end:
                run.take(next(order))
                storage.requests.clear()
                for complaint in run.tally.complaints[told:]:
                    say(complaint)
                told = len(run.tally.complaints)
                if time.monotonic() - said > 60:
                    said = time.monotonic()
                    say(f"{(end - said) / 60:.0f} minutes left: {dict(run.tally.outcomes)}")
            probe.stop()
            server.client.wait_for_slot()
            run.tally.counted = server.ended()
            return run.tally, probe
