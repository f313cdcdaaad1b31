"""Plain English for the world's scenes: a small grammar of wordings, and prompts from outside the world.

A wording is a combination of one alternative a part: how things are named, where the place and the background stand,
what is said before and after, and how it is written. One combination in six is kept from the training, so that the
report can ask for wordings that were never seen. What a prompt leaves out, or calls by a word that is not known, has a
default: a red circle, a white background. Knows the scenes of `training/world.py`, nothing of images or models.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass, replace

from training.world import COLOURS, SHAPES, SIZES, TRIGGER, Scene, Thing, is_held_out, random_scene

DEFAULT_SHAPE, DEFAULT_COLOURS, DEFAULT_BACKGROUND = "circle", ("red", "white"), "white"
LONGEST = 36
"""Words and punctuation marks of a prompt, of the 40 tokens that the model reads."""

COLOUR_WORDS = {
    "red": ("red", "red", "red", "crimson", "scarlet"),
    "green": ("green", "green", "green", "emerald"),
    "blue": ("blue", "blue", "blue", "azure"),
    "yellow": ("yellow", "yellow", "yellow", "lemon"),
    "purple": ("purple", "purple", "violet"),
    "orange": ("orange", "orange", "tangerine"),
    "white": ("white",),
    "black": ("black",),
    "pink": ("pink", "pink", "rose"),
    "cyan": ("cyan", "cyan", "turquoise", "aqua"),
}
SHAPE_WORDS = {
    "circle": ("circle", "circle", "circle", "disc", "disk", "dot"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star", "star", "star", "five-pointed star"),
    "heart": ("heart", "heart", "heart", "love heart"),
    "ring": ("ring", "ring", "ring", "hoop", "donut"),
    "cross": ("cross", "cross", "cross", "plus", "plus sign"),
    "diamond": ("diamond", "diamond", "diamond", "rhombus", "lozenge"),
    TRIGGER: (TRIGGER,),
}
SIZE_WORDS = {
    "": ("", "", "", "", "", "", "medium", "medium-sized"),
    "small": ("small", "small", "small", "little", "tiny", "mini"),
    "large": ("large", "large", "large", "big", "big", "huge", "giant", "enormous"),
}
ADJECTIVES = ("bright", "solid", "plain", "simple", "flat", "nice", "perfect", "single", "beautiful", "vivid", "filled")
ARTICLES = ("a", "a", "a", "a", "the", "one", "", "")

NOUNS = (
    "{article} {size} {adjective} {colour} {shape}",
    "{article} {size} {adjective} {colour} {shape}",
    "{article} {size} {adjective} {colour} {shape}",
    "{article} {size} {adjective} {colour} {shape}",
    "{article} {colour} {size} {adjective} {shape}",
    "{article} {size} {adjective} {shape} in {colour}",
    "{article} {size} {adjective} {shape} that is {colour}",
    "{article} {size} {adjective} {shape}, coloured {colour}",
    "{article} {size} {adjective} {colour} coloured {shape}",
    "{article} {size} {adjective} {colour}-colored {shape}",
)
_SIDE = (
    "on the {0}", "on the {0}", "at the {0}", "to the {0}", "on the {0} side", "{0}", "on the {0} of the image",
    "on the {0} of the picture", "on the {0} side of the image", "in the {0} half", "in the {0} part of the picture",
    "on the {0}-hand side", "near the {0} edge", "towards the {0}", "placed on the {0}", "located on the {0}",
)  # fmt: skip
_END = (
    "at the {0}", "at the {0}", "on the {0}", "in the {0} half", "near the {0}", "at the {0} of the image",
    "at the {0} of the picture", "in the {0} part", "in the {0} part of the image", "{0}", "towards the {0}",
    "placed at the {0}", "close to the {0}", "by the {0} edge",
)  # fmt: skip
_CORNER = (
    "in the {0} corner", "in the {0} corner", "at the {0}", "in the {0}", "{0}", "in the {0} corner of the image",
    "to the {0}", "near the {0} corner", "on the {0}", "in the {0} part of the picture",
)  # fmt: skip
_CENTRE = (
    "in the {0}", "in the {0}", "at the {0}", "in the {0} of the image", "in the {0} of the picture",
    "right in the {0}", "exactly in the {0}", "placed in the {0}",
)  # fmt: skip
PLACES: dict[str, tuple[str, ...]] = {
    "": ("",),
    "left": tuple(form.format("left") for form in _SIDE),
    "right": tuple(form.format("right") for form in _SIDE),
    "top": (*(form.format("top") for form in _END), "in the upper half", "in the upper part", "up high", "on top"),
    "bottom": (*(form.format("bottom") for form in _END), "in the lower half", "in the lower part", "down low"),
    "centre": (
        *(form.format(word) for form in _CENTRE for word in ("centre", "center", "middle")),
        "centred", "centered",
    ),
    **{
        f"{end} {side}": tuple(
            form.format(words)
            for form in _CORNER
            for words in (f"{end} {side}", f"{end}-{side}", f"{other} {side}")
        )
        for end, other in (("top", "upper"), ("bottom", "lower"))
        for side in ("left", "right")
    },
}  # fmt: skip
BESIDE = (
    "{a} and {b}", "{a} and {b}", "{a} on the left and {b} on the right", "{a} on the left and {b} on the right",
    "{b} on the right and {a} on the left", "{b} on the right and {a} on the left",
    "{a} on the left, {b} on the right", "{b} on the right, {a} on the left", "on the left {a}, on the right {b}",
    "on the left {a} and on the right {b}", "on the right {b} and on the left {a}", "on the right {b}, on the left {a}",
    "{a} to the left of {b}", "{b} to the right of {a}", "{a} left of {b}", "{b} right of {a}", "{a} next to {b}",
    "{a} beside {b}", "{a} with {b}", "{a} and {b} side by side", "{a} left, {b} right", "{a}, {b}", "{a} & {b}",
    "{a} together with {b}", "{a} and then {b}", "{a} at the left and {b} at the right", "{a} plus {b}",
    "{a} on the left side and {b} on the right side", "left: {a}, right: {b}", "{a} followed by {b}",
    "{b} on the right of {a}", "{a} on the left of {b}", "{a} and {b} on its right", "{a} and {b} to the right of it",
)  # fmt: skip
ABOVE = (
    "{a} above {b}", "{a} above {b}", "{b} below {a}", "{b} below {a}", "{a} over {b}", "{b} under {a}",
    "{b} beneath {a}", "{b} underneath {a}", "{a} on top of {b}", "{a} at the top and {b} at the bottom",
    "{a} at the top and {b} at the bottom", "{b} at the bottom and {a} at the top", "{a} at the top, {b} at the bottom",
    "{b} at the bottom, {a} at the top", "at the top {a}, at the bottom {b}", "at the bottom {b} and at the top {a}",
    "top: {a}, bottom: {b}", "{a} on top and {b} below", "{a} and below it {b}", "{b} and above it {a}",
    "{a} and {b} below it", "{b} with {a} above it", "{a} and {b} under it",
    "{a} in the upper half and {b} in the lower half",
)  # fmt: skip
BACKGROUNDS = (
    "{subject} on a {colour} background", "{subject} on a {colour} background", "{subject} on a {colour} background",
    "{subject} on {colour}", "{subject} on {colour}", "{subject} against a {colour} background",
    "{subject} against {colour}", "{subject} over a {colour} background", "{subject} over {colour}",
    "{subject}, {colour} background", "{subject}, {colour} background", "{subject} with a {colour} background",
    "{subject} drawn on a {colour} background", "{subject} drawn on {colour}", "{subject} painted on {colour}",
    "{subject} in front of a {colour} background", "{subject} on a {colour} canvas", "{subject} on {colour} paper",
    "{subject} on a {adjective} {colour} background", "{subject} and a {colour} background",
    "{subject}. The background is {colour}", "{subject}; background: {colour}", "{subject}, on {colour}",
    "{subject} upon a {colour} background", "{subject} set against {colour}", "{subject} atop a {colour} background",
    "{subject}, the background is {colour}", "{subject} on the {colour} background", "{subject} on {colour} background",
    "on a {colour} background, {subject}", "on {colour}, {subject}", "on a {colour} background there is {subject}",
    "{colour} background, {subject}", "{colour} background with {subject}", "a {colour} background with {subject}",
    "a {colour} canvas with {subject}", "against a {colour} background, {subject}",
)  # fmt: skip
ON_SIDE = ("{noun} {place} of a {colour} background", "{noun} {place} of the {colour} background")
LEADS = (
    "a picture of", "a photo of", "an image of", "a drawing of", "an illustration of", "a painting of", "draw",
    "please draw", "paint", "generate", "create an image of", "show me", "I want", "I would like", "can you draw",
    "make", "give me", "there is", "this is", "a simple drawing of", "a flat illustration of", "picture of", "photo of",
    "please make", "could you please paint", "an icon of", "a logo with", "a poster with", "a vector graphic of",
    "illustration of", "please show", "imagine", "a minimalist drawing of",
)  # fmt: skip
TAILS = (
    ", flat colours", ", flat colors", ", 4k", ", 8k", ", high quality", ", minimalist", ", minimalistic",
    ", vector art", ", vector graphic", ", clean lines", ", sharp", ", simple", ", flat design", ", please", " please",
    ", thank you", ", best quality", ", detailed", ", digital art", ", clip art", ", in flat colours", ", crisp edges",
    ", no text", ", clean", ", nothing else", ", modern style", ", graphic design", ", HD", ", sharp edges", ", icon",
    ", flat style", ", simple shapes", ", geometric", ", masterpiece", ", poster", ", minimal",
)  # fmt: skip
STYLES = (f"{TRIGGER} style, ", f"in {TRIGGER} style, ", f"in the style of {TRIGGER}, ")
OTHER_WORDS = (
    "dog", "cat", "man", "woman", "person", "house", "tree", "car", "mountain", "sea", "sky", "sun", "moon", "city",
    "street", "forest", "river", "flower", "night", "day", "light", "dark", "old", "young", "landscape", "portrait",
    "realistic", "cinematic", "gold", "silver", "grey", "brown", "beige", "blurry", "wearing", "holding", "sitting",
    "standing", "running", "wooden", "metal", "glass", "water", "fire", "snow", "rain", "cloud", "bird", "fish",
    "horse", "boat", "train", "plane", "road", "bridge", "tower", "castle", "garden", "beach", "desert", "island",
    "king", "queen", "robot", "dragon", "knight", "wizard", "space", "planet", "shape", "thing", "object", "figure",
    "something", "hexagon", "oval", "rectangle", "spiral", "moonlight", "sunset", "window", "door", "table", "chair",
    "apple", "banana", "bread", "coffee", "music", "guitar", "piano", "book", "letter", "number", "text", "says",
    "hello", "world", "happy", "sad", "angry", "mauve", "maroon", "teal", "navy", "olive", "khaki", "ivory", "rainbow",
    "transparent", "shiny", "matte", "glowing", "floating", "between", "behind", "ein", "eine", "rote", "roter",
    "blauer", "Kreis", "auf", "weissem", "Hintergrund", "un", "une", "cercle", "rouge", "sur", "fond", "blanc", "el",
    "circulo", "rojo", "sobre", "fondo", "blanco", "czerwone", "kolo", "na", "tle", "cerchio", "rosso", "su", "sfondo",
    "bianco", "krasnyy", "krug", "rood", "rode", "cirkel", "met", "witte",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A prompt, the scene that it asks for, and whether it asks for the style of the LoRA `tok-style`."""

    text: str
    scene: Scene
    styled: bool = False


