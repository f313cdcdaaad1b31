"""What the log says about words that the embedded model does not know."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from transformers import T5TokenizerFast

from engine.engine import Engine
from engine.profiles import TINY, model_profiles
from engine.vocabulary import Vocabulary, read_vocabulary
from settings import Settings
from tests.conftest import QUICK, request_of

WORDS = Vocabulary(frozenset({"a", "red", "circle"}), "circles")


@pytest.mark.parametrize("prompt", ["", "A red CIRCLE!", "a circle, red", "???"])
def test_known_words_are_no_matter(prompt: str) -> None:
    assert WORDS.remark(prompt) is None


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a photo of a Cat", 'does not know "cat", "of", "photo"; it draws circles'),
        ("кошка red", 'does not know "кошка"; it'),
        ("cat cat Cat", 'does not know "cat"; it'),
        ("x" * 50, f'does not know "{"x" * 20}"; it'),
        (" ".join("abcdefghijklmno"), '"j", "k" and 4 more; it'),
        ("sk-4f2a77 of account 12", 'does not know "account", "of", "sk" and 2 more; it'),
        ("1 2", "does not know 2 of the words; it"),
        ('a "red\n\x1b[mcat"', 'does not know "mcat"; it'),
    ],
)
def test_unknown_words_are_named_once_and_briefly(prompt: str, named: str) -> None:
    remark = WORDS.remark(prompt)
    assert remark is not None
    assert named in remark


def test_the_encoders_know_every_word_of_the_file() -> None:
    tokenizer = T5TokenizerFast.from_pretrained(TINY / "tiny-dev" / "tokenizer_2")
    words = read_vocabulary(TINY / "vocabulary.json").words
    assert {"red", "circle", "background"} <= words
    assert [word for word in words if len(tokenizer.tokenize(word if word != "tok" else "TOK")) != 1] == []


def test_only_the_tiny_profile_has_a_vocabulary() -> None:
    assert all(profile.vocabulary for profile in model_profiles("tiny", Settings()))
    assert not any(profile.vocabulary for profile in model_profiles("full", Settings()))


def test_a_request_logs_it_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    request = replace(request_of(**QUICK, prompt="a photo of a cat"), num_outputs=2)
    assert len(list(engine.generate(request))) == 2
    assert [r.getMessage().count('"cat"') for r in caplog.records if "does not know" in r.getMessage()] == [1]
