"""The ledger as Ray's actor: made by the command, found by name by fronts and replicas."""

from __future__ import annotations

from typing import Any

import ray

from cluster.ledger import Ledger

NAME, NAMESPACE = "flux-ledger", "flux"


def start_ledger(bound: int, lifetime: str | None = None) -> Any:  # noqa: ANN401 - an actor handle
    """Start it; Ray starts it anew when it dies.

    Args:
        bound: how many predictions may be accepted and not yet answered.
        lifetime: None lets it live as long as the returned handle, "detached" as long as the cluster.
    """
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3, max_concurrency=10_000)(Ledger)
    return actor.options(name=NAME, namespace=NAMESPACE, get_if_exists=True, lifetime=lifetime).remote(bound)


def ledger() -> Any:  # noqa: ANN401 - an actor handle
    """The running one."""
    return ray.get_actor(NAME, namespace=NAMESPACE)
