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
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig

from cluster.front import Front
from cluster.ledger_actor import start_ledger
from cluster.replica import Replica
from cluster.routing import PATIENCE_SECONDS

APP = "flux"
DRAIN_SECONDS = 900.0
"""How long replicas and fronts may take to end what they run."""


def application(least: int, most: int, fronts: int, patience_seconds: float) -> Any:  # noqa: ANN401
    """The Serve application: fronts over replicas.

    Args:
        least: replicas, at least.
        most: replicas, at most; where it is more than `least`, their number follows the queue.
        fronts: how many fronts.
        patience_seconds: how long a request waits for the replica that has its LoRAs.
    """
    router = RequestRouterConfig(
        request_router_class="cluster.router:LoraRouter", request_router_kwargs={"patience_seconds": patience_seconds}
    )
    size: dict[str, Any] = {"num_replicas": most}
    if most > least:
        scaling = AutoscalingConfig(
            min_replicas=least, max_replicas=most, target_ongoing_requests=1.5, downscale_delay_s=300
        )
        size = {"autoscaling_config": scaling}
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    replicas = serve.deployment(
        Replica,
        name="replica",
        max_ongoing_requests=1,
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        request_router_config=router,
        health_check_period_s=1,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        **size,
    )
    front = serve.deployment(
        serve.ingress()(Front),
        name="front",
        num_replicas=fronts,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
    )
    threads = None if gpus else max(1, (os.cpu_count() or 1) // most)  # without a GPU replicas share the cores
    return front.bind(replicas.bind(threads))


def deployed(settings: dict[str, Any]) -> Any:  # noqa: ANN401
    """The application for a cluster that others started, such as KubeRay's: `import_path: cluster.app:deployed`.

    Args:
        settings: `replicas` as on the command line ("2" or "1:8"), `queue`, `fronts`, `patience`.
    """
    least, most = replicas(str(settings.get("replicas", "1")))
    start_ledger(most + int(settings.get("queue", 50)), lifetime="detached")
    patience = float(settings.get("patience", PATIENCE_SECONDS))
    return application(least, most, int(settings.get("fronts", 2)), patience)


class Fleet:
    """Ray, the ledger and the application on this machine, from start to end."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self.stopping = threading.Event()
        self.impatient = threading.Event()

    def on_signal(self, *_: object) -> None:
        """End after the accepted predictions; a second signal does not wait for them."""
        if self.stopping.is_set():
            self.impatient.set()
        self.stopping.set()

    def run(self) -> int:
        """Serve until a signal or until Ray ends; return the exit status."""
        a = self._arguments
        started = time.monotonic()
        start_ray(self._folder)
        try:
            self._ledger = start_ledger(a.replicas[1] + a.queue)  # the actor lives as long as this handle
            http = HTTPOptions(host=a.host, port=a.port)
            serve.start(proxy_location="HeadOnly", http_options=http, logging_config={"log_level": "WARNING"})
            least, most = a.replicas
            app = application(least, most, a.fronts, a.patience)
            say(f"starting {a.replicas[0]} replicas; ctrl-C stops")
            try:
                serve.run(app, name=APP, route_prefix="/")
            except RuntimeError as error:
                say(f"Error: {error} {faults()}")
                return 1
            if self._wait_until_ready():
                seconds = time.monotonic() - started
                where = f"http://{a.host}:{a.port}"
                say(f"ready on {where} after {seconds:.1f} s: {a.replicas[0]} replicas, {a.queue} may wait")
            while not self.stopping.wait(0.5):
                if not ray.is_initialized():
                    return 1
            self._drain()
        finally:
            end_ray()
        say("stopped")
        return 0

    def _wait_until_ready(self) -> bool:
        while not self.stopping.is_set():
            if serve.status().applications[APP].status == "RUNNING" and ray.get(self._ledger.replica.remote()):
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
    return parser


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
    return fleet.run()
