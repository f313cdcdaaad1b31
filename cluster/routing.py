"""Which replica a request should go to: rendezvous hashing by its LoRAs, with bounded load and patience. Pure.

A request's home is the same replica as long as the same seats exist, so that a LoRA is fetched and read in few places.
A home whose load is above the bound is passed over for the next in the order, which is the same for equal keys. A
request that has waited for its patience goes to any idle seat that no waiting request belongs to: a seat serves its own
first, so that under a full load each still runs what it has the files for.

Source: Thaler and Ravishankar 1998 (rendezvous hashing); Mirrokni, Thorup and Zadimoghaddam 2018 (bounded loads).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

PATIENCE_SECONDS = 0.0
"""How long a request waits for its home while other seats are idle. In the simulation any patience costs p95 and gains
files that are found; a tenth of a fetch is a fair price where files come slowly."""
LOAD_FACTOR = 1.25
"""A home may hold this many times the mean load of all seats."""


def home(key: str, load: Mapping[str, int]) -> str:
    """The seat that a request belongs to: the first in its order whose load leaves room under the bound.

    Args:
        key: the request's LoRAs; equal for equal sets. Empty: none, and the seat with the least load is taken.
        load: how many requests each seat runs or is the home of; not empty.
    """
    if not key:
        return min(load, key=lambda seat: (load[seat], seat))
    bound = math.ceil(LOAD_FACTOR * (sum(load.values()) + 1) / len(load))
    return next(seat for seat in rendezvous_order(key, tuple(sorted(load))) if load[seat] < bound)


def candidates(key: str, home_seat: str, queued: Mapping[str, int], waited: float, patience: float) -> list[str]:
    """The seats that may take a request now, the best first: its home, after `patience` those that nobody waits for.

    Args:
        key: as for `home`.
        home_seat: what `home` said when the request came.
        queued: for each seat that exists, how many waiting requests belong to it.
        waited: seconds since the request came.
        patience: seconds. Requests without LoRAs have none.
    """
    others = rendezvous_order(key, tuple(sorted(queued))) if not key or waited >= patience else ()
    free = [seat for seat in others if seat != home_seat and not queued[seat]]
    return [home_seat, *free] if home_seat in queued else list(queued)


@lru_cache(maxsize=4096)
def rendezvous_order(key: str, seats: Sequence[str]) -> tuple[str, ...]:
    """The seats in the order of their hashes with the key: removing one leaves the order of the others as it was."""
    return tuple(sorted(seats, key=lambda seat: hashlib.blake2b(f"{key}\n{seat}".encode(), digest_size=8).digest()))
