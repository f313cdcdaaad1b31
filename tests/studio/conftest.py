"""One real server of the tiny model for all tests of the page's parts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.serve import start_server, stop_server, wait_until_ready
from studio.client import Server
from studio.form import fields_of
from studio.webhook import Webhook
from studio.work import Desk
from tests.cli.test_serve import free_port


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FLUX_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        environment.setenv("FLUX_CACHE_MIN_FREE_GB", "0")
        environment.setenv("FLUX_METADATA", "prompt")
        with Path(os.devnull).open("w") as nowhere:
            process = start_server("127.0.0.1", port, output=nowhere.fileno())
    assert wait_until_ready(process, "127.0.0.1", port, timeout=120) == "READY"
    yield Server(f"http://127.0.0.1:{port}")
    stop_server(process, grace_seconds=5)


@pytest.fixture
def desk(server: Server, tmp_path: Path) -> Iterator[Desk]:
    webhook = Webhook()
    yield Desk(server, fields_of(server.openapi()), tmp_path / "runs", webhook)
    webhook.close()
