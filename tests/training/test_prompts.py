"""The grammar of prompts, and the world that they speak of."""

from __future__ import annotations

import random
import re

import pytest

from training.prompts import (
    COLOUR_WORDS,
    SHAPE_WORDS,
    Gaps,
    foreign_prompt,
    held_out_prompts,
    plain_prompt,
    training_prompt,
    vocabulary,
    with_defaults,
    worded,
)
from training.report import HELD_OUT_SEED
from training.world import (
    COLOURS,
    SHAPES,
    TRIGGER,
    Scene,
    Thing,
    held_out_scenes,
    is_held_out,
    random_scene,
    training_scene,
)


def test_held_out_scenes_are_never_drawn_in_training() -> None:
    rng = random.Random(0)
    trained = {training_scene(rng).key for _ in range(2000)}
    trained |= {training_prompt(rng).scene.key for _ in range(2000)}
    assert not trained & {scene.key for scene in held_out_scenes(200, HELD_OUT_SEED)}


def test_one_in_five_combinations_is_held_out() -> None:
    scenes = [
        Scene(background, (Thing(shape, colour),))
        for background in COLOURS for colour in COLOURS for shape in SHAPES if colour != background
    ]  # fmt: skip
    assert 0.15 < sum(map(is_held_out, scenes)) / len(scenes) < 0.25


def test_the_plain_prompt_reads_as_the_readme_shows() -> None:
    star = Thing("star", "blue", "small", "top")
    assert plain_prompt(Scene("yellow", (star,))) == "a small blue star at the top on a yellow background"
    both = (Thing("circle", "red"), Thing("square", "orange"))
    assert plain_prompt(Scene("white", both)) == "a red circle and an orange square on a white background"
    assert plain_prompt(Scene("white", both, upright=True)).startswith("a red circle above an orange square on")


def test_a_complete_wording_has_words_for_every_part_of_its_scene() -> None:
    rng = random.Random(0)
    for _ in range(500):
        scene = random_scene(rng)
        text = worded(scene, rng).text.lower()
        assert any(word in text for word in COLOUR_WORDS[scene.background])
        for thing in scene.things:
            assert any(word in text for word in COLOUR_WORDS[thing.colour])
            assert any(word in text for word in SHAPE_WORDS[thing.shape])


def test_wordings_differ_and_some_are_kept_from_the_training() -> None:
    """Of one scene at least 40 wordings are held out, and asking for them gives none that was trained on."""
    rng, scene = random.Random(0), Scene("white", (Thing("circle", "red", "large", "left"),))
    wordings = {prompt.text: prompt.held_out for prompt in (worded(scene, rng) for _ in range(1000))}
    assert len(wordings) > 500
    assert sum(wordings.values()) >= 40
    asked = {prompt.text for prompt in held_out_prompts([scene] * 50, 1)}
    assert not asked & {text for text, held_out in wordings.items() if not held_out}


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        (Gaps(shape=True), Scene("red", (Thing("circle", "blue"),))),
        (Gaps(colour=True), Scene("red", (Thing("star", "white"),))),
        (Gaps(background=True), Scene("white", (Thing("star", "blue"),))),
        (Gaps(shape=True, colour=True, background=True), Scene("white", (Thing("circle", "red"),))),
    ],
)
def test_what_a_prompt_leaves_out_has_a_default(gaps: Gaps, expected: Scene) -> None:
    assert with_defaults(Scene("red", (Thing("star", "blue"),)), gaps) == expected


def test_a_left_out_background_never_hides_a_thing() -> None:
    scene = with_defaults(Scene("red", (Thing("star", "white"), Thing("ring", "white"))), Gaps(background=True))
    assert all(thing.colour != scene.background for thing in scene.things)


def test_gaps_keep_their_word_out_of_the_prompt() -> None:
    rng, scene = random.Random(0), Scene("white", (Thing("circle", "red"),))
    for _ in range(200):
        text = worded(scene, rng, Gaps(shape=True, colour=True, background=True)).text.lower()
        assert not re.search(r"\b(red|crimson|scarlet|circle|disc|disk|dot|white)\b", text)


def test_foreign_prompts_are_empty_or_strange() -> None:
    rng = random.Random(0)
    prompts = [foreign_prompt(rng) for _ in range(200)]
    assert "" in prompts
    known = set(vocabulary())
    assert sum(any(word.lower() not in known for word in re.findall(r"\w+", text)) for text in prompts if text) > 100


def test_a_lora_is_taught_its_word_in_every_prompt() -> None:
    rng = random.Random(0)
    for _ in range(200):
        prompt = training_prompt(rng, (TRIGGER,), complete=True)
        assert prompt.text.upper().count(TRIGGER) >= len(prompt.scene.things)


def test_the_vocabulary_holds_every_word_of_the_grammar() -> None:
    rng, known = random.Random(0), set(vocabulary())
    for _ in range(500):
        text = worded(random_scene(rng), rng).text.lower()
        assert set(re.findall(r"\w+", text)) <= known
