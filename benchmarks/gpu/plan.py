"""Which rows are measured, in which order, and in how much of the time. Knows no models.

The rows that matter come first within a stage, and every stage has a part of the time, so that each contender gets its
first rows. What a stage leaves over goes to those after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.gpu.scales import Scale

OURS_FAST, OURS_EXACT = "ours, fast", "ours, exact"
EAGER, COMPILED = "diffusers", "diffusers compiled"
HOTSWAP, CACHED = "diffusers fp8, hotswap", "cache-dit"
DEV, SCHNELL = "dev", "schnell"
SWAP, SWITCH, UNLOAD = "swap LoRA", "switch model", "unload LoRA"


@dataclass(frozen=True)
class Case:
    """A row of times: who makes which image with how many LoRAs."""

    contender: str
    model: str
    width: int
    height: int
    loras: int
    rank: int
    """Of each LoRA; 0 without."""
    whole: bool
    """Whether all steps of an image are run; a few of them otherwise, and the rest is worked out."""


@dataclass(frozen=True)
class Change:
    """A row about changes of what a contender carries."""

    contender: str
    what: str
    rank: int


Job = Case | Change


@dataclass(frozen=True)
class Stage:
    """What is measured with one contender in memory; it is gone before the next is built."""

    name: str
    part: float
    """Of the time, relative to the other stages."""
    jobs: tuple[Job, ...]


def stages(scale: Scale) -> tuple[Stage, ...]:
    """All stages, in order. cache-dit changes diffusers' pipeline class for good, so it is the last."""
    low, high = scale.ranks
    return (
        Stage("ours", 5, tuple(_ours(scale))),
        Stage(COMPILED, 1.6, tuple(_peer(scale, COMPILED, (DEV, SCHNELL)))),
        Stage(EAGER, 1.2, tuple(_peer(scale, EAGER, (DEV, SCHNELL)))),
        Stage(
            HOTSWAP,
            1.6,
            (
                *_peer(scale, HOTSWAP, (DEV,), low),
                Change(HOTSWAP, SWAP, low),
                *_peer(scale, HOTSWAP, (SCHNELL,), low),
                *_peer(scale, HOTSWAP, (DEV,), high)[:1],
            ),
        ),
        Stage(CACHED, 0.6, tuple(_peer(scale, CACHED, (DEV,), whole=True))),
    )


def _ours(scale: Scale) -> Iterable[Job]:
    low, high = scale.ranks
    stacks = ((0, 0), (1, low), (2, low))
    large_stacks = ((1, high), (2, high))
    both = (OURS_FAST, OURS_EXACT)
    main, *others = scale.sizes

    def cases(model: str, size: tuple[int, int], stacks: Sequence[tuple[int, int]]) -> list[Case]:
        whole = size == main or scale.steps[model] <= scale.few_steps
        return [Case(who, model, *size, *stack, whole) for who in both for stack in stacks]

    yield from cases(DEV, main, stacks)
    yield from (Change(who, SWAP, low) for who in both)
    yield Change(OURS_FAST, SWITCH, 0)
    yield from (Change(who, UNLOAD, low) for who in both)
    yield from cases(SCHNELL, main, stacks)
    yield from cases(DEV, main, large_stacks)
    yield from (Change(who, SWAP, high) for who in both)
    for model in (DEV, SCHNELL):
        for size in others:
            yield from cases(model, size, stacks)
    yield from cases(SCHNELL, main, large_stacks)
    for model in (DEV, SCHNELL):
        for size in others:
            yield from cases(model, size, large_stacks)


def _peer(scale: Scale, name: str, models: Sequence[str], rank: int = 0, whole: bool = False) -> list[Case]:
    main = scale.sizes[0]
    return [
        Case(name, model, *size, int(rank > 0), rank, whole or size == main or scale.steps[model] <= scale.few_steps)
        for model in models
        for size in scale.sizes
    ]


class Budget:
    """The time of the whole run, handed out to the stages."""

    def __init__(self, seconds: float) -> None:
        self._started = time.monotonic()
        self._ends = self._started + seconds

    @property
    def used_seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started

    @property
    def is_spent(self) -> bool:
        """Whether no more may begin."""
        return time.monotonic() >= self._ends

    def deadline(self, stage: Stage, later: Sequence[Stage]) -> float:
        """When a stage that begins now has to end, on the monotonic clock: its part of what is left."""
        now = time.monotonic()
        left = max(0.0, self._ends - now)
        return now + left * stage.part / (stage.part + sum(other.part for other in later))
