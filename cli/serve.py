"""Run Cog's HTTP server without Docker, as the image does: behind `script/serve`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from cli.schema import PROJECT, write_schema

READY_SECONDS = 600.0


def start_server(host: str, port: int, *, extra: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """Write the schema and start the server, which loads the models in the background.

    This Python's folder comes first on PATH, because Cog starts its worker as plain `python`.
    """
    write_schema()
    binaries = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
        "PORT": str(port),
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
    }
    command = [sys.executable, "-m", "cog.server.http", "--host", host, *extra]
    return subprocess.Popen(command, cwd=PROJECT, env=environment)


def health(host: str, port: int) -> dict[str, object]:
    """Return the server's health document; empty while nothing answers."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/health-check", timeout=5) as answer:
            document: dict[str, object] = json.load(answer)
            return document
    except (urllib.error.URLError, OSError, json.JSONDecodeError):
        return {}


def wait_until_ready(server: subprocess.Popen[bytes], host: str, port: int, timeout: float = READY_SECONDS) -> str:
    """Wait until setup has ended and return the status: "READY", another health status, "EXITED" or "TIMED OUT"."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.poll() is not None:
            return "EXITED"
        status = health(host, port).get("status")
        if status not in (None, "STARTING", "UNKNOWN"):
            return str(status)
        time.sleep(0.2)
    return "TIMED OUT"


def stop_server(server: subprocess.Popen[bytes], grace_seconds: float = 60.0) -> int:
    """Send SIGTERM, as Docker does, and return the exit status; a running prediction finishes first."""
    server.terminate()
    try:
        return server.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


def main() -> None:
    """The command line: serve until interrupted."""
    parser = argparse.ArgumentParser(prog="script/serve", description="Serve predictions over HTTP, as the image does.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5000, help="port to listen on (default 5000)")
    parser.add_argument("--upload-url", help="PUT the images there instead of returning data URIs")
    arguments = parser.parse_args()
    extra = ("--upload-url", arguments.upload_url) if arguments.upload_url else ()
    server = start_server(arguments.host, arguments.port, extra=extra)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        status = wait_until_ready(server, arguments.host, arguments.port)
        if status != "READY":
            stop_server(server, 5)
            sys.exit(f"The server did not get ready: {status}. Its log is above.")
        print(f"ready on http://{arguments.host}:{arguments.port}, ctrl-C stops it", flush=True)
        sys.exit(server.wait())
    except KeyboardInterrupt:
        sys.exit(stop_server(server))


if __name__ == "__main__":
    main()
