"""What routing is worth, without GPUs: `python -m cluster.simulation` writes the table and the plots in docs/.

Predictions arrive at random, each with one of many LoRAs whose use follows Zipf's law; replicas run one at a time, keep
as many LoRA files as fit, and fetch the others. The policy `ours` calls the functions that the router calls; the others
are Serve's kind of choices. One event loop over a heap; times are seconds.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, count
from pathlib import Path

from cluster.routing import PATIENCE_SECONDS, candidates, home

PROJECT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Case:
    """One fleet and its load."""

    replicas: int
    files: int
    """LoRA files that a replica's cache holds."""
    fetch_seconds: float
    load: float
    """Predictions that arrive, as a share of what the replicas could make without fetching."""
    loras: int = 1000
    zipf: float = 1.0
    image_seconds: float = 6.0
    swap_seconds: float = 0.24
    """Applying another LoRA than the last one."""
    requests_each: int = 150
    """Predictions a replica, in the mean."""


@dataclass
class Seat:
    """A replica: whether it runs one, what its cache holds, and its last LoRA."""

    name: str
    busy: bool = False
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    last: int | None = None

    def take(self, lora: int, case: Case) -> tuple[float, bool]:
        """Seconds that a prediction with this LoRA takes here, and whether its file was here."""
        hit = lora in self.cache
        self.cache[lora] = None
        self.cache.move_to_end(lora)
        if len(self.cache) > case.files:
            self.cache.popitem(last=False)
        seconds = case.image_seconds + (0 if hit else case.fetch_seconds)
        seconds += 0 if self.last == lora else case.swap_seconds
        self.last = lora
        return seconds, hit


@dataclass
class Waiting:
    """A prediction in the queue."""

    arrived: float
    lora: int
    home: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a policy came to: the share of files that were there, and waiting with running, in seconds."""

    hits: float
    p50: float
    p95: float


Policy = Callable[[Waiting, Mapping[str, Seat], Mapping[str, int], float, random.Random], list[str]]
"""The seats that a waiting prediction may take now, the best first."""


def ours(
    waiting: Waiting, seats: Mapping[str, Seat], homes: Mapping[str, int], now: float, rng: random.Random
) -> list[str]:
    """The router's, with its default patience."""
    key = str(waiting.lora)
    if not waiting.home:
        waiting.home = home(key, {name: int(seat.busy) + homes[name] for name, seat in seats.items()})
        homes = {**homes, waiting.home: homes[waiting.home] + 1}
    return candidates(key, waiting.home, homes, now - waiting.arrived, PATIENCE_SECONDS)


def at_random(
    waiting: Waiting, seats: Mapping[str, Seat], homes: Mapping[str, int], now: float, rng: random.Random
) -> list[str]:
    """A seat drawn once, waited for."""
    waiting.home = waiting.home or rng.choice(list(seats))
    return [waiting.home]


def round_robin() -> Policy:
    """The next seat in turn, waited for."""
    turn = count()

    def choose(
        waiting: Waiting, seats: Mapping[str, Seat], homes: Mapping[str, int], now: float, rng: random.Random
    ) -> list[str]:
        waiting.home = waiting.home or list(seats)[next(turn) % len(seats)]
        return [waiting.home]

    return choose


def least_loaded(
    waiting: Waiting, seats: Mapping[str, Seat], homes: Mapping[str, int], now: float, rng: random.Random
) -> list[str]:
    """Any idle seat, in random order: one queue for all."""
    names = [name for name, seat in seats.items() if not seat.busy]
    rng.shuffle(names)
    return names


def policies(case: Case) -> dict[str, Policy]:
    """By name."""
    return {
        "random": at_random,
        "round-robin": round_robin(),
        "least-loaded": least_loaded,
        "ours": ours,
    }


