"""Run Cog's HTTP server without Docker, as the image does, and watch over it: behind `script/serve`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cli.schema import PROJECT, write_schema
from cli.server_log import Console, ServerLog

READY = ("READY", "BUSY")
POLL_SECONDS = 0.5
"""Between two looks at the server's health; each takes the predictor about a millisecond."""
SILENT_SECONDS = 60.0
"""How long the server may leave questions about its health unanswered."""
WEBHOOK_SECONDS = 1.0
"""After an asynchronous prediction: its slot is free before its last webhook is sent."""
KILL_SECONDS = 0.3
"""After the last answer. Python takes 1 to 4 s to tear down a worker that has nothing left to do."""
LONGEST_BACK_OFF_SECONDS = 60.0
STABLE_SECONDS = 600.0
"""A server that ran this long starts the back-off anew."""


def start_server(
    host: str,
    port: int,
    *,
    extra: tuple[str, ...] = (),
    predictor: str = "predict.py:Predictor",
    temporary: Path | None = None,
    output: int | None = None,
) -> subprocess.Popen[str]:
    """Write the schema and start the server, which loads the models in the background.

    This Python's folder comes first on PATH, because Cog starts its worker as plain `python`.

    Args:
        host: address to listen on.
        port: likewise.
        extra: further arguments of Cog's server.
        predictor: the predictor's file and class.
        temporary: the temporary folder of the server and its worker.
        output: where its output goes, as for `subprocess.Popen`.
    """
    write_schema()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PORT": str(port),
        "COG_PREDICT_TYPE_STUB": predictor,
    }
    if environment.get("FLUX_METRICS_PORT", "").isdecimal():  # the metrics listen where the predictions do
        environment["FLUX_METRICS_PORT"] = f"{host}:{environment['FLUX_METRICS_PORT']}"
    if temporary is not None:
        environment["TMPDIR"] = str(temporary)
    command = [sys.executable, "-m", "cog.server.http", "--host", host, *extra]
    return subprocess.Popen(
        command,
        cwd=PROJECT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        text=True,
        start_new_session=True,  # ctrl-C in a terminal reaches only the process that watches
    )


def health(host: str, port: int) -> dict[str, object]:
    """Return the server's health document; empty while nothing answers. A proxy of the environment is not asked."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{address(host, port)}/health-check", timeout=12) as answer:
            document: dict[str, object] = json.load(answer)
            return document
    except (urllib.error.URLError, OSError, json.JSONDecodeError):
        return {}


def address(host: str, port: int) -> str:
    """Return the base URL of a server that listens on this host and port."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def wait_until_ready(server: subprocess.Popen[str], host: str, port: int, timeout: float = float("inf")) -> str:
    """Wait until setup has ended and return the status: "READY", another health status, "EXITED" or "TIMED OUT"."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.poll() is not None:
            return "EXITED"
        status = health(host, port).get("status")
        if status not in (None, "STARTING", "UNKNOWN"):
            return "READY" if status in READY else str(status)
        time.sleep(0.2)
    return "TIMED OUT"


def stop_server(server: subprocess.Popen[str], grace_seconds: float = 60.0) -> int:
    """Send SIGTERM, as Docker does, and return the exit status; a running synchronous prediction finishes first."""
    server.terminate()
    try:
        return server.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        kill(server)
        return server.wait()


def kill(server: subprocess.Popen[str]) -> None:
    """End the server and its worker at once."""
    with suppress(ProcessLookupError):  # it has ended already
        os.killpg(server.pid, signal.SIGKILL)


def reap_orphans() -> None:
    """Read the status of ended processes that became ours: as a container's first process we inherit the worker."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def require_free_port(host: str, port: int) -> None:
    """Make sure that the address can be listened on.

    Raises:
        OSError: it cannot; the message says why.
    """
    family, _, _, _, bound = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(bound)


@dataclass
class Health:
    """What the answers about one server's health came to so far."""

    answered_at: float = field(default_factory=time.monotonic)
    complaint: str = ""
    """What is wrong and does not end the server."""

    def fault(self, document: dict[str, object]) -> str | None:
        """Return why the server has to be ended, None while it may go on.

        A full disk does not end it: a restart would not help, and `complaint` says so. A check that takes too long
        counts as unanswered, since the machine may merely be overloaded.
        """
        status = str(document.get("status", "no answer"))
        reason = str(document.get("user_healthcheck_error") or "").removeprefix("Healthcheck failed: ")
        if status in READY or "DiskError" in reason:
            self.answered_at, self.complaint = time.monotonic(), reason
            return None
        if not document or "timed out" in reason:
            silent = time.monotonic() - self.answered_at
            return f"no answer about its health for {silent:.0f} s" if silent > SILENT_SECONDS else None
        return f"{status}: {reason}" if reason else status


