"""The soak's table and plot for docs/robustness.md."""

from __future__ import annotations

import io
import os
import platform
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image

from tests.soak.probe import UNITS, WARM_UP, Probe
from tests.soak.run import Tally

mpl.use("Agg")
from matplotlib import pyplot as plt

BEGIN, END = "<!-- script/soak -->", "<!-- end of script/soak -->"
PLOTTED = ("resident memory", "open files", "threads", "temporary files")


def table(tally: Tally, probe: Probe) -> str:
    """The figures in Markdown."""
    outcomes, hours = tally.outcomes, probe.seconds[-1] / 3600
    faults = sum(tally.kinds.values())
    injected, wrong = outcomes["fault"] + outcomes["fault in other words"], outcomes["wrong image"]
    share = 100 * outcomes["good"] / max(1, tally.good)
    refused, in_time = outcomes["refused"], outcomes["cancelled"]
    waits = np.array(tally.cancel_seconds or [0.0])
    lines = [
        f"{hours * 60:.0f} minutes on {os.cpu_count()} cores, {platform.machine()}, the tiny profile, "
        f"{tally.sent:,} predictions; the server's own metrics count {tally.counted:,.0f}.",
        "",
        "| requests | number | came out as |",
        "|---|---|---|",
        f"| good | {tally.good:,} | {outcomes['good']:,} with their golden bytes ({share:.2f} %), {wrong} wrong, "
        + f"{outcomes['good failed']} failed; median {np.median(tally.seconds):.2f} s |",
        f"| with an injected fault | {faults:,}, of {len(tally.kinds)} kinds and stages | {injected:,} failed with an "
        + f"error, {outcomes['fault not reached']:,} did not reach the stage and gave their golden bytes, "
        + f"{outcomes['fault wrong']} came out wrong |",
        f"| that cannot be served | {refused + outcomes['not refused']:,} | {refused:,} refused |",
        f"| cancelled | {in_time + outcomes['cancelled too late']:,} | {in_time:,} in time; "
        + f"slot free after {np.median(waits):.2f} s (median), {waits.max():.2f} s (most) |",
        "",
        f"| of the worker, where it does not say server | mean | growth an hour after the first {WARM_UP:.0%} | 95 % |",
        "|---|---|---|---|",
    ]
    for name, unit in UNITS.items():
        slope = probe.slope(name)
        growth = f"{slope.per_hour:+.2f} {unit} | {slope.low:+.2f} to {slope.high:+.2f}"
        lines.append(f"| {name} | {slope.mean:,.1f} {unit} | {growth} |")
    return "\n".join(lines) + "\n"


def plot(probe: Probe, path: Path) -> None:
    """What may not grow, over the minutes of the run, as a WebP file."""
    figure, axes = plt.subplots(len(PLOTTED), 1, sharex=True, figsize=(9, 8), layout="constrained")
    minutes = np.array(probe.seconds) / 60
    for axis, name in zip(axes, PLOTTED, strict=True):
        axis.plot(minutes, probe.samples[name], linewidth=0.8)
        axis.set_ylabel(f"{name}{', ' + UNITS[name] if UNITS[name] else ''}")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minutes")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    with Image.open(buffer) as image:
        image.convert("RGB").save(path, "WEBP", quality=80)


def write(document: Path, tally: Tally, probe: Probe) -> None:
    """Put the table between the document's marks, and the plot beside it."""
    text = document.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    document.write_text(f"{before}\n{table(tally, probe)}{after}")
    plot(probe, document.with_name("soak.webp"))
