"""One predictor as a child of a replica: the project's own server, in the project's own environment.

Between the replica and the server stands a guardian: this module, run as a program. It ends the server when its own
standard input closes, which the kernel does however the replica ends. It leaves the replica's process tree, since Ray
kills the children of a worker that ends, and a killed guardian guards nothing. On Linux it inherits what a killed
server leaves behind, and ends that too.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

PROJECT = Path(__file__).parent.parent
SERVER = (str(PROJECT / ".venv" / "bin" / "python"), "-m", "cli.serve")
GRACE_SECONDS = 5.0
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
"""Of prctl(2) on Linux."""
SEAT = "{seat}"
"""Stands in FLUX_CACHE_DIR for the replica's seat."""


def prediction_path(id: str) -> str:
    """A prediction's path on the server, `/predictions/<id>`: one segment, whatever the id is made of.

    Dots are escaped too, since clients take the segments "." and ".." out of a path.
    """
    return f"/predictions/{quote(id, safe='').replace('.', '%2E')}"


class Child:
    """The server on a free port of the loopback interface."""

    def __init__(self, seat: str, threads: int | None = None) -> None:
        """Start it.

        Args:
            seat: the replica's, for a cache folder of its own.
            threads: how many torch may use on the CPU; None leaves it to torch, which takes every core.
        """
        self.port = free_port()
        self._guardian = subprocess.Popen(
            [sys.executable, "-m", "cluster.child", *SERVER, "--port", str(self.port)],
            cwd=PROJECT,
            env={**os.environ, **own_environment(os.environ, seat, threads), "PYTHONPATH": str(PROJECT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._guardian.wait()  # it goes on in a process that is not our child

    @property
    def address(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether it has not ended: the guardian holds its standard output open, and writes nothing."""
        return not self._ends_within(0)

    def end(self) -> None:
        """End it and wait for it."""
        if self._guardian.stdin is not None:
            self._guardian.stdin.close()
        self._ends_within(2 * GRACE_SECONDS)

    def _ends_within(self, seconds: float) -> bool:
        return bool(self._guardian.stdout and select.select([self._guardian.stdout], [], [], seconds)[0])


def own_environment(given: Mapping[str, str], seat: str, threads: int | None) -> dict[str, str]:
    """The variables of a child that differ from those of the fleet: its cache folder and its share of the cores."""
    folder = given.get("FLUX_CACHE_DIR", "")
    own = {"FLUX_CACHE_DIR": folder.replace(SEAT, seat)} if SEAT in folder else {}
    return own if threads is None else {**own, "OMP_NUM_THREADS": str(threads)}


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def guard(command: list[str]) -> None:
    """Run a command until it ends or standard input closes; nothing of it is left. It prints to standard error."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        preexec_fn=_end_with_guardian,  # no thread runs yet
    )

    def end_with_replica() -> None:
        sys.stdin.buffer.read()
        for _ in range(2):  # the second one does not wait for a running prediction
            server.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(0.2)
        try:
            server.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()

    threading.Thread(target=end_with_replica, daemon=True).start()
    server.wait()
    while orphans := _children():
        for pid in orphans:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _end_with_guardian() -> None:
    """Have the kernel send SIGTERM to this process when its parent dies, where it can."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _children() -> list[int]:
    """This process's, by /proc; none where there is no such folder."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parent = status.read_text().rpartition(")")[2].split()[1]  # after the name, which may hold anything
            found += [int(status.parent.name)] if int(parent) == os.getpid() else []
    return found


def main() -> None:
    """Leave the process tree, then guard."""
    if os.fork():
        os._exit(0)
    os.setsid()
    guard(sys.argv[1:])


if __name__ == "__main__":
    main()
