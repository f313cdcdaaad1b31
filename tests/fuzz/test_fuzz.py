"""A short run of each fuzzed input, from numbers that the full run does not use, and the corpus of the guided one."""

from __future__ import annotations

import pytest

from tests.fuzz.corpus import kept
from tests.fuzz.subjects import ACCEPTED, SUBJECTS
from tests.fuzz.targets import TARGETS

SHORT = {"safetensors files": 600, "images and masks": 600, "references": 1500, "service answers": 60}


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_mutated_input_does_anything_but_work_or_be_refused(name: str) -> None:
    outcomes = []
    with SUBJECTS[name][0]() as attempt:
        for number in range(10**6, 10**6 + SHORT[name]):
            try:
                outcomes.append(attempt(number))
            except BaseException as fault:
                fault.add_note(f"input {number}")
                raise
    assert 0.02 < outcomes.count(ACCEPTED) / len(outcomes) < 0.98, "the mutations are too weak or too strong"


@pytest.mark.parametrize("target", TARGETS)
def test_what_coverage_guided_fuzzing_found_works_or_is_refused(target: str) -> None:
    inputs = kept(target)
    assert len(inputs) > 20
    for content in inputs:
        TARGETS[target](content)
