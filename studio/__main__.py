"""The command line: `script/studio [--target URL] [--port P]`."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from studio.client import Server, StudioError
from studio.form import fields_of
from studio.guard import Guard
from studio.webhook import Webhook
from studio.work import Desk

PROJECT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
PATIENCE_SECONDS = 60.0
"""For the server's OpenAPI document, which it has before its models."""
STOP_SECONDS = 90.0


@contextmanager
def own_server() -> Iterator[str]:
    """Run `script/serve` on a free port, its address being the value, and end it."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    environment = {"FLUX_METADATA": "prompt", **os.environ}  # this machine's images may name their prompt
    command = [str(PROJECT / "script" / "serve"), "--host", HOST, "--port", str(port)]
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        yield f"http://{HOST}:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for_inputs(server: Server) -> dict[str, Any]:
    """Return the server's OpenAPI document as soon as it has one.

    Raises:
        StudioError: it does not have one for a minute.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return server.openapi()
        except StudioError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@contextmanager
def private_files() -> Iterator[None]:
    """Let Gradio keep what is uploaded and shown in a folder that only this user reads, and remove it."""
    with tempfile.TemporaryDirectory(prefix="flux-studio-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            yield
        finally:
            tempfile.tempdir = None


def serve(desk: Desk, port: int) -> None:
    """Serve the page until a signal."""
    import fastapi
    import gradio as gr
    import uvicorn

    from studio.page import CSS, HEAD, READABLE, Page

    blocks = Page(desk).build()
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(**READABLE)
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        blocks,
        path="/",
        server_name=HOST,
        server_port=port,
        allowed_paths=[str(desk.root)],
        footer_links=[],
        run_history=False,
        max_file_size="100mb",
        ssr_mode=False,
        theme=theme,
        css=CSS,
        head=HEAD,
    )
    config = uvicorn.Config(
        Guard(app, port), host=HOST, port=port, log_level="warning", timeout_graceful_shutdown=1, proxy_headers=False
    )
    print(f"studio on http://{HOST}:{port}, images kept in {desk.root}; ctrl-C stops it", flush=True)
    uvicorn.Server(config).run()


def main() -> None:
    """Parse the arguments and serve. Exit status: 0 after ctrl-C or SIGTERM, 1 without a server, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="script/studio", description="A page for the predictor, on this machine.")
    parser.add_argument("--target", help="a running Cog server; without it script/serve is started and ended")
    parser.add_argument("--port", type=int, default=7860, help="port of the page (default 7860)")
    parser.add_argument(
        "--folder", type=Path, default=PROJECT / "output.studio", help="where runs are kept (default output.studio)"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind((HOST, arguments.port))
    except OSError as error:
        sys.exit(f"Error: cannot listen on port {arguments.port}: {error.strerror}. Choose another one with --port.")
    root = arguments.folder.expanduser().absolute()
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with ExitStack() as stack:
            stack.enter_context(private_files())
            server = Server(arguments.target or stack.enter_context(own_server()))
            desk = Desk(server, fields_of(wait_for_inputs(server)), root, Webhook())
            serve(desk, arguments.port)
    except StudioError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
