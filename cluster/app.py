"""`script/fleet`: start Ray on this machine, the ledger and the application, and end them cleanly."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig

from cluster.front import Front
from cluster.ledger_actor import start_ledger
from cluster.replica import LIMIT_SECONDS, Replica
from cluster.routing import PATIENCE_SECONDS

APP = "flux"
DRAIN_SECONDS = 900.0
"""How long replicas and fronts may take to end what they run, at least."""
IDLE_SECONDS = 300.0
"""How long there must be too many replicas before one leaves."""


@dataclass(frozen=True)
class Size:
    """What a fleet is told about itself."""

    least: int = 1
    """Replicas, at least."""
    most: int = 1
    """Replicas, at most; where it is more than `least`, their number follows the queue."""
    fronts: int = 2
    patience_seconds: float = PATIENCE_SECONDS
    """How long a request waits for the replica that has its LoRAs."""
    limit_seconds: float = LIMIT_SECONDS
    """How long a prediction may take on a replica."""
    idle_seconds: float = IDLE_SECONDS


def application(size: Size) -> Any:  # noqa: ANN401
    """The Serve application: fronts over replicas."""
    router = RequestRouterConfig(
        request_router_class="cluster.router:LoraRouter",
        request_router_kwargs={"patience_seconds": size.patience_seconds},
    )
    number: dict[str, Any] = {"num_replicas": size.most}
    if size.most > size.least:
        scaling = AutoscalingConfig(
            min_replicas=size.least,
            max_replicas=size.most,
            target_ongoing_requests=1.5,
            downscale_delay_s=size.idle_seconds,
        )
        number = {"autoscaling_config": scaling}
    drain_seconds = max(DRAIN_SECONDS, size.limit_seconds + 60)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    replicas = serve.deployment(
        Replica,
        name="replica",
        max_ongoing_requests=1,
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        request_router_config=router,
        health_check_period_s=1,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        **number,
    )
    front = serve.deployment(
        serve.ingress()(Front),
        name="front",
        num_replicas=size.fronts,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
    )
    threads = None if gpus else max(1, (os.cpu_count() or 1) // size.most)  # without a GPU they share the cores
    return front.bind(replicas.bind(threads, size.limit_seconds))


def deployed(settings: dict[str, Any]) -> Any:  # noqa: ANN401
    """The application for a cluster that others started, such as KubeRay's: `import_path: cluster.app:deployed`.

    Args:
        settings: as on the command line: `replicas` ("2" or "1:8"), `queue`, `fronts`, `patience`,
            `limit`, `idle`.

    Raises:
        ValueError: one of them is unknown, or its value wrong.
    """
    try:
        given = parser().parse_args([f"--{name}={value}" for name, value in settings.items()])
    except SystemExit:  # Ray would report it without a word
        raise ValueError(f"these are not settings of the fleet: {settings}") from None
    start_ledger(given.replicas[1] + given.queue, lifetime="detached")
    return application(size_of(given))


class Fleet:
    """Ray, the ledger and the application on this machine, from start to end."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self.stopping = threading.Event()
        self.impatient = threading.Event()
        self.updating = threading.Event()

    def on_signal(self, *_: object) -> None:
        """End after the accepted predictions; a second signal does not wait for them."""
        if self.stopping.is_set():
            self.impatient.set()
        self.stopping.set()

    def on_hangup(self, *_: object) -> None:
        """Replace every front and replica, and go on serving meanwhile."""
        self.updating.set()

    def run(self) -> int:
        """Serve until a signal or until Ray ends; return the exit status."""
        a = self._arguments
        started = time.monotonic()
        start_ray(self._folder)
        try:
            self._ledger = start_ledger(a.replicas[1] + a.queue)  # the actor lives as long as this handle
            start_serve(HTTPOptions(host=a.host, port=a.port))
            say(f"starting {a.replicas[0]} replicas; ctrl-C stops")
            if not self._deploy():
                return 1
            if self._wait_until_ready():
                seconds = time.monotonic() - started
                where = f"http://{a.host}:{a.port}"
                say(f"ready on {where} after {seconds:.1f} s: {a.replicas[0]} replicas, {a.queue} may wait")
            while not self.stopping.wait(0.5):
                if not ray.is_initialized():
                    return 1
                if self.updating.is_set():
                    self._update()
            self._drain()
        finally:
            end_ray()
        say("stopped")
        return 0

    def _deploy(self) -> bool:
        """Start the application, or a new version of it; False, and a line that says why, where it does not come up."""
        try:
            serve.run(application(size_of(self._arguments)), name=APP, route_prefix="/")
        except RuntimeError as error:
            say(f"Error: {error} {faults()}")
            return False
        return True

    def _update(self) -> None:
        self.updating.clear()
        say("updating: every front and replica is replaced when it has ended what it runs")
        deploying = threading.Thread(target=self._deploy, daemon=True)  # a signal to stop must not wait for it
        deploying.start()
        while deploying.is_alive() and not self.stopping.wait(0.3):
            pass
        if not self.stopping.is_set() and serve.status().applications[APP].status == "RUNNING":
            say("updated")

    def _wait_until_ready(self) -> bool:
        while not self.stopping.is_set():
            status = serve.status()
            listening = [proxy for proxy in status.proxies.values() if proxy == "HEALTHY"]
            if status.applications[APP].status == "RUNNING" and listening and ray.get(self._ledger.replica.remote()):
                return True
            self.stopping.wait(0.3)
        return False

    def _drain(self) -> None:
        ray.get(self._ledger.close.remote())
        while (accepted := ray.get(self._ledger.state.remote())["accepted"]) and not self.impatient.is_set():
            say(f"finishing {accepted} predictions; ctrl-C again ends at once")
            for _ in range(50):
                if self.impatient.wait(0.1) or not ray.get(self._ledger.state.remote())["accepted"]:
                    break


