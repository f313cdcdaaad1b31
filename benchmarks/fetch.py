"""`script/bench fetch`: a LoRA's way into the cache beside curl and aria2c, in turn; written to benchmarks/fetch.md.

A local nginx serves 500 MB, once as fast as it can and once at 30 MB/s a connection, as storage hosts do. curl takes
one connection, aria2c up to 16. Ours does more: it checks the address, takes the digest, reads the header and has the
disk confirm. nginx, curl and aria2c are Debian's.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fetching.network import Client
from fetching.store import DiskQuota
from weights import Source, WeightsCache

ROUNDS = 7
SIZE_BYTES = 500 * 10**6
REPORT = Path(__file__).parent / "fetch.md"
RATES = {"unlimited": "0", "30 MB/s a connection": "30m"}
NGINX = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{}}
http {{
  access_log off; sendfile on; server {{ listen 127.0.0.1:{port}; root {folder}/files; limit_rate {rate}; }}
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
}}
"""


def write_file(path: Path) -> None:
    """A safetensors file of SIZE_BYTES of noise."""
    header = {"a": {"dtype": "U8", "shape": [SIZE_BYTES], "data_offsets": [0, SIZE_BYTES]}}
    text = json.dumps(header).encode()
    noise = random.Random(0).randbytes(10**6)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(SIZE_BYTES // len(noise)):
            file.write(noise)


@contextmanager
def serving(folder: Path, rate: str) -> Iterator[str]:
    """The address of the file on a running nginx."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=port, rate=rate))
    with subprocess.Popen(["nginx", "-c", str(config), "-p", str(folder)]) as server:
        try:
            time.sleep(1)
            yield f"http://127.0.0.1:{port}/x.safetensors"
        finally:
            server.terminate()


def ways(address: str, folder: Path) -> dict[str, Callable[[], object]]:
    """Each way to fetch the file into an empty place."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
    aria2c = ["aria2c", "-x16", "-s16", "-k1M", "--file-allocation=none", "-d", str(folder), "-o", "aria", address]

    def ours() -> None:
        authority = address.split("/")[2]
        cache = WeightsCache(folder / "cache", Client(frozenset({authority})), quota=DiskQuota(0))
        with cache.open("x", "", lambda: Source("x", address)):
            pass

    return {
        "ours": ours,
        "curl": lambda: subprocess.run(["curl", "-sS", "-o", str(folder / "curl"), address], **quiet),  # type: ignore[call-overload]
        "aria2c": lambda: subprocess.run(aria2c, **quiet),  # type: ignore[call-overload]
    }


def measure(address: str) -> dict[str, float]:
    """The median seconds of each way, taking turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {}
    for round_ in range(ROUNDS + 1):
        for name in ("ours", "curl", "aria2c"):
            folder = Path(tempfile.mkdtemp(prefix="fetch-"))
            started = time.perf_counter()
            ways(address, folder)[name]()
            if round_:
                seconds.setdefault(name, []).append(time.perf_counter() - started)
            shutil.rmtree(folder)
            os.sync()
    return {name: statistics.median(times) for name, times in seconds.items()}


def row(rate: str, found: dict[str, float]) -> str:
    """A line of the table."""
    best = min(found["curl"], found["aria2c"])
    cells = [f"{found[name]:.2f}" for name in ("ours", "curl", "aria2c")]
    return f"| {rate} | {' | '.join(cells)} | {best / found['ours']:.2f} |"


def main() -> None:
    """Measure both and write the report."""
    with tempfile.TemporaryDirectory(prefix="fetch-server-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "files").mkdir()
        write_file(folder / "files" / "x.safetensors")
        rows = []
        for label, rate in RATES.items():
            with serving(folder, rate) as address:
                rows.append(row(label, measure(address)))
            print(rows[-1])
    table = "\n".join(["| server | ours s | curl s | aria2c s | best peer / ours |", "|---|---|---|---|---|", *rows])
    where = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    REPORT.write_text(
        f"# Fetching 500 MB into the cache\n\nMade by `script/bench fetch` on {where}; medians of {ROUNDS}, taking "
        f"turns. Above 1, ours is the fastest.\n\n{table}\n\nOurs includes digest, header check and the disk's "
        "confirmation (fsync); the peers only write.\n"
    )


if __name__ == "__main__":
    main()
