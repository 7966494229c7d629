"""Labelled scenes for the demo bundle: one or two coloured shapes on a plain background, drawn in code.

Knows no model and no tensor. Everything follows from `(seed, index)`; the split follows from the *caption* of a scene,
so that no description of the training split is ever tested.

    python -c "from captioner.demo.scenes import write_folder; write_folder('scenes', 'train', 1000)"
"""

import hashlib
import io
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw

Split = Literal["train", "validation", "test"]
RGB = tuple[int, int, int]

CANVAS_PX = 128
SIZES = {"small": 13.0, "large": 26.0}
"""Radius in pixels of the canvas."""
COLOURS: dict[str, RGB] = {
    "red": (215, 30, 35),
    "green": (30, 150, 55),
    "blue": (35, 70, 215),
    "yellow": (245, 215, 30),
    "purple": (140, 40, 165),
    "orange": (245, 130, 20),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (250, 250, 250),
    "grey": (150, 150, 150),
    "black": (12, 12, 12),
    "pink": (250, 190, 205),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
RELATIONS = {"beside": ("to the left of", "to the right of"), "stacked": ("above", "below")}
"""Two things: the relation of the first (left or upper) to the second, and of the second to the first."""
FORMATS = ("png", "jpg", "webp", "png", "jpg", "gif", "png", "jpg", "bmp", "png", "jpg", "tiff")
"""File formats in turn, by index."""

_ONE_THING = (
    "a {first} {place} on a {background} background",
    "there is a {first} {place} on a {background} background",
    "on a {background} background, a {first} {place}",
    "a {background} background with a {first} {place}",
    "the image shows a {first} {place} on a {background} background",
)
_TWO_THINGS = (
    "a {first} {relation} a {second} on a {background} background",
    "there is a {first} {relation} a {second} on a {background} background",
    "on a {background} background, a {second} {inverse} a {first}",
    "a {background} background with a {first} {relation} a {second}",
    "the image shows a {second} {inverse} a {first} on a {background} background",
)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One shape: `str(thing)` is its noun phrase, as in "small red circle"."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of one image; two scenes are equal exactly if they have the same meaning."""

    background: str
    things: tuple[Thing, ...]
    """One thing, or two: then the left or the upper one is first."""
    layout: str
    """A key of `PLACES` for one thing, of `RELATIONS` for two."""

    @property
    def split(self) -> Split:
        """Eight in ten descriptions are for training, one for validation, one for the test."""
        digit = int.from_bytes(hashlib.sha256(self.captions[0].encode()).digest()[:8]) % 10
        return "test" if digit == 0 else "validation" if digit == 1 else "train"

    @property
    def captions(self) -> tuple[str, ...]:
        """Five references; each states every attribute and the relation."""
        if len(self.things) == 1:
            words = {"first": self.things[0], "place": PLACES[self.layout]}
            return tuple(template.format(background=self.background, **words) for template in _ONE_THING)
        first, second = self.things
        relation, inverse = RELATIONS[self.layout]
        words = {"first": first, "second": second, "relation": relation, "inverse": inverse}
        return tuple(template.format(background=self.background, **words) for template in _TWO_THINGS)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One labelled image, encoded as a file of the format that its name ends in."""

    image_id: str
    split: Split
    image: bytes
    captions: tuple[str, ...]
    scene: Scene


def all_things() -> tuple[Thing, ...]:
    """Every possible noun phrase."""
    return tuple(Thing(size=s, colour=c, shape=f) for s, c, f in itertools.product(SIZES, COLOURS, SHAPES))


def all_scenes() -> Iterator[Scene]:
    """Every possible scene once. Two things are never alike, or "above" would be as true as "below"."""
    for background, thing, place in itertools.product(BACKGROUNDS, all_things(), PLACES):
        yield Scene(background=background, things=(thing,), layout=place)
    for background, pair, layout in itertools.product(BACKGROUNDS, itertools.permutations(all_things(), 2), RELATIONS):
        yield Scene(background=background, things=pair, layout=layout)


def near_misses(scene: Scene) -> Iterator[Scene]:
    """Every scene that differs in one attribute of one thing, in the background, or in where things stand."""
    yield from (replace(scene, background=other) for other in BACKGROUNDS if other != scene.background)
    if len(scene.things) == 1:
        yield from (replace(scene, layout=other) for other in PLACES if other != scene.layout)
    else:
        yield replace(scene, things=scene.things[::-1])
        yield from (replace(scene, layout=other) for other in RELATIONS if other != scene.layout)
    for position, thing in enumerate(scene.things):
        for other in all_things():
            things = (*scene.things[:position], other, *scene.things[position + 1 :])
            if _num_differences(thing, other) == 1 and len(set(things)) == len(things):
                yield replace(scene, things=things)


def _num_differences(thing: Thing, other: Thing) -> int:
    return (thing.size != other.size) + (thing.colour != other.colour) + (thing.shape != other.shape)


def scene_at(index: int, *, seed: int = 0) -> Scene:
    """The scene of that index; one in four has a single thing."""
    rng = random.Random(f"scene:{seed}:{index}")
    background = rng.choice(tuple(BACKGROUNDS))
    if rng.random() < 0.25:
        return Scene(background=background, things=(rng.choice(all_things()),), layout=rng.choice(tuple(PLACES)))
    return Scene(background=background, things=tuple(rng.sample(all_things(), 2)), layout=rng.choice(tuple(RELATIONS)))


def indices(split: Split, *, seed: int = 0) -> Iterator[int]:
    """The indices of one split, without end."""
    return (index for index in itertools.count() if scene_at(index, seed=seed).split == split)


def examples(split: Split, count: int, *, seed: int = 0) -> Iterator[Example]:
    """The first `count` labelled images of a split."""
    return (example_at(index, seed=seed) for index in itertools.islice(indices(split, seed=seed), count))


def example_at(index: int, *, seed: int = 0) -> Example:
    """The labelled image of that index: the same bytes for the same `(seed, index)` and Pillow."""
    scene = scene_at(index, seed=seed)
    suffix = FORMATS[index % len(FORMATS)]
    image = encode(draw(scene, random.Random(f"image:{seed}:{index}")), suffix)
    return Example(
        image_id=f"scene-{index:04d}.{suffix}", split=scene.split, image=image, captions=scene.captions, scene=scene
    )


def write_folder(folder: str | Path, split: Split, count: int, *, seed: int = 0) -> None:
    """Write the first `count` images of a split, and beside them `captions.jsonl`: one object an image."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as lines:
        for example in examples(split, count, seed=seed):
            (folder / example.image_id).write_bytes(example.image)
            row = {"image_id": example.image_id, "split": example.split, "captions": example.captions}
            lines.write(json.dumps(row) + "\n")


def is_right(caption: str, scene: Scene) -> bool:
    """True if the caption states every attribute and the relation of the scene, and nothing else."""
    return parse(caption) == scene


_ATTRIBUTED = rf"(?P<thing>(?P<size>{'|'.join(SIZES)}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)}))"
_STATEMENT = re.compile(
    rf"\b(?:{_ATTRIBUTED}"
    rf"|(?P<background>{'|'.join(BACKGROUNDS)}) background"
    rf"|(?P<relation>{'|'.join(itertools.chain(*RELATIONS.values()))})"
    rf"|(?P<place>{'|'.join(PLACES.values())})"
    r"|a|there is|with|on|the image shows)\b|[ ,.]"
)


def parse(caption: str) -> Scene | None:
    """The scene that a caption describes, its parts in any order; None if it says too little or too much."""
    text = caption.strip().lower()
    if _STATEMENT.sub("", text):
        return None
    said = [match for match in _STATEMENT.finditer(text) if match.lastgroup]
    grounds = [match["background"] for match in said if match["background"]]
    if len(grounds) != 1:
        return None
    match [match for match in said if not match["background"]]:
        case [thing, place] if thing["thing"] and place["place"]:
            layout = next(key for key, phrase in PLACES.items() if phrase == place["place"])
            return Scene(background=grounds[0], things=(_thing(thing),), layout=layout)
        case [thing, relation, other] if thing["thing"] and relation["relation"] and other["thing"]:
            layout = next(key for key, phrases in RELATIONS.items() if relation["relation"] in phrases)
            pair = (_thing(thing), _thing(other))
            in_order = relation["relation"] == RELATIONS[layout][0]
            return Scene(background=grounds[0], things=pair if in_order else pair[::-1], layout=layout)
    return None


def _thing(match: re.Match[str]) -> Thing:
    return Thing(size=match["size"], colour=match["colour"], shape=match["shape"])


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """An RGB image of the scene; shade, position and size vary with `rng`, never so far that its caption changes."""
    # Drawn at twice the canvas and halved: smooth edges.
    image = Image.new("RGB", (2 * CANVAS_PX, 2 * CANVAS_PX), shade(BACKGROUNDS[scene.background], rng))
    pen = ImageDraw.Draw(image)
    for thing, (x, y) in zip(scene.things, _centres(scene.layout), strict=True):
        x, y = x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)
        radius = SIZES[thing.size] * rng.uniform(0.94, 1.06)
        draw_thing(pen, thing, 2 * x, 2 * y, 2 * radius, shade(COLOURS[thing.colour], rng))
    return image.reduce(2)


