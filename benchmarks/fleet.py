"""`script/bench fleet`: what the fleet costs a request, and its routing beside the simulation of the same case.

For the second part real replicas of the tiny model, each with a cache folder of its own, ask a host that takes its time
for LoRA files. Predictions arrive at the times and with the LoRAs that the simulation draws, whose seconds an image are
measured here first. A run is a few hundred predictions, and what it finds varies with them. In the default case
the policies differ by more than that, and the report says how much the simulation varies. Replicas share this machine's
cores, which the simulation's do not: where the load is so high that images compete for them, the measured times are
longer for that reason alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.child import free_port
from cluster.simulation import Case, Outcome, policies, predictions, simulate

PROJECT = Path(__file__).parent.parent
REPORT = Path(__file__).parent / "fleet.md"
LORA = PROJECT / "tests" / "data" / "loras" / "tok-style.safetensors"
SMALL = {
    "prompt": "a red circle", "model": "schnell", "num_inference_steps": 1, "aspect_ratio": "custom",
    "width": 256, "height": 256, "seed": 1, "output_format": "jpg",
}  # fmt: skip
REFUSED = {"prompt": "a red circle", "replicate_weights": "no reference"}
"""Refused by the predictor in its first lines: what is left is the way there and back."""
START_SECONDS = 1200
QUEUE = 2000
WARM_UP = 5
CASE = Case(
    replicas=4,
    files=16,
    fetch_seconds=1.0,
    load=0.1,
    loras=40,
    image_seconds=0.1,
    swap_seconds=0.0,  # in the seconds of an image
    requests_each=90,
)
"""The default for the second part, but for the seconds of an image, which are measured."""
SHOWN = ("ours", "least-loaded")
SEEDS = range(10)


@dataclass(frozen=True)
class Fleet:
    """A running fleet: its port, and those of its predictors."""

    port: int
    children: tuple[int, ...]


@contextmanager
def running_fleet(replicas: int, folder: Path, environment: Mapping[str, str]) -> Iterator[Fleet]:
    """`script/fleet` on a free port, ended afterwards."""
    port = free_port()
    mark = f"FLUX_CACHE_DIR={folder}/"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [PROJECT / "script" / "fleet", "--replicas", str(replicas), "--port", str(port), "--queue", str(QUEUE)],
            env={**os.environ, "FLUX_CACHE_DIR": f"{folder}/{{seat}}", "FLUX_CACHE_MIN_FREE_GB": "0", **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while "ready on" not in (folder / "log").read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the fleet did not get ready: {(folder / 'log').read_text()}")
            time.sleep(0.5)
        yield Fleet(port, _children(mark))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def _children(mark: str) -> tuple[int, ...]:
    """The ports of the predictors whose environment has this mark."""
    ports = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            ours = mark in (folder / "environ").read_bytes().decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if ours and (found := re.search(r"-m cli\.serve --port (\d+)", command)):
            ports.add(int(found[1]))
    return tuple(sorted(ports))


# What the fleet costs a request


@dataclass(frozen=True)
class Overhead:
    """Median milliseconds of a request to a predictor, and of the same one through the fleet."""

    direct: float
    fleet: float


def overhead(fleet: Fleet, inputs: Mapping[str, Any], rounds: int) -> Overhead:
    """Ask both in turn, one request at a time."""
    ways = {port: HTTPConnection("127.0.0.1", port) for port in (fleet.children[0], fleet.port)}
    taken: dict[int, list[float]] = {port: [] for port in ways}
    for _ in range(rounds + WARM_UP):
        for port, connection in ways.items():
            taken[port].append(_ask(connection, inputs)[0])
            time.sleep(0.02)  # Cog's server frees its slot a moment after its answer
    direct, through = (1000 * statistics.median(seconds[WARM_UP:]) for seconds in taken.values())
    return Overhead(direct, through)


def _ask(connection: HTTPConnection, inputs: Mapping[str, Any]) -> tuple[float, Any]:
    """Seconds and answer of one prediction."""
    started = time.monotonic()
    while True:
        connection.request("POST", "/predictions", json.dumps({"input": inputs}), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 409:
            break
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {content[:300]!r}")
    return time.monotonic() - started, json.loads(content)


# Routing, beside the simulation


def numbered_lora(number: int) -> bytes:
    """The test's LoRA with a number in its metadata, so that each file differs."""
    content = LORA.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = {**header.get("__metadata__", {}), "number": str(number)}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


@contextmanager
def slow_host(fetch_seconds: float) -> Iterator[str]:
    """A host of LoRAs, `/<number>.safetensors`, each of which takes so long."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = numbered_lora(int(re.sub(r"\D", "", self.path)))
            time.sleep(fetch_seconds)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def image_seconds(fleet: Fleet, host: str, rounds: int) -> float:
    """The median of a prediction whose LoRA's file is there, one at a time."""
    connection = HTTPConnection("127.0.0.1", fleet.port)
    inputs = {**SMALL, "replicate_weights": f"http://{host}/999999.safetensors"}
    return statistics.median([_ask(connection, inputs)[0] for _ in range(rounds + 2 * WARM_UP)][2 * WARM_UP :])


