"""Drawn images of two to five coloured shapes in a grid of nine places, each with one caption that says all of it.

    four shapes on grey: northwest red cross, northeast blue circle, centre red square, southwest green circle

Colours, shapes and grounds are those of the demo's scenes. Everything follows from `(seed, split, index)`, and no two
splits share a caption. Knows no model and no tensor.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from captioner.demo import scenes
from captioner.demo.scenes import Thing, draw_thing, shade

SIDE_PX = 64
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLACES = {
    ("top", "left"): "northwest",
    ("top", "centre"): "north",
    ("top", "right"): "northeast",
    ("middle", "left"): "west",
    ("middle", "centre"): "centre",
    ("middle", "right"): "east",
    ("bottom", "left"): "southwest",
    ("bottom", "centre"): "south",
    ("bottom", "right"): "southeast",
}
"""Row and column -> the word that captions have for them: one, so that one look at an image token can find it."""
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
RADIUS_PX, JITTER_PX = 8.0, 1.5


@dataclass(frozen=True)
class Shape:
    """One shape and its place: a row of `ROWS` and a column of `COLUMNS`."""

    colour: str
    form: str
    row: str
    column: str

    @property
    def place(self) -> str:
        """Where it is, as captions say it."""
        return PLACES[self.row, self.column]

    def __str__(self) -> str:
        return f"{self.place} {self.colour} {self.form}"


@dataclass(frozen=True)
class Crowd:
    """The content of one image; its shapes stand in the order of `PLACES`."""

    ground: str
    shapes: tuple[Shape, ...]

    @property
    def caption(self) -> str:
        """The one caption, which says everything."""
        return f"{NUMBERS[len(self.shapes)]} shapes on {self.ground}: {', '.join(map(str, self.shapes))}"

    @property
    def is_of(self) -> str:
        """The split of everything that looks like this."""
        shapes = ", ".join(f"{shape.colour} {shape.form} {shape.row} {shape.column}" for shape in self.shapes)
        drawn = random.Random(f"{NUMBERS[len(self.shapes)]} shapes on {self.ground}: {shapes}").randrange(20)
        return "train" if drawn < 16 else "validation" if drawn < 18 else "test"

    @property
    def statements(self) -> set[str]:
        """What it says, one by one: the number, the ground, and each shape with its place."""
        return {NUMBERS[len(self.shapes)], self.ground, *map(str, self.shapes)}


def statements_of(caption: str) -> set[str]:
    """The statements of a caption, also of one that contradicts itself; empty if it is no sentence of this world."""
    sentence = re.fullmatch(r"(\w+) shapes on (\w+): (.*)", caption.strip())
    return {sentence[1], sentence[2], *sentence[3].split(", ")} if sentence else set()


def share_of_statements(caption: str, crowd: Crowd) -> float:
    """The share that is right of what a caption states or should state, whichever is more."""
    said, true = statements_of(caption), crowd.statements
    return len(said & true) / max(len(said), len(true))


def crowds(split: str, count: int, *, seed: int = 0) -> Iterator[Crowd]:
    """The first `count` crowds of `train`, `validation` or `test`."""
    rng = random.Random(f"{split}:{seed}")
    while count:
        crowd = _drawn_crowd(rng)
        if crowd.is_of == split:
            count -= 1
            yield crowd


def _drawn_crowd(rng: random.Random) -> Crowd:
    places = sorted(rng.sample(range(len(PLACES)), rng.choice(tuple(NUMBERS))))
    colours, forms = tuple(scenes.COLOURS), scenes.SHAPES
    shapes = (Shape(rng.choice(colours), rng.choice(forms), *tuple(PLACES)[place]) for place in places)
    return Crowd(rng.choice(tuple(scenes.BACKGROUNDS)), tuple(shapes))


def centre_of(shape: Shape) -> tuple[float, float]:
    """Where the middle of the shape's place is: x and y in pixels."""
    cell = SIDE_PX / 3
    return cell * (COLUMNS.index(shape.column) + 0.5), cell * (ROWS.index(shape.row) + 0.5)


def draw(crowd: Crowd, rng: random.Random) -> Image.Image:
    """An RGB image of 64x64; shade, position and size vary with `rng`, never so far that its caption changes."""
    side = 2 * SIDE_PX  # drawn at twice the size and halved: smooth edges
    image = Image.new("RGB", (side, side), shade(scenes.BACKGROUNDS[crowd.ground], rng))
    pen = ImageDraw.Draw(image)
    for shape in crowd.shapes:
        x, y = (at + rng.uniform(-JITTER_PX, JITTER_PX) for at in centre_of(shape))
        thing = Thing(size="small", colour=shape.colour, shape=shape.form)
        colour = shade(scenes.COLOURS[shape.colour], rng)
        draw_thing(pen, thing, 2 * x, 2 * y, 2 * RADIUS_PX * rng.uniform(0.92, 1.06), colour)
    return image.reduce(2)


def write_folder(folder: Path, counts: dict[str, int], *, seed: int = 0) -> Path:
    """Write so many images of each split, `SPLIT/00012.png`, and return their labels, `labels.jsonl`."""
    with _new(folder / "labels.jsonl").open("w") as lines:
        for split, count in counts.items():
            for index, crowd in enumerate(crowds(split, count, seed=seed)):
                name = f"{split}/{index:05d}.png"
                draw(crowd, random.Random(f"{seed}:{name}")).save(_new(folder / name))
                lines.write(json.dumps({"image": name, "caption": crowd.caption, "split": split}) + "\n")
    return folder / "labels.jsonl"


def _new(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
