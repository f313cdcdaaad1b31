"""What happens between a click and the images: predictions one after another, told as a row of views. Knows no page."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from studio import runs
from studio.client import (
    CANCELLED,
    PAUSE_SECONDS,
    Answer,
    Prediction,
    RefusedError,
    Server,
    StudioError,
    not_ready,
    payload,
    succeeded,
    wait_for_slot,
)
from studio.form import Field, Inputs
from studio.runs import Run
from studio.webhook import Webhook, images_done, seed_of, step_of, without_bars

MOST_SWEPT = 16


@dataclass(frozen=True)
class View:
    """What the page shows at one moment."""

    message: str
    state: str = "running"
    """running, done, warning or error."""
    fraction: float | None = None
    """Of the running prediction; None while it is unknown."""
    log: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    """What is wrong with which input."""
    runs: tuple[Run, ...] = ()
    """The runs that have ended, in order."""


@dataclass(frozen=True)
class Desk:
    """What all runs of one page share."""

    server: Server
    fields: tuple[Field, ...]
    root: Path
    webhook: Webhook | None = None


def work(desk: Desk, jobs: Sequence[Inputs], start: Callable[[Prediction], bool]) -> Iterator[View]:
    """Run the jobs in order and yield what happens; the last view says how it ended.

    Args:
        desk: the server, its inputs, and where runs are kept.
        jobs: inputs of each prediction. Without a seed of their own all get the first one's.
        start: is told each prediction before it starts, so that it can be cancelled; False ends the work.
    """
    ended: tuple[Run, ...] = ()
    seed: int | None = None
    view = View("")
    try:
        for number, job in enumerate(jobs):
            inputs = job if seed is None else {"seed": seed, **job}
            for view in _one(desk, inputs, start):
                where = f"{number + 1} of {len(jobs)}: " if len(jobs) > 1 else ""
                ended = (*ended, *view.runs)
                yield replace(view, message=where + view.message, state="running", runs=ended)
            seed = ended[-1].inputs.get("seed")
        yield replace(view, message=f"{len(jobs)} runs; the last: " * (len(jobs) > 1) + view.message, runs=ended)
    except RefusedError as error:
        yield View(f"The server refused {error}", "error", refused=dict(error.fields), runs=ended)
    except StudioError as error:
        yield View(str(error), "warning" if str(error) == CANCELLED else "error", log=view.log, runs=ended)


def _one(desk: Desk, inputs: Inputs, start: Callable[[Prediction], bool]) -> Iterator[View]:
    log = ""
    answer: Answer | None = None
    for event in _answered(desk, payload(inputs), start):
        if isinstance(event, View):
            yield event
        elif isinstance(event, Answer):
            answer = event
        else:
            log = event or log
            yield _progress(log, int(inputs.get("num_outputs", 1)))
    assert answer is not None  # noqa: S101 - the events end with it, or raise
    document = succeeded(answer)
    log = without_bars(str(document.get("logs", "")))
    seed = document.get("metrics", {}).get("seed", seed_of(log))
    known = {field.name for field in desk.fields}
    used = {**inputs, "seed": seed} if seed is not None and "seed" in known else dict(inputs)
    run = runs.keep(desk.root, desk.fields, used, document, log)
    runs.remove(runs.leaving(runs.kept(desk.root)))
    yield _ended(document, run, log)


def _answered(desk: Desk, inputs: dict[str, Any], start: Callable[[Prediction], bool]) -> Iterator[View | Answer | str]:
    """Yield a prediction's events up to its answer, asking again while the server starts or frees its slot."""
    asked = time.monotonic()
    while True:
        answer = yield from _sent(desk, inputs, start)
        if answer.status == 409 and wait_for_slot(asked):
            continue
        if answer.status == 409:
            raise StudioError("The server is busy with another prediction and has no queue. Run again when it is done.")
        if answer.status != 503:
            yield answer
            return
        if reason := not_ready(desk.server.health()):
            raise StudioError(reason)
        yield View("The server is loading its models; the run starts when they are there.")
        time.sleep(PAUSE_SECONDS)
        asked = time.monotonic()


def _sent(
    desk: Desk, inputs: dict[str, Any], start: Callable[[Prediction], bool]
) -> Generator[View | Answer | str, None, Answer]:
    """Send a prediction once, yield its growing log, and return the answer."""
    prediction = Prediction(desk.server, inputs, desk.webhook)
    if not start(prediction):
        raise StudioError(CANCELLED)
    begun = False
    try:
        for event in prediction.events():
            if isinstance(event, Answer):
                return event
            begun = begun or bool(event)
            yield event
    except (OSError, http.client.HTTPException) as error:
        raise StudioError(_gone(desk.server, error, begun, prediction.cancelled.is_set())) from error
    raise StudioError(f"The server at {desk.server.url} gave no answer.")


def _gone(server: Server, error: Exception, begun: bool, cancelled: bool) -> str:
    if cancelled:
        return CANCELLED
    if isinstance(error, ConnectionRefusedError) or not (begun or isinstance(error, ConnectionError)):
        return server.unreachable(error)
    return f"The server at {server.url} went away during the run. Start it again, and run again."


def _progress(log: str, images: int) -> View:
    step, done = step_of(log), images_done(log)
    text = without_bars(log)
    if step is None:
        return View(text.splitlines()[-1] if text else "Sent; waiting for the first step.", log=text)
    which = f"Image {min(done + 1, images)} of {images}, step" if images > 1 else "Step"
    return View(f"{which} {step[0]} of {step[1]}", fraction=step[0] / max(step[1], 1), log=text)


def _ended(document: dict[str, Any], run: Run, log: str) -> View:
    metrics = document.get("metrics", {})
    withheld = int(metrics.get("safety_withheld", 0))
    made = f"{len(run.images)} image" + "s" * (len(run.images) != 1)
    message = f"{made} in {float(metrics.get('predict_time', 0)):.1f} s, seed {run.inputs.get('seed', 'unknown')}."
    if len(run.images) < len(document.get("output") or ()):
        message += " The server uploads its images elsewhere: " + ", ".join(map(str, document["output"]))
    if withheld:
        message += f" The safety checker withheld {withheld} more."
    loras = [line for line in log.splitlines() if line.startswith("LoRA ") and ": scale " in line]
    message = "\n".join((message, *loras))
    return View(message, "warning" if withheld else "done", 1.0, log, runs=(run,))


def sweep(inputs: Inputs, field: Field, values: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a job for each value of one input.

    Raises:
        StudioError: no values, or too many.
    """
    if not 1 <= len(values) <= MOST_SWEPT:
        raise StudioError(f"A sweep takes 1 to {MOST_SWEPT} values, separated by commas; {len(values)} were given.")
    return [{**inputs, field.name: value} for value in values]
