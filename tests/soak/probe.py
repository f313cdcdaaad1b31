"""What may not grow, sampled from /proc and the folders, and the slope of each with its confidence."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

EVERY_SECONDS = 5.0
WARM_UP = 0.2
"""The part of the run at whose end the growth begins to count: caches fill before."""
BLOCK_SECONDS = 60.0
"""Samples are averaged over this long before the slope is fitted, since neighbours are not independent."""
UNITS = {
    "resident memory": "MiB", "server's resident memory": "MiB", "open files": "", "server's open files": "",
    "threads": "", "temporary files": "", "partial downloads": "", "cached LoRAs": "", "index lines": "",
}  # fmt: skip


@dataclass(frozen=True)
class Slope:
    """How fast something grows, per hour, with its 95 % confidence interval."""

    per_hour: float
    low: float
    high: float
    mean: float

    @property
    def grows(self) -> bool:
        """Whether growth is certain at that confidence."""
        return self.low > 0


@dataclass
class Probe:
    """Samples of one server and its worker, taken by a thread."""

    server: int
    worker: int
    temporary: Path
    cache: Path
    seconds: list[float] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in UNITS})
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Sample from now on."""
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            try:
                found = self._sample()
            except FileNotFoundError:  # a process has ended: the run finds that out by itself
                continue
            self.seconds.append(time.monotonic() - self._started)
            for name, value in found.items():
                self.samples[name].append(value)

    def _sample(self) -> dict[str, float]:
        return {
            "resident memory": _resident_mebibytes(self.worker),
            "server's resident memory": _resident_mebibytes(self.server),
            "open files": len(os.listdir(f"/proc/{self.worker}/fd")),  # noqa: PTH208
            "server's open files": len(os.listdir(f"/proc/{self.server}/fd")),  # noqa: PTH208
            "threads": len(os.listdir(f"/proc/{self.worker}/task")),  # noqa: PTH208
            "temporary files": sum(len(files) for _, _, files in os.walk(self.temporary)),
            "partial downloads": len(list((self.cache / "partial").iterdir())),
            "cached LoRAs": len(list((self.cache / "blobs").iterdir())),
            "index lines": len(list((self.cache / "index").iterdir())),
        }

    def slope(self, name: str) -> Slope:
        """The growth after the warm-up: least squares over means of a minute."""
        seconds, values = np.array(self.seconds), np.array(self.samples[name])
        late = seconds > WARM_UP * seconds[-1]
        seconds, values = seconds[late], values[late]
        block = min(BLOCK_SECONDS, (seconds[-1] - seconds[0]) / 6)
        places = ((seconds - seconds[0]) // block).astype(int)
        hours = np.array([seconds[places == place].mean() / 3600 for place in np.unique(places)])
        means = np.array([values[places == place].mean() for place in np.unique(places)])
        if np.ptp(means) == 0:
            return Slope(0.0, 0.0, 0.0, float(means[0]))
        fit = stats.linregress(hours, means)
        margin = float(stats.t.ppf(0.975, len(hours) - 2) * fit.stderr)
        return Slope(float(fit.slope), float(fit.slope) - margin, float(fit.slope) + margin, float(means.mean()))


def _resident_mebibytes(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
