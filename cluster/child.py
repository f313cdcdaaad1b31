"""One predictor as a child of a replica: the project's own server, in the project's own environment.

Between the replica and the server stands this module run as a program: it ends the server when its standard input
closes, which the kernel does however the replica ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

PROJECT = Path(__file__).parent.parent
SERVER = (str(PROJECT / ".venv" / "bin" / "python"), "-m", "cli.serve")
GRACE_SECONDS = 5.0


class Child:
    """The server on a free port of the loopback interface."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.child", *SERVER, "--port", str(self.port)],
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def address(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def end(self) -> None:
        """End it and wait for it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2 * GRACE_SECONDS)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def main() -> None:
    """Run a command until it ends or standard input closes; its exit status is ours."""
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        for _ in range(2):  # the second one does not wait for a running prediction
            server.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(0.2)
        try:
            server.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()

    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(server.wait())


if __name__ == "__main__":
    main()
