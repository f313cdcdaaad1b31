"""Where requests go: properties of the pure functions, and what they are worth in the simulation."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.routing import LOAD_FACTOR, candidates, home, rendezvous_order
from cluster.simulation import Case, policies, simulate

SEATS = [f"seat-{number}" for number in range(16)]
IDLE = dict.fromkeys(SEATS, 0)


def test_equal_loras_have_one_home_and_different_ones_are_spread() -> None:
    assert len({home("a", IDLE) for _ in range(10)}) == 1
    homes = Counter(home(str(key), IDLE) for key in range(1600))
    assert len(homes) == 16
    assert max(homes.values()) < 160


def test_a_seat_that_goes_moves_only_what_was_its_own() -> None:
    gone = SEATS[5]
    left = {seat: 0 for seat in SEATS if seat != gone}
    for key in map(str, range(500)):
        before = home(key, IDLE)
        assert before == gone or home(key, left) == before


@given(st.dictionaries(st.sampled_from(SEATS), st.integers(0, 20), min_size=1), st.text(min_size=1, max_size=9))
def test_no_home_is_above_the_bound(load: dict[str, int], key: str) -> None:
    chosen = home(key, load)
    assert load[chosen] < LOAD_FACTOR * (sum(load.values()) + 1) / len(load) + 1


def test_a_request_without_loras_goes_where_there_is_least_to_do() -> None:
    assert home("", {**dict.fromkeys(SEATS, 3), "seat-9": 1}) == "seat-9"


def test_an_impatient_request_may_go_to_seats_that_nobody_waits_for() -> None:
    queued = {**IDLE, "seat-1": 2, "seat-3": 1}
    own = home("a", IDLE)
    assert candidates("a", own, queued, waited=1, patience=2) == [own]
    may = candidates("a", own, queued, waited=2, patience=2)
    assert may[0] == own
    assert set(may) == set(SEATS) - ({"seat-1", "seat-3"} - {own})
    rest = [seat for seat in rendezvous_order("a", tuple(sorted(SEATS))) if seat in may and seat != own]
    assert may[1:] == rest


def test_a_request_whose_home_is_gone_may_go_anywhere() -> None:
    assert set(candidates("a", "seat-99", IDLE, waited=0, patience=9)) == set(SEATS)


@pytest.mark.parametrize("load", [0.5, 0.7])
def test_it_finds_more_files_and_is_faster_than_any_other_policy(load: float) -> None:
    case = Case(replicas=16, files=50, fetch_seconds=6, load=load, requests_each=80)
    found = {name: simulate(case, policy) for name, policy in policies(case).items()}
    others = [outcome for name, outcome in found.items() if name != "ours"]
    assert found["ours"].hits > max(outcome.hits for outcome in others)
    assert found["ours"].p95 <= min(outcome.p95 for outcome in others)