def start_ray(folder: Path) -> None:
    """Start Ray on the loopback interface without a dashboard; its sessions lie in `folder`."""
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder / "ray"),
    )


def start_serve(http: HTTPOptions) -> None:
    """Start Serve and its HTTP proxy; where the proxy takes longer than Serve waits, it is started all the same."""
    for _ in range(2):
        with suppress(TimeoutError):  # after a minute: the machine is busy, and the proxy is still being started
            serve.start(proxy_location="HeadOnly", http_options=http, logging_config={"log_level": "WARNING"})
            return


def end_ray() -> None:
    """End the application and Ray; nothing of them is left."""
    with suppress(Exception):
        serve.shutdown()
    ray.shutdown()


def require_free_port(host: str, port: int) -> None:
    """Make sure that the address can be listened on.

    Raises:
        OSError: it cannot; the message says why.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))


def faults() -> str:
    """What Serve says of deployments that do not come up."""
    deployments = serve.status().applications[APP].deployments
    return " ".join(f"{name}: {status.message}" for name, status in deployments.items() if status.message)


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def replicas(text: str) -> tuple[int, int]:
    """`N`, or `N:M` for a number that follows the queue.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    least, _, most = text.partition(":")
    try:
        bounds = int(least), int(most or least)
    except ValueError:
        bounds = (0, 0)
    if not 1 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f'"{text}" is neither a number of replicas nor two such as 1:8')
    return bounds


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        prog="script/fleet", description="Several predictors behind one address, with a queue."
    )
    parser.add_argument(
        "--replicas",
        type=replicas,
        default=(1, 1),
        metavar="N[:M]",
        help="predictors, one a GPU; N:M follows the queue (default 1)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5000, help="port to listen on (default 5000)")
    parser.add_argument("--queue", type=int, default=50, help="predictions that may wait (default 50)")
    parser.add_argument("--fronts", type=int, default=2, help="processes that take requests (default 2)")
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_SECONDS,
        metavar="SECONDS",
        help="how long a prediction waits for the replica that has its LoRAs while others are idle (default 0)",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT_SECONDS,
        metavar="SECONDS",
        help="how long a prediction may take on a replica before both are ended (default 900)",
    )
    parser.add_argument(
        "--idle",
        type=float,
        default=IDLE_SECONDS,
        metavar="SECONDS",
        help="with N:M, how long a replica is not needed before it leaves (default 300)",
    )
    return parser


def size_of(arguments: argparse.Namespace) -> Size:
    """What the command line says of the application."""
    a = arguments
    least, most = a.replicas
    return Size(least, most, a.fronts, a.patience, a.limit, a.idle)


def run(folder: Path) -> int:
    """The command line. Exit status: 0 after a signal, 1 after a fault, 2 wrong usage.

    Args:
        folder: private and temporary, for Ray's session.
    """
    arguments = parser().parse_args()
    try:
        require_free_port(arguments.host, arguments.port)
    except OSError as error:
        where = f"{arguments.host}, port {arguments.port}"
        say(f"Error: cannot listen on {where}: {error.strerror}. Choose another one with --port.")
        return 1
    fleet = Fleet(arguments, folder)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, fleet.on_signal)
    signal.signal(signal.SIGHUP, fleet.on_hangup)
    return fleet.run()