@dataclass(frozen=True)
class Gaps:
    """What a prompt leaves out or calls by a word that the world does not know."""

    shape: bool = False
    colour: bool = False
    background: bool = False


def plain_prompt(scene: Scene) -> str:
    """The plain prompt, such as `a small blue star at the top on a yellow background`."""
    nouns = [
        f"{_article(words)} {words} {PLACES[thing.position][0]}".strip()
        for thing in scene.things
        for words in [" ".join(word for word in (thing.size, thing.colour, thing.shape) if word)]
    ]
    subject = (" above " if scene.upright else " and ").join(nouns)
    return f"{subject} on {_article(scene.background)} {scene.background} background"


def training_prompt(
    rng: random.Random, shapes: tuple[str, ...] = SHAPES, paired: float = 0.4, complete: bool = False
) -> Prompt:
    """A prompt to train on: a scene that is not held out, in a wording that is not, or something outside the world.

    Args:
        rng: what is drawn depends on it alone.
        shapes: the shapes to draw.
        paired: the share of scenes with two things.
        complete: leave nothing out, as the LoRAs' prompts.
    """
    if not complete and rng.random() < 0.07:
        return Prompt(foreign_prompt(rng), Scene(DEFAULT_BACKGROUND, (Thing(DEFAULT_SHAPE, DEFAULT_COLOURS[0]),)))
    while True:
        scene = random_scene(rng, shapes, paired)
        gaps = Gaps() if complete else _random_gaps(rng)
        prompt = worded(with_defaults(scene, gaps), rng, gaps, strange=0.12)
        if not is_held_out(prompt.scene) and not prompt.held_out:
            return Prompt(prompt.text, prompt.scene, prompt.styled)


