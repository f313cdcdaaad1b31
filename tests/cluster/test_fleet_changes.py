"""What changes while the fleet serves: a predictor that gets stuck, the number of replicas, the version of all of them.

Slow, each with a fleet of its own: minutes on two cores. Run by hand with `-m slow`, one at a time.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_serve import free_port
from tests.cluster.test_fleet import LONG, PLACES, Fleet, Webhooks, start, stop, victims, wait_until, webhooks

pytestmark = pytest.mark.slow
WAIT_SECONDS = 600.0
__all__ = ["webhooks"]  # the fixture


@contextmanager
def fleet_with(folder: Path, *options: str) -> Iterator[Fleet]:
    fleet = start(free_port(), folder / "log", *options)
    try:
        yield fleet
    finally:
        stop(fleet, 300)


@dataclass
class Load:
    """Clients that each send one asynchronous prediction after the other."""

    fleet: Fleet
    webhooks: Webhooks
    name: str
    ids: list[str] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @contextmanager
    def of(self, clients: int) -> Iterator[None]:
        done = threading.Event()
        threads = [threading.Thread(target=self._send, args=(done,)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join()

    def _send(self, done: threading.Event) -> None:
        while not done.is_set():
            id = f"{self.name}-{next(self.numbers)}"
            self.ids.append(id)
            if (status := self.fleet.begin(id, self.webhooks)) != 202:
                self.refused.append(status)
                return
            self.webhooks.wait([id], WAIT_SECONDS)

    def require_one_golden_answer_each(self, golden: Any) -> None:
        assert self.refused == []
        assert self.ids
        for id in self.ids:
            (event,) = self.webhooks.ended(id)
            assert (event["status"], event.get("output")) == ("succeeded", golden), id


def test_a_stuck_predictor_is_replaced_and_its_prediction_ends_once_with_an_error(
    tmp_path: Path, webhooks: Webhooks
) -> None:
    with fleet_with(tmp_path, "--replicas", "1", "--limit", "45") as fleet:
        golden = fleet.predict()["output"]
        (worker,) = victims(fleet, PLACES["the worker"])
        assert fleet.begin("stuck", webhooks, ("start", "completed"), **LONG) == 202
        assert wait_until(lambda: "stuck" in webhooks.events, 20)  # so that "behind" cannot pass it by the other front
        assert fleet.begin("behind", webhooks) == 202
        assert wait_until(lambda: fleet.accepted() == 2, 5)
        os.kill(worker, signal.SIGSTOP)
        webhooks.wait(["stuck", "behind"], WAIT_SECONDS)
        (event,) = webhooks.ended("stuck")
        assert event["status"] == "failed"
        assert event["error"].startswith("The prediction did not end within 45 s")
        assert event["input"]["prompt"] == LONG["prompt"]
        (behind,) = webhooks.ended("behind")
        assert behind["output"] == golden
        workers = victims(fleet, PLACES["the worker"])
        assert len(workers) == 1
        assert worker not in workers
        assert len(webhooks.ended("stuck")) == 1


def test_a_cancelled_prediction_of_a_stuck_predictor_ends_at_once_and_frees_its_replica_at_the_limit(
    tmp_path: Path, webhooks: Webhooks
) -> None:
    with fleet_with(tmp_path, "--replicas", "1", "--limit", "45") as fleet:
        (worker,) = victims(fleet, PLACES["the worker"])
        assert fleet.begin("stuck-cancelled", webhooks, **LONG) == 202
        time.sleep(5)  # so that the worker runs it
        os.kill(worker, signal.SIGSTOP)
        assert fleet.ask("POST", "/predictions/stuck-cancelled/cancel")[0] == 200
        webhooks.wait(["stuck-cancelled"], 20)
        assert webhooks.ended("stuck-cancelled")[0]["status"] == "canceled"
        document = fleet.predict()
        assert document["status"] == "succeeded", document
        assert worker not in victims(fleet, PLACES["the worker"])


def test_replicas_follow_the_queue_and_leave_when_they_have_ended_what_they_run(
    tmp_path: Path, webhooks: Webhooks
) -> None:
    with fleet_with(tmp_path, "--replicas", "1:2", "--queue", "20", "--idle", "10") as fleet:
        golden = fleet.predict()["output"]
        load = Load(fleet, webhooks, "scaled")
        with load.of(clients=6):
            assert wait_until(lambda: len(victims(fleet, PLACES["the worker"])) == 2, WAIT_SECONDS)
            assert wait_until(lambda: len(victims(fleet, PLACES["a replica"])) == 2, WAIT_SECONDS)
        with load.of(clients=1):  # so that the one that leaves may be running something
            assert wait_until(lambda: len(victims(fleet, PLACES["a replica"])) == 1, WAIT_SECONDS)
            assert wait_until(lambda: len(victims(fleet, PLACES["the worker"])) == 1, 60)
        load.require_one_golden_answer_each(golden)
        assert fleet.predict()["output"] == golden


def test_an_update_under_load_loses_nothing_and_repeats_no_answer(tmp_path: Path, webhooks: Webhooks) -> None:
    with fleet_with(tmp_path, "--replicas", "2", "--queue", "20") as fleet:
        golden = fleet.predict()["output"]
        before = {place: set(victims(fleet, PLACES[place])) for place in ("a replica", "a front", "the worker")}
        load = Load(fleet, webhooks, "updated")
        with load.of(clients=4):
            fleet.process.send_signal(signal.SIGHUP)
            assert wait_until(lambda: "updated" in fleet.log.read_text().splitlines(), WAIT_SECONDS)
        load.require_one_golden_answer_each(golden)
        for place, pids in before.items():
            assert wait_until(lambda: len(victims(fleet, PLACES[place])) == 2, 120)  # noqa: B023 - called at once
            assert not pids & set(victims(fleet, PLACES[place])), place
        assert fleet.predict()["output"] == golden
