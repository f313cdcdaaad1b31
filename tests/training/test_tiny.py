"""The embedded model: what it must show, how large it may be, and that the judge of it can tell right from wrong."""

from __future__ import annotations

import random
from dataclasses import astuple

import pytest
import torch
from PIL import Image

from engine.engine import Engine
from engine.loading import load_models
from engine.precision import exact_precision
from engine.profiles import TINY, model_profiles
from request import Mode
from settings import Settings
from tests.conftest import QUICK, request_of
from tests.paths import LORAS
from training.judge import judge, look
from training.report import HELD_OUT_SEED, ROWS, Row, adapter, make_image, verdicts
from training.world import (
    COLOURS,
    SHAPES,
    TRIGGER,
    Scene,
    Thing,
    draw_scene,
    held_out_scenes,
    is_held_out,
    place,
    prompt_of,
    training_scene,
)


def drawn(scene: Scene, size: tuple[int, int] = (256, 256), seed: int = 0) -> Image.Image:
    return draw_scene(scene, *size, place(scene, *size, random.Random(seed)))


# The judge


@pytest.mark.parametrize("size", [(128, 128), (256, 256), (512, 512), (1344, 768), (768, 1344)])
def test_the_judge_finds_everything_right_in_drawn_scenes(size: tuple[int, int]) -> None:
    for index, scene in enumerate(held_out_scenes(60, 1)):
        assert all(astuple(judge(drawn(scene, size, index), scene))), prompt_of(scene)


def test_the_judge_sees_each_thing_that_is_wrong() -> None:
    truth = Scene("white", (Thing("circle", "red", "", "left"),))
    wrong = {
        "background": Scene("yellow", truth.things),
        "colour": Scene("white", (Thing("circle", "blue", "", "left"),)),
        "shape": Scene("white", (Thing("square", "red", "", "left"),)),
        "place": Scene("white", (Thing("circle", "red", "", "right"),)),
    }
    for part, scene in wrong.items():
        verdict = judge(drawn(scene), truth)
        assert [name for name in wrong if not getattr(verdict, name)] == [part]


def test_the_judge_overlooks_specks_and_nothing_larger() -> None:
    """Specks of some pixels do not stretch what it sees; a second patch of a tenth of the object's area does."""
    scene = Scene("white", (Thing("cross", "red"),))
    speckled, patched = drawn(scene), drawn(scene)
    for corner in ((3, 3), (250, 4), (6, 249)):
        speckled.paste(COLOURS["red"], (*corner, corner[0] + 4, corner[1] + 3))
    assert all(astuple(judge(speckled, scene)))
    patched.paste(COLOURS["red"], (2, 2, 32, 32))
    assert not judge(patched, scene).shape


def test_the_judge_is_not_pleased_by_an_empty_image() -> None:
    scene = Scene("white", (Thing("circle", "red"),))
    verdict = judge(Image.new("RGB", (256, 256), COLOURS["white"]), scene)
    assert astuple(verdict) == (True, False, False, False)


# The world


def test_held_out_scenes_are_never_drawn_in_training() -> None:
    rng = random.Random(0)
    trained = {training_scene(rng).key for _ in range(5000)}
    assert not trained & {scene.key for scene in held_out_scenes(200, HELD_OUT_SEED)}


def test_one_in_five_combinations_is_held_out() -> None:
    scenes = [
        Scene(background, (Thing(shape, colour),))
        for background in COLOURS for colour in COLOURS for shape in SHAPES if colour != background
    ]  # fmt: skip
    assert 0.15 < sum(map(is_held_out, scenes)) / len(scenes) < 0.25


# The checkpoints


def test_the_checkpoints_are_small() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 16 * 2**20


def test_the_checkpoints_hold_no_path_of_the_machine_that_made_them() -> None:
    for path in TINY.rglob("*.json"):
        assert "_name_or_path" not in path.read_text()


@pytest.mark.parametrize("name", ["tok-style", "tok-object"])
@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_a_lora_of_tiny_dev_changes_both_models(name: str, model: str) -> None:
    path = LORAS / f"{name}.safetensors"
    assert path.stat().st_size < 300 * 1024
    models = load_models(model_profiles("tiny", Settings()), torch.device("cpu"))
    engine = Engine(exact_precision(models), None, torch.device("cpu"))
    request = request_of(**QUICK, prompt="a red TOK on a white background", model=model)
    plain = next(engine.generate(request)).tobytes()
    models[model].pipelines[Mode.TXT2IMG].load_lora_weights(path)
    assert next(engine.generate(request)).tobytes() != plain


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_the_object_lora_draws_its_object(engine: Engine, model: str) -> None:
    """The judge, which knows the arrow, sees it with the LoRA and not without."""
    stack = [(adapter(engine, model, "object"), 1.0)]
    prompt = "a red TOK on a white background"
    for shown, expected in ((stack, True), ([], False)):
        _, (seen,) = look(make_image(engine, prompt, model, (512, 512), 3, shown), 1)
        assert seen is not None
        assert (seen.shape == TRIGGER) == expected


@pytest.mark.parametrize("row", [Row("dev", (256, 256), 24), Row("schnell", (512, 512), 24)], ids=["dev", "schnell"])
def test_it_follows_held_out_prompts(engine: Engine, row: Row) -> None:
    """A sample of held-out prompts, with room for another processor's rounding: chance draws one shape in eight."""
    found, _ = verdicts(engine, row, held_out_scenes(row.prompts, HELD_OUT_SEED))
    background, colour, shape, place_ = (sum(column) / len(found) for column in zip(*map(astuple, found), strict=True))
    assert background >= 0.95
    assert colour >= 0.9
    assert shape >= 0.9
    assert place_ >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row.model}-{row.size[0]}x{row.size[1]}-{'fast' if row.go_fast else 'exact'}"
)
def test_the_whole_table_holds(engine: Engine, row: Row) -> None:
    least = 0.95 if row.size == (512, 512) else 0.85
    found, _ = verdicts(engine, row, held_out_scenes(row.prompts, HELD_OUT_SEED))
    assert all(sum(column) / len(found) >= least for column in list(zip(*map(astuple, found), strict=True))[:3])
