"""The ledger of accepted predictions: one actor that all fronts ask, so that bounds and ids hold across them.

It admits up to a bound, knows which front answers for which id, passes cancellations on, and keeps the bodies of
asynchronous predictions until their last webhook is delivered: when a front dies, another one takes them over.

Its memory is all that it has. When it is started anew, the fronts tell it what they hold.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

SILENT_SECONDS = 5.0
"""A front that has not asked for so long is dead."""
LISTEN_SECONDS = 1.0
"""How long the ledger keeps a front waiting for news."""
RECENT = 50
"""Durations that the estimate for Retry-After is made from."""


@dataclass
class Entry:
    """An accepted prediction."""

    id: str
    front: str
    request: Mapping[str, Any] | None = None
    """What another front needs to run it; None for a synchronous one, whose client is gone with its front."""
    answer: bytes | None = None
    """Its result, once there is one and it is being delivered."""
    since: float = 0.0
    """When this ledger took it in, by its own clock."""


@dataclass(frozen=True)
class Verdict:
    """Whether a prediction was admitted, with what its client is told otherwise, so that nobody has to ask twice."""

    outcome: str
    """"accepted", "known" where its id is running, "full" or "closed"."""
    bound: int = 0
    mean_seconds: float = 1.0


@dataclass
class News:
    """What a front has to be told."""

    cancelled: list[str] = field(default_factory=list)
    adopted: list[Entry] = field(default_factory=list)


class Ledger:
    """See the module. Every method runs in one event loop, so each is atomic between its awaits."""

    def __init__(self, bound: int) -> None:
        """Start empty.

        Args:
            bound: how many predictions may be accepted and not yet answered.
        """
        self._bound = bound
        self._closed = False
        self._entries: dict[str, Entry] = {}
        self._heard: dict[str, float] = {}
        self._news: dict[str, News] = {}
        self._wake: dict[str, asyncio.Event] = {}
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._replica: Mapping[str, Any] = {}

    # Replicas

    async def replica_is_ready(self, facts: Mapping[str, Any]) -> None:
        """Remember what a replica's server says of itself: `openapi`, `health` and `index` documents."""
        self._replica = facts

    async def knows_a_replica(self) -> bool:
        """Whether one said so since this ledger was started."""
        return bool(self._replica)

    async def replica(self) -> Mapping[str, Any]:
        """What the replica that got ready last said; empty while none did."""
        return self._replica

    # Predictions

    async def accept(self, entry: Entry) -> Verdict:
        """Admit a prediction, or say why not."""
        if entry.id in self._entries:
            return Verdict("known")
        if self._closed:
            return Verdict("closed", self._bound)
        if len(self._entries) >= self._bound:
            return Verdict("full", self._bound, self._mean_seconds())
        self._entries[entry.id] = replace(entry, since=time.monotonic())
        return Verdict("accepted")

    async def answered(self, id: str, answer: bytes) -> None:
        """Keep the result of an asynchronous prediction until it is delivered."""
        if (entry := self._entries.get(id)) is not None and entry.request is not None:
            entry.answer = answer

    async def finished(self, id: str, front: str, seconds: float) -> None:
        """Forget a prediction that nothing is left to do for.

        Args:
            id: the prediction's.
            front: who answered for it; another one's word does not count.
            seconds: from its acceptance to its result.
        """
        self._seconds.append(seconds)
        entry = self._entries.get(id)
        if entry is not None and entry.front == front:
            del self._entries[id]

    async def cancel(self, id: str) -> bool:
        """Tell the front that answers for it; False where nobody does."""
        entry = self._entries.get(id)
        if entry is None:
            return False
        self._tell(entry.front).cancelled.append(id)
        return True

    # Fronts

    async def listen(self, front: str, held: list[str]) -> News | None:
        """Wait up to a second for news. None asks the front to `register` what it holds, of which some is unknown.

        Args:
            front: the front's name.
            held: the ids that it answers for.
        """
        self._heard[front] = time.monotonic()
        self._adopt_from_the_dead(front)
        self._drop_what_is_not_held(front, held)
        if any(id not in self._entries for id in held):
            return None
        wake = self._wake.setdefault(front, asyncio.Event())
        if front not in self._news:
            with suppress(TimeoutError):
                await asyncio.wait_for(wake.wait(), LISTEN_SECONDS)
        wake.clear()
        self._heard[front] = time.monotonic()
        return self._news.pop(front, News())

    async def register(self, entries: list[Entry]) -> None:
        """Take over what a front holds, after this ledger was started anew."""
        for entry in entries:
            self._entries.setdefault(entry.id, replace(entry, since=time.monotonic()))

    def _drop_what_is_not_held(self, front: str, held: list[str]) -> None:
        """Forget what a front has finished while this ledger was being started, and then registered all the same."""
        old = time.monotonic() - SILENT_SECONDS
        for entry in list(self._entries.values()):
            adopted = entry in self._news.get(front, News()).adopted
            if entry.front == front and entry.id not in held and entry.since < old and not adopted:
                del self._entries[entry.id]

    def _tell(self, front: str) -> News:
        self._wake.setdefault(front, asyncio.Event()).set()
        return self._news.setdefault(front, News())

    def _adopt_from_the_dead(self, heir: str) -> None:
        """Give the asynchronous predictions of silent fronts to this one, and drop their synchronous ones."""
        now = time.monotonic()
        dead = {front for front, heard in self._heard.items() if now - heard > SILENT_SECONDS}
        for entry in [entry for entry in self._entries.values() if entry.front in dead]:
            if entry.request is None:
                del self._entries[entry.id]
            else:
                entry.front, entry.since = heir, now
                self._tell(heir).adopted.append(entry)
        for front in dead:
            del self._heard[front]
            self._news.pop(front, None)

    # The whole

    async def close(self) -> None:
        """Accept nothing more."""
        self._closed = True

    async def state(self) -> dict[str, Any]:
        """How much is accepted, the bound, whether it is closed, and the seconds of a prediction lately."""
        return {
            "accepted": len(self._entries),
            "bound": self._bound,
            "closed": self._closed,
            "mean_seconds": self._mean_seconds(),
            "asynchronous": sum(entry.request is not None for entry in self._entries.values()),
        }

    async def health(self) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """The health document of the replica that got ready last, empty while none did, and the ledger's `state`."""
        return self._replica.get("health", {}), await self.state()

    def _mean_seconds(self) -> float:
        return sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