def measure(fleet: Fleet, host: str, case: Case, seed: int) -> tuple[Outcome, Counter[str]]:
    """Send the simulation's predictions at its times; the first third fills the caches and is not counted.

    Returns:
        the outcome, and how often each seat's file was found how.
    """
    total = case.requests_each * case.replicas
    arrivals, loras = predictions(case, seed)
    plan = list(zip(islice(arrivals, total), islice(loras, total), strict=True))
    started = time.monotonic()

    def send(arrival: float, lora: int) -> tuple[float, str]:
        time.sleep(max(0.0, started + arrival - time.monotonic()))
        inputs = {**SMALL, "replicate_weights": f"http://{host}/{lora}.safetensors"}
        answer = _ask(HTTPConnection("127.0.0.1", fleet.port), inputs)[1]
        if answer["status"] != "succeeded":
            raise RuntimeError(answer["error"])
        return time.monotonic() - started - arrival, answer["metrics"]["loras"][0]["cache"]

    with ThreadPoolExecutor(total) as clients:
        answers = list(clients.map(send, *zip(*plan, strict=True)))[total // 3 :]
    times, found = sorted(seconds for seconds, _ in answers), Counter(cache for _, cache in answers)
    outcome = Outcome(1 - found["miss"] / len(answers), times[len(times) // 2], times[int(len(times) * 0.95)])
    return outcome, found


def simulated(case: Case, seed: int) -> dict[str, Outcome]:
    """The simulation's outcomes, by the rows' names."""
    return {f"simulated, {name}": simulate(case, policies(case)[name], seed) for name in SHOWN}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of the share of files found in simulated runs of one length."""

    mean: float
    deviation: float


def spread(case: Case, policy: str) -> Spread:
    """How much of what is found is chance: the same case and policy with other predictions."""
    hits = [simulate(case, policies(case)[policy], seed).hits for seed in SEEDS]
    return Spread(statistics.mean(hits), statistics.stdev(hits))


def report(
    options: list[str],
    costs: Mapping[str, Overhead],
    case: Case,
    outcomes: Mapping[str, Outcome],
    found: Counter[str],
    spreads: Mapping[str, Spread],
) -> str:
    """The page."""
    command = shlex.join(["script/bench", "fleet", *options])
    rows = [f"| {name} | {c.direct:.1f} | {c.fleet:.1f} | {c.fleet - c.direct:.1f} |" for name, c in costs.items()]
    lines = [f"| {name} | {100 * o.hits:.0f} % | {o.p50:.2f} | {o.p95:.2f} |" for name, o in outcomes.items()]
    varied = ", ".join(f"{name} {100 * s.mean:.0f} ± {100 * s.deviation:.0f} %" for name, s in spreads.items())
    return "\n".join(
        [
            "# The fleet",
            "",
            f"`{command}`, {platform.machine()}, {os.cpu_count()} cores, the tiny model without a GPU.",
            "",
            "## What it costs a request",
            "",
            "Medians in milliseconds, one request at a time, to a predictor and through the fleet in turn.",
            "",
            "| request | predictor | fleet | difference |",
            "|---|---|---|---|",
            *rows,
            "",
            "## Routing, measured beside the simulation",
            "",
            f"{case.replicas} replicas, {case.files} files each, {case.loras} LoRAs (Zipf, exponent {case.zipf:g}),"
            f" {case.fetch_seconds:g} s a fetch, {case.image_seconds:.3f} s an image, load {case.load:g};"
            f" {case.requests_each * case.replicas} predictions, the first third not counted.",
            "",
            "| | files found | p50, s | p95, s |",
            "|---|---|---|---|",
            *lines,
            "",
            f"Files as the predictors report them: {', '.join(f'{n} {name}' for name, n in found.most_common())}.",
            "",
            f"Found in {len(SEEDS)} simulated runs of this length with other predictions, mean and standard deviation:"
            f" {varied}.",
            "",
        ]
    )


def main() -> None:
    """Measure both parts and write benchmarks/fleet.md. Not on a machine that does anything else."""
    parser = argparse.ArgumentParser(prog="script/bench fleet", description=main.__doc__)
    parser.add_argument("--replicas", type=int, default=CASE.replicas)
    parser.add_argument("--rounds", type=int, default=100, help="requests of each kind for the first part")
    parser.add_argument(
        "--requests", type=int, default=CASE.requests_each, help="predictions a replica for the second part"
    )
    parser.add_argument("--load", type=float, default=CASE.load, help="of what the replicas could do without fetching")
    parser.add_argument("--fetch", type=float, default=CASE.fetch_seconds, help="seconds a file")
    parser.add_argument("--files", type=int, default=CASE.files, help="that a replica's cache holds")
    parser.add_argument("--loras", type=int, default=CASE.loras)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=REPORT)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder, slow_host(given.fetch) as host:
        environment = {
            "FLUX_TRUSTED_HOSTS": host,
            "FLUX_CACHE_MAX_GB": f"{given.files * 1.02 * len(numbered_lora(0)) / 1e9:.9f}",
        }
        with running_fleet(given.replicas, Path(folder), environment) as fleet:
            kinds: dict[str, Mapping[str, Any]] = {"refused by the predictor": REFUSED, "256x256, one step": SMALL}
            costs = {name: overhead(fleet, inputs, given.rounds) for name, inputs in kinds.items()}
            case = replace(
                CASE,
                replicas=given.replicas,
                files=given.files,
                fetch_seconds=given.fetch,
                load=given.load,
                loras=given.loras,
                image_seconds=image_seconds(fleet, host, given.rounds),
                requests_each=given.requests,
            )
            measured, found = measure(fleet, host, case, given.seed)
    outcomes = {"measured": measured, **simulated(case, given.seed)}
    text = report(sys.argv[1:], costs, case, outcomes, found, {name: spread(case, name) for name in SHOWN})
    given.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
