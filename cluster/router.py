"""Ray Serve's router for the replicas: `routing` applied to Serve's pending requests.

A request's key is its `multiplexed_model_id`, which Serve carries from the handle to the router.
"""

from __future__ import annotations

import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster.routing import PATIENCE_SECONDS, candidates, home


class LoraRouter(RequestRouter):
    """Keeps each waiting request's home; Serve itself looks whether a candidate is idle, and asks again if none is."""

    def initialize_state(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Take the router's own settings.

        Args:
            patience_seconds: see `routing.PATIENCE_SECONDS`.
        """
        self._patience = patience_seconds
        self._homes: dict[str, str] = {}
        """The home of each waiting request, by its internal id."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas that may take the request, in ranks: its home, the next in its order, all others."""
        by_seat = {seat_of(replica): replica for replica in candidate_replicas}
        if pending_request is None or not by_seat:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else Serve asks again at once, and again
        key = pending_request.metadata.multiplexed_model_id
        name = pending_request.metadata.internal_request_id
        queued = self._queued(by_seat)
        if self._homes.get(name) not in by_seat:
            running = {s: self.replica_queue_len_cache.get(r.replica_id) or 0 for s, r in by_seat.items()}
            self._homes[name] = home(key, {seat: running[seat] + queued[seat] for seat in by_seat})
            queued[self._homes[name]] += 1
        waited = time.time() - pending_request.created_at
        order = [by_seat[seat] for seat in candidates(key, self._homes[name], queued, waited, self._patience)]
        return [rank for rank in (order[:1], order[1:2], order[2:]) if rank]

    def _queued(self, by_seat: dict[str, RunningReplica]) -> dict[str, int]:
        """How many waiting requests belong to each seat; those that wait no more are forgotten."""
        waiting = {request.metadata.internal_request_id for request in self._pending_requests_to_fulfill}
        self._homes = {name: seat for name, seat in self._homes.items() if name in waiting}
        homes = list(self._homes.values())
        return {seat: homes.count(seat) for seat in by_seat}

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:  # noqa: ANN401
        """Forget the home of a request that waits no more."""
        self._homes.pop(pending_request.metadata.internal_request_id, None)


def seat_of(replica: RunningReplica) -> str:
    """The replica's seat: its rank, which its successor takes over, or its id before the rank is known."""
    return str(replica.replica_metadata.get("seat") or replica.replica_id.unique_id)