def _centres(layout: str) -> list[tuple[float, float]]:
    middle, low, high = CANVAS_PX / 2, CANVAS_PX / 2 - 32, CANVAS_PX / 2 + 32
    return {
        "left": [(low, middle)],
        "right": [(high, middle)],
        "top": [(middle, low)],
        "bottom": [(middle, high)],
        "centre": [(middle, middle)],
        "beside": [(low, middle), (high, middle)],
        "stacked": [(middle, low), (middle, high)],
    }[layout]


def shade(colour: RGB, rng: random.Random) -> RGB:
    """A colour near this one."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-10, 10))) for channel in colour)
    return red, green, blue


def draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, radius: float, colour: RGB) -> None:
    """Draw the shape around x and y. Of `thing` its shape alone counts; lengths are in pixels of the drawing."""
    if thing.shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif thing.shape == "square":
        side = 0.9 * radius
        pen.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif thing.shape == "triangle":
        wide, tall = 1.1 * radius, radius
        pen.polygon([(x, y - tall), (x - wide, y + tall), (x + wide, y + tall)], fill=colour)
    else:
        arm = 0.34 * radius
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def encode(image: Image.Image, suffix: str) -> bytes:
    """The image as a file of that format; lossy ones at quality 90."""
    kind = {"jpg": "JPEG"}.get(suffix, suffix.upper())
    options = {"quality": 90} if suffix in ("jpg", "webp") else {}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
