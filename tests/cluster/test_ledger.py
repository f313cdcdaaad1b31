"""The ledger's promises: the bound, one owner an id, cancellations, heirs, and a new start."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from cluster import ledger as module
from cluster.ledger import Entry, Ledger, Verdict

REQUEST: dict[str, Any] = {"input": {"prompt": "x"}, "webhook": None, "events": []}


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTEN_SECONDS", 0.05)
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.2)


def test_it_accepts_up_to_the_bound_and_each_id_once() -> None:
    async def work() -> None:
        ledger = Ledger(2)
        assert (await ledger.accept(Entry("a", "front"))).outcome == "accepted"
        assert (await ledger.accept(Entry("a", "other"))).outcome == "known"
        assert (await ledger.accept(Entry("b", "front"))).outcome == "accepted"
        assert (await ledger.accept(Entry("c", "front"))).outcome == "full"
        await ledger.finished("a", "other", 1.0)  # not its own
        assert (await ledger.accept(Entry("c", "front"))).outcome == "full"
        await ledger.finished("a", "front", 1.0)
        assert (await ledger.accept(Entry("c", "front"))).outcome == "accepted"
        await ledger.close()
        await ledger.finished("b", "front", 1.0)
        assert (await ledger.accept(Entry("d", "front"))).outcome == "closed"
        assert (await ledger.accept(Entry("c", "front"))).outcome == "known"

    run(work())


def test_a_refusal_says_when_to_come_again_and_the_health_says_all_at_once() -> None:
    async def work() -> None:
        ledger = Ledger(1)
        assert await ledger.health() == ({}, await ledger.state())
        await ledger.replica_is_ready({"health": {"status": "READY"}, "openapi": {}, "index": {}})
        for seconds in (2.0, 4.0):
            await ledger.accept(Entry("a", "front"))
            await ledger.finished("a", "front", seconds)
        await ledger.accept(Entry("a", "front"))
        assert await ledger.accept(Entry("b", "front")) == Verdict("full", bound=1, mean_seconds=3.0)
        health, state = await ledger.health()
        assert health == {"status": "READY"}
        assert (state["accepted"], state["bound"], state["mean_seconds"]) == (1, 1, 3.0)

    run(work())


def test_a_cancellation_reaches_the_front_that_answers_for_it() -> None:
    async def work() -> None:
        ledger = Ledger(9)
        await ledger.accept(Entry("a", "one"))
        listening = asyncio.create_task(ledger.listen("one", ["a"]))
        await asyncio.sleep(0.01)
        assert await ledger.cancel("a")
        news = await listening
        assert news is not None
        assert news.cancelled == ["a"]
        assert not await ledger.cancel("b")
        assert await ledger.listen("one", ["a"]) == module.News()

    run(work())


def test_the_asynchronous_predictions_of_a_dead_front_are_taken_over() -> None:
    async def work() -> None:
        ledger = Ledger(9)
        await ledger.listen("dead", [])
        await ledger.accept(Entry("kept", "dead", REQUEST))
        await ledger.accept(Entry("gone", "dead"))
        await ledger.answered("kept", b"answer")
        for _ in range(8):
            news = await ledger.listen("alive", [])
            if news is not None and news.adopted:
                break
        assert news is not None
        (entry,) = news.adopted
        assert (entry.id, entry.front, entry.answer) == ("kept", "alive", b"answer")
        assert (await ledger.state())["accepted"] == 1
        assert await ledger.listen("alive", ["kept"]) == module.News()

    run(work())


def test_a_new_ledger_asks_fronts_for_what_they_hold() -> None:
    async def work() -> None:
        ledger = Ledger(9)
        assert await ledger.listen("one", ["a", "b"]) is None
        await ledger.register([Entry("a", "one"), Entry("b", "one", REQUEST)])
        assert await ledger.listen("one", ["a", "b"]) == module.News()
        assert (await ledger.accept(Entry("a", "two"))).outcome == "known"
        for _ in range(8):  # "a" was finished in between
            assert await ledger.listen("one", ["b"]) == module.News()
        assert (await ledger.state())["accepted"] == 1

    run(work())