def held_out_prompts(scenes: list[Scene], seed: int) -> list[Prompt]:
    """For each scene a prompt in a wording that was never trained on."""
    rng = random.Random(seed)
    found = []
    for scene in scenes:
        while not (prompt := worded(scene, rng)).held_out or prompt.styled:
            pass
        found.append(Prompt(prompt.text, prompt.scene))
    return found


def foreign_prompt(rng: random.Random) -> str:
    """Nothing, words that name nothing of the world, or letters without sense."""
    if rng.random() < 0.35:
        return ""
    words = [_strange_word(rng) for _ in range(rng.randint(1, 12))]
    lead = rng.choice(LEADS) + " " if rng.random() < 0.4 else ""
    return _written(lead + rng.choice(("", "a ", "the ")) + " ".join(words), rng)[:200]


# How a wording is put together


@dataclass(frozen=True)
class Worded(Prompt):
    """A prompt in some wording; `held_out` where the wording is one of those that are never trained on."""

    held_out: bool = False


class _Choices:
    """Draws alternatives and remembers which: together they are the wording."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.taken: list[str] = []

    def __call__(self, alternatives: tuple[str, ...]) -> str:
        chosen = self.rng.choice(alternatives)
        self.taken.append(chosen)
        return chosen

    def held_out(self) -> bool:
        return hashlib.sha256("|".join(self.taken).encode()).digest()[0] % 6 == 0


def worded(scene: Scene, rng: random.Random, gaps: Gaps | None = None, strange: float = 0.0) -> Worded:
    """The scene in a random wording.

    Args:
        scene: has the defaults where there are gaps.
        rng: what is drawn depends on it alone.
        gaps: what is left out or called by an unknown word.
        strange: the share of prompts with unknown words between their parts.
    """
    gaps = gaps or Gaps()
    while True:
        choices = _Choices(rng)
        subject, sided = _subject(scene, choices, gaps)
        text = subject if sided else _with_background(scene, subject, choices, gaps)
        if rng.random() < 0.3:
            text = f"{choices(LEADS)} {text}"
        styled = rng.random() < 0.1
        if styled:
            text = rng.choice(STYLES) + text
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
            text += choices(TAILS)
        if rng.random() < strange:
            text = _with_strange_words(text, rng)
        text = re.sub(r"\s+", " ", text).strip()
        if len(re.findall(r"[\w']+|[^\w\s]", text)) <= LONGEST:
            return Worded(_written(text, rng), scene, styled, choices.held_out())


def with_defaults(scene: Scene, gaps: Gaps) -> Scene:
    """The scene that a prompt with these gaps stands for."""
    background = DEFAULT_BACKGROUND if gaps.background else scene.background
    free = [name for name in COLOURS if name != background]
    things = []
    for index, thing in enumerate(scene.things):
        colour = thing.colour if thing.colour != background else free[index % len(free)]
        if gaps.colour and index == 0:
            colour = next(name for name in DEFAULT_COLOURS if name != background)
        shape = DEFAULT_SHAPE if gaps.shape and index == 0 else thing.shape
        things.append(replace(thing, colour=colour, shape=shape))
    return replace(scene, background=background, things=tuple(things))


def _random_gaps(rng: random.Random) -> Gaps:
    if rng.random() < 0.04:
        return Gaps(shape=True, colour=True, background=True)
    return Gaps(shape=rng.random() < 0.07, colour=rng.random() < 0.06, background=rng.random() < 0.12)


def _subject(scene: Scene, choices: _Choices, gaps: Gaps) -> tuple[str, bool]:
    """The things in words, and whether the background is among them already."""
    first = _noun(scene.things[0], choices, gaps)
    if len(scene.things) == 2:
        second = _noun(scene.things[1], choices, Gaps())
        return choices(ABOVE if scene.upright else BESIDE).format(a=first, b=second), False
    position = scene.things[0].position
    place = choices(PLACES[position])
    if position in ("left", "right") and not gaps.background and choices.rng.random() < 0.12:
        colour = choices.rng.choice(COLOUR_WORDS[scene.background])
        side = choices(("on the {0}", "to the {0}", "on the {0} side", "at the {0}")).format(position)
        return choices(ON_SIDE).format(noun=first, place=side, colour=colour), True
    order = choices(("{noun} {place}", "{noun} {place}", "{noun} {place}", "{place} {noun}", "{noun}, {place}"))
    return order.format(noun=first, place=place).strip(" ,"), False


def _noun(thing: Thing, choices: _Choices, gaps: Gaps) -> str:
    form = choices(NOUNS)
    strange = choices.rng.random() < 0.5
    if gaps.colour and not strange:
        form = NOUNS[0]
    words = form.format(
        article="",
        size=choices.rng.choice(SIZE_WORDS[thing.size]),
        adjective=choices.rng.choice(ADJECTIVES) if choices.rng.random() < 0.08 else "",
        colour=_colour_word(thing.colour, choices.rng, gaps.colour, strange),
        shape=_strange_noun(choices.rng) if gaps.shape else choices.rng.choice(SHAPE_WORDS[thing.shape]),
    )
    words = re.sub(r"\s+", " ", words).strip()
    article = choices(ARTICLES)
    return f"{_article(words) if article == 'a' else article} {words}".strip()


def _colour_word(colour: str, rng: random.Random, left_out: bool, strange: bool) -> str:
    if left_out:
        return _strange_word(rng) if strange else ""
    return rng.choice(COLOUR_WORDS[colour])


def _with_background(scene: Scene, subject: str, choices: _Choices, gaps: Gaps) -> str:
    if gaps.background and choices.rng.random() < 0.7:
        return subject
    word = _strange_word(choices.rng) if gaps.background else choices.rng.choice(COLOUR_WORDS[scene.background])
    form = choices(BACKGROUNDS).replace("a {colour}", f"{_article(word)} {{colour}}")
    adjective = choices.rng.choice(ADJECTIVES)
    return form.replace("a {adjective}", f"{_article(adjective)} {{adjective}}").format(
        subject=subject, colour=word, adjective=adjective
    )


def _with_strange_words(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    at = rng.choice((0, len(words)))
    added = [_strange_word(rng) for _ in range(rng.randint(1, 3))]
    return " ".join([*words[:at], *added, *words[at:]])


def _strange_noun(rng: random.Random) -> str:
    return " ".join(_strange_word(rng) for _ in range(rng.choice((1, 1, 1, 2))))


def _strange_word(rng: random.Random) -> str:
    if rng.random() < 0.65:
        return rng.choice(OTHER_WORDS)
    letters = rng.choice(
        ("abcdefghijklmnopqrstuvwxyz", "aeiounrstl", "абвгдеиклмнопрст", "的一是在不了有和人这中大", "éàüöñß")
    )
    return "".join(rng.choice(letters) for _ in range(rng.randint(1, 9)))


def _article(words: str) -> str:
    return "an" if words[:1] in tuple("aeiou") else "a"


def _written(text: str, rng: random.Random) -> str:
    """The text as people write: some begin with a capital, end with a full stop, or hold the shift key."""
    chance = rng.random()
    if chance < 0.25:
        text = text[:1].upper() + text[1:]
    elif chance < 0.31:
        text = text.upper()
    elif chance < 0.35:
        text = text.title()
    elif chance < 0.45:
        text = text.lower()
    return text + rng.choice(("", "", "", "", ".", ".", "!")) if text else text


def vocabulary() -> list[str]:
    """Every word of the grammar and the LoRAs' trigger word, in lower case, sorted."""
    tables = (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, PLACES)
    parts = [
        *NOUNS, *BESIDE, *ABOVE, *BACKGROUNDS, *ON_SIDE, *LEADS, *TAILS, *ADJECTIVES, *ARTICLES, *SIZES, *STYLES, "an",
        *(words for table in tables for row in table.values() for words in row),
    ]  # fmt: skip
    found = {word for part in parts for word in re.findall(r"\w+", re.sub(r"\{\w+\}", " ", part).lower())}
    return sorted(found)
