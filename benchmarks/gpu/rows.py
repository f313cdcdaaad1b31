"""The tables of the report: this machine's rates, images, changes, and what a LoRA leaves behind."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import count

from benchmarks.dry_run.times import Rates
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.contenders import PEERS, Ours, Peer, median_seconds
from benchmarks.gpu.loras import Loras
from benchmarks.gpu.rates import floor_seconds, measure_rates
from benchmarks.models import Weights
from benchmarks.plan import CHANGES, NAME_COLUMNS, PRECISIONS, Case, cases
from benchmarks.scales import Scale
from benchmarks.tables import Table, gigabytes
from request import Mode

TIMES = ("seconds", "of steps", "ms a step", "share of the floor", "peak GB")
NUMBERS = count(1)
"""Each image has a prompt of its own, since encoded prompts are kept."""


def rates_table(rates: Rates) -> Table:
    """Beside those that the dry run assumes, in the same order."""
    table = Table("This machine's own kernels", ("kind", "a second"))
    table.rows += [(name, f"{value:.3g}") for name, value in asdict(rates).items()]
    return table


def tables(scale: Scale, clock: Clock, weights: Weights, loras: Loras) -> Iterator[Table]:
    """All tables, in order; each contender is gone before the next is built."""
    rates = measure_rates(scale, clock)
    yield rates_table(rates)
    ours = Ours(weights, loras, clock.device)
    yield from (_images(scale, clock, ours, [case], rates, "Ours") for case in cases(scale.sizes))
    yield changes_table(scale, clock, ours)
    yield unloaded_table(scale, ours)
    del ours
    for name, build in PEERS.items():
        clock.free()
        precision, number = ("fast", 1) if "fp8" in name else ("exact", 0)
        own = [Case(model, precision, Mode.TXT2IMG, scale.sizes[0], number) for model in scale.steps]
        yield _images(scale, clock, Peer(build, weights, scale, loras), own, rates, name)


def _images(scale: Scale, clock: Clock, contender: Ours | Peer, own: Sequence[Case], rates: Rates, title: str) -> Table:
    """A row a case. The first image, which builds and compiles what is not there yet, is not timed."""
    table = Table(title, (*NAME_COLUMNS, *TIMES))
    for case in own:
        steps = scale.steps[case.model] if case.size == scale.sizes[0] else scale.few_steps
        clock.free()
        _make(contender, case, 2)
        with clock.steps_of(contender.transformer(case)) as marks:
            taken = median_seconds(clock, partial(_make, contender, case, steps), scale.runs)
        step = statistics.median(clock.seconds(*mark) for mark in marks)
        tokens = case.size.width * case.size.height // 256 + scale.text_tokens[case.model]
        share = floor_seconds(scale, tokens, rates, case.precision) / step
        figures = (f"{taken:.3f}", steps, f"{1e3 * step:.1f}", f"{share:.2f}", gigabytes(clock.peak_bytes()))
        table.rows.append((*case.name, *figures))
    return table


def _make(contender: Ours | Peer, case: Case, steps: int) -> None:
    contender.make(case, f"a circle {next(NUMBERS)}", steps)


def changes_table(scale: Scale, clock: Clock, ours: Ours) -> Table:
    """The dry run's changes; a round goes through all of them, and the first is not timed."""
    table = Table("Changes of the fp8 copy", ("change", "ms, median", "ms, most", "of"))
    times: dict[str, list[float]] = {change.name: [] for change in CHANGES}
    for _ in range(scale.runs + 1):
        for change in CHANGES:
            clock.finish()
            start = clock.mark()
            ours.change(change)
            times[change.name].append(1e3 * clock.seconds(start, clock.mark()))
    for name, taken in times.items():
        table.rows.append((name, f"{statistics.median(taken[1:]):.2f}", f"{max(taken[1:]):.2f}", len(taken) - 1))
    return table


def unloaded_table(scale: Scale, ours: Ours) -> Table:
    """Images of dev without LoRAs before and after it carried one, compared to the bit."""
    table = Table("What a LoRA leaves behind", ("precision", "the image without it"))
    for precision in PRECISIONS:
        plain, changed = (Case("dev", precision, Mode.TXT2IMG, scale.sizes[0], number) for number in (0, 1))
        before, between, after = (ours.make(case, "the same", 2) for case in (plain, changed, plain))
        table.require(before != between, f"{precision}: the LoRA changed nothing")
        table.require(before == after, f"{precision}: the image is another one")
        table.rows.append((precision, "equal to the bit" if before == after else "NOT equal"))
    return table