def simulate(case: Case, policy: Policy, seed: int = 0) -> Outcome:
    """Run one policy on one case; the first third of the predictions fills the caches and is not counted."""
    rng = random.Random(seed)  # of the policy alone: every policy meets the same predictions
    seats = {f"seat-{number}": Seat(f"seat-{number}") for number in range(case.replicas)}
    arrivals, draw = predictions(case, seed)
    total = case.requests_each * case.replicas
    events: list[tuple[float, int, str]] = [(next(arrivals), 0, "")]
    queue: deque[Waiting] = deque()
    tie, times, hits, served = count(1), [], [], 0
    while events and served < total:
        now, _, freed = heapq.heappop(events)
        if freed == "":
            queue.append(Waiting(now, next(draw)))
            heapq.heappush(events, (next(arrivals), next(tie), ""))
        else:
            seats[freed].busy = False
        for waiting, name in _assigned(queue, seats, policy, now, rng):
            seconds, hit = seats[name].take(waiting.lora, case)
            seats[name].busy = True
            heapq.heappush(events, (now + seconds, next(tie), name))
            served += 1
            if served > total / 3:
                times.append(now + seconds - waiting.arrived)
                hits.append(hit)
    times.sort()
    return Outcome(sum(hits) / len(hits), times[len(times) // 2], times[int(len(times) * 0.95)])


def _assigned(
    queue: deque[Waiting], seats: Mapping[str, Seat], policy: Policy, now: float, rng: random.Random
) -> Iterator[tuple[Waiting, str]]:
    """Take those out of the queue that find an idle seat now, the oldest first."""
    homes = dict.fromkeys(seats, 0)
    for waiting in queue:
        if waiting.home:
            homes[waiting.home] += 1
    idle = sum(not seat.busy for seat in seats.values())
    for waiting in list(queue) if idle else [queue[-1]] if queue else []:
        known = bool(waiting.home)
        chosen = next((name for name in policy(waiting, seats, homes, now, rng) if not seats[name].busy), None)
        if waiting.home and not known:
            homes[waiting.home] += 1
        if chosen is not None:
            queue.remove(waiting)
            if waiting.home:
                homes[waiting.home] -= 1
            yield waiting, chosen
            idle -= 1
            if idle == 0:
                return


def predictions(case: Case, seed: int) -> tuple[Iterator[float], Iterator[int]]:
    """When predictions arrive, in seconds, and the LoRA of each, without end."""
    return arrivals_of(case, random.Random(seed + 1)), loras_of(case, random.Random(seed + 2))


def arrivals_of(case: Case, rng: random.Random) -> Iterator[float]:
    """Times of a Poisson process."""
    rate, now = case.load * case.replicas / (case.image_seconds + case.swap_seconds), 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


def loras_of(case: Case, rng: random.Random) -> Iterator[int]:
    """The LoRA of each prediction: Zipf's law."""
    cumulative = list(accumulate(1 / rank**case.zipf for rank in range(1, case.loras + 1)))
    numbers = range(case.loras)
    while True:
        yield rng.choices(numbers, cum_weights=cumulative)[0]


CASES = [
    Case(replicas, files, fetch, load, requests_each=each)
    for replicas, each in ((4, 600), (16, 150), (64, 60), (256, 30))
    for files in (50, 200)
    for fetch in (2.0, 6.0)
    for load in (0.5, 0.7, 0.8)
]


def table(outcomes: Mapping[Case, Mapping[str, Outcome]]) -> str:
    """A row a case: hits, p50 and p95 of every policy."""
    names = list(next(iter(outcomes.values())))
    head = "| replicas | files | fetch, s | load | " + " | ".join(names) + " |\n|---|---|---|---|" + "---|" * len(names)
    rows = [head]
    for case, found in outcomes.items():
        cells = [f"{100 * o.hits:.0f}%, {o.p50:.1f}, {o.p95:.1f}" for o in found.values()]
        rows.append(
            f"| {case.replicas} | {case.files} | {case.fetch_seconds:g} | {case.load:g} | {' | '.join(cells)} |"
        )
    return "\n".join(rows)


def worse(outcomes: Mapping[Case, Mapping[str, Outcome]]) -> list[str]:
    """The cases in which another policy has a p95 below ours, in words."""
    found = []
    for case, of in outcomes.items():
        best = min((name for name in of if name != "ours"), key=lambda name: of[name].p95)
        if of["ours"].p95 > of[best].p95:
            where = f"{case.replicas} replicas, {case.files} files, {case.fetch_seconds:g} s, load {case.load:g}"
            found.append(f"{where}: ours {of['ours'].p95:.1f} s, {best} {of[best].p95:.1f} s")
    return found


def plot(outcomes: Mapping[Case, Mapping[str, Outcome]], path: Path) -> None:
    """p95 and hits over the number of replicas, for 50 files, 6 s a fetch, load 0.7."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fleet"
    from matplotlib import pyplot

    shown = {c: o for c, o in outcomes.items() if (c.files, c.fetch_seconds, c.load) == (50, 6.0, 0.7)}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in next(iter(shown.values())):
        replicas = [case.replicas for case in shown]
        left.plot(replicas, [o[name].p95 for o in shown.values()], marker="o", label=name)
        right.plot(replicas, [100 * o[name].hits for o in shown.values()], marker="o", label=name)
    for axis, title in ((left, "p95 of a prediction, s"), (right, "LoRA files found on the replica, %")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(replicas, [str(n) for n in replicas])
        axis.set_xlabel("replicas")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    left.set_yscale("log")
    left.set_yticks(ticks := (10, 20, 50, 100, 200, 500), [str(tick) for tick in ticks])
    left.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Write the table between its marks in docs/scaling.md, and docs/fleet.svg."""
    parser = argparse.ArgumentParser(prog="python -m cluster.simulation", description=main.__doc__)
    parser.add_argument("--short", action="store_true", help="4 and 16 replicas alone, and write nothing")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.replicas <= 16] if arguments.short else CASES
    outcomes = {case: {name: simulate(case, policy) for name, policy in policies(case).items()} for case in cases}
    print(table(outcomes))
    print("\n".join(["", "p95 above the best of the others:", *worse(outcomes)]))
    if not arguments.short:
        document = PROJECT / "docs" / "scaling.md"
        before, _, rest = document.read_text().partition("<!-- simulation -->")
        after = rest.partition("<!-- end of simulation -->")[2]
        document.write_text(f"{before}<!-- simulation -->\n\n{table(outcomes)}\n\n<!-- end of simulation -->{after}")
        plot(outcomes, PROJECT / "docs" / "fleet.svg")


if __name__ == "__main__":
    main()