class Supervisor:
    """Starts the server, watches it, and ends it on a signal."""

    def __init__(self, host: str, port: int, extra: tuple[str, ...], console: Console) -> None:
        self._host = host
        self._port = port
        self._extra = extra
        self._say = console.say
        self._console = console
        self._server: subprocess.Popen[str] | None = None
        self.stopping = 0
        """How many signals asked for the end."""

    def on_signal(self, *_: object) -> None:
        """Remember that the end is wanted; a second signal does not wait for a running prediction."""
        self.stopping += 1
        if self.stopping > 1 and self._server is not None:
            kill(self._server)

    def run(self) -> str | None:
        """Serve until a signal, POST /shutdown or a fault; return the fault, if there was one. Nothing of the server is
        left."""
        with tempfile.TemporaryDirectory(prefix="flux-serve-", ignore_cleanup_errors=True) as temporary:
            server = start_server(
                self._host, self._port, extra=self._extra, temporary=Path(temporary), output=subprocess.PIPE
            )
            self._server = server
            log = ServerLog(server.stdout or (), self._console.log)
            try:
                return self._serve(server, log)
            finally:
                kill(server)
                server.wait()
                log.join()
                reap_orphans()

    def _serve(self, server: subprocess.Popen[str], log: ServerLog) -> str | None:
        if fault := self._load(server, log):
            return fault
        watched = Health()
        while not self.stopping:
            if server.poll() is not None:
                if server.returncode == 0:  # as POST /shutdown asked
                    self._say("stopped")
                    return None
                return f"the server has ended with status {server.returncode}"
            said = watched.complaint
            if fault := watched.fault(health(self._host, self._port)):
                return fault
            if watched.complaint != said:
                self._say(f"unhealthy: {watched.complaint}" if watched.complaint else "healthy again")
            self._wait(POLL_SECONDS)
        self._drain(server, log)
        return None

    def _load(self, server: subprocess.Popen[str], log: ServerLog) -> str | None:
        self._say(f"loading, then serving on {address(self._host, self._port)}; ctrl-C stops it")
        started = time.monotonic()
        status = "TIMED OUT"
        while status == "TIMED OUT" and not self.stopping:
            status = wait_until_ready(server, self._host, self._port, timeout=0.1)
        if self.stopping:
            return None
        if status != "READY":
            kill(server)
            log.join()
            log.show_held()
            return f"the server did not get ready: {status}"
        log.drop_held()
        self._say(f"ready on {address(self._host, self._port)} after {time.monotonic() - started:.1f} s")
        return None

    def _drain(self, server: subprocess.Popen[str], log: ServerLog) -> None:
        """Let a running prediction finish and its answer or webhook be sent, then end the server.

        At SIGTERM coglet 0.23 waits for synchronous predictions alone and loses asynchronous ones, hence the wait.
        """
        if self._is_busy():
            self._say("finishing the running prediction; ctrl-C again ends it at once")
            while self.stopping == 1 and self._is_busy():
                time.sleep(0.05)
            self._wait(WEBHOOK_SECONDS, stopping=1)
        server.terminate()
        while self.stopping == 1 and server.poll() is None and not log.answered.wait(0.05):
            pass
        try:
            server.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            kill(server)
        self._say("stopped")

    def _is_busy(self) -> bool:
        return health(self._host, self._port).get("status") == "BUSY"

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond a signal."""
        self._wait(seconds)

    def _wait(self, seconds: float, stopping: int = 0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.stopping <= stopping:
            time.sleep(0.05)


def supervise(supervisor: Supervisor, restart: bool, console: Console) -> int:
    """Serve until a signal, or until a fault that ends it; return the exit status.

    With `restart` a fault starts the server anew, after a pause that doubles from 1 s to a minute; a server that ran
    for ten minutes starts the doubling anew.
    """
    pause = 1.0
    while True:
        started = time.monotonic()
        fault = supervisor.run()
        if fault is None or supervisor.stopping:
            return 0
        console.error(fault)
        if not restart:
            return 1
        pause = 1.0 if time.monotonic() - started > STABLE_SECONDS else pause
        console.say(f"starting again in {pause:.0f} s")
        supervisor.wait(pause)
        if supervisor.stopping:
            return 0
        pause = min(2 * pause, LONGEST_BACK_OFF_SECONDS)


def main() -> None:
    """The command line. Exit status: 0 after ctrl-C, SIGTERM or POST /shutdown, 1 after a fault, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="script/serve", description="Serve predictions over HTTP, as the image does.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5000, help="port to listen on (default 5000)")
    parser.add_argument("--upload-url", help="PUT the images there instead of returning data URIs")
    parser.add_argument("--restart", action="store_true", help="start the server again when it fails")
    arguments = parser.parse_args()
    try:
        require_free_port(arguments.host, arguments.port)
    except OSError as error:
        sys.exit(
            f"Error: cannot listen on {arguments.host}, port {arguments.port}: {error.strerror}. "
            "Choose another one with --port."
        )
    extra = ("--upload-url", arguments.upload_url) if arguments.upload_url else ()
    console = Console(os.environ.get("FLUX_LOG_FORMAT", "text"))
    supervisor = Supervisor(arguments.host, arguments.port, extra, console)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, supervisor.on_signal)
    sys.exit(supervise(supervisor, arguments.restart, console))


if __name__ == "__main__":
    main()
