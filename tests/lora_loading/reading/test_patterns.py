"""Patterns of alphas match as PEFT matches them, and no pattern takes long."""

from __future__ import annotations

import random
import re
import time
import warnings

import pytest
from peft.utils.other import get_pattern_key

from lora_loading.reading.patterns import Pattern, PatternError

NAMES = [
    *(f"transformer_blocks.{index}.attn.to_q" for index in (0, 1, 12)),
    "single_transformer_blocks.3.proj_mlp",
    "single_transformer_blocks.3.attn.to_q",
    "proj_out",
    "norm_out.linear",
    "x",
]


@pytest.mark.parametrize(
    "expression",
    [
        "to_q", "attn.to_q", "o_q", "transformer_blocks.0.attn.to_q", r"^transformer_blocks\.0\.attn\.to_q$",
        r"transformer_blocks\.\d+\.attn\.to_(q|k)", ".*to_q", r"[a-z_]+\.1[0-9]\..*", "single_.*", r"\w+\.\w+",
        r"(?:norm_out|proj_out)(\.linear)?", "[^t]+", "x|proj_out", r"transformer_blocks\.(0|1)\..*", "x.?", "x{1}", "",
    ],
)  # fmt: skip
def test_a_pattern_matches_as_in_peft(expression: str) -> None:
    pattern = Pattern(expression)
    for name in NAMES:
        assert pattern.matches(name) == (get_pattern_key([expression], name) == expression), name


def test_random_patterns_match_as_in_re() -> None:
    """Those that both can read; the oracle is `re`, on texts short enough for it."""
    rng, compared = random.Random(0), 0
    for _ in range(4000):
        expression = "".join(rng.choice("ab.|*+?()[]^$\\d{1}") for _ in range(rng.randrange(1, 9)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                oracle, pattern = re.compile(rf"(.*\.)?({expression})$"), Pattern(expression)
            except (re.error, PatternError):
                continue
        for text in ("a", "ab", "aab", "b.a", "a.ab", "d1", "", "abb.b"):
            compared += 1
            assert pattern.matches(text) == (oracle.match(text) is not None), (expression, text)
    assert compared > 1000


@pytest.mark.parametrize("expression", ["(a+)+b", "(a|a)*b", "(.*)*x", "(a|aa)+$b"])
def test_a_hostile_pattern_is_answered_at_once(expression: str) -> None:
    started = time.perf_counter()
    Pattern(expression).matches("a" * 200)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("expression", ["(?=a)", r"(a)\1", "(a{100}){100}", "a" * 500, "[a", "a)", "*", "a{2,1}", "(a"])
def test_what_cannot_be_read_is_refused(expression: str) -> None:
    with pytest.raises(PatternError):
        Pattern(expression)
