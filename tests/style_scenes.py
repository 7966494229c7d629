"""Drawn scenes captioned in an order of words that the demo bundle has never seen: "a circle red small"."""

import json
import re
from pathlib import Path

from captioner.demo import scenes
from captioner.demo.scenes import Scene, Thing

_ONE = "a {first} {place} on a background {background}"
_TWO = "a {first} {relation} a {second} on a background {background}"
_THING = r"a (\w+) (\w+) (\w+)"
_STYLE = re.compile(rf"{_THING} ([a-z ]+?)(?: {_THING})? on a background (\w+)")
_PHRASES = {phrase: (layout, 0) for layout, phrase in scenes.PLACES.items()} | {
    phrase: (layout, number) for layout, phrases in scenes.RELATIONS.items() for number, phrase in enumerate(phrases)
}


def styled(scene: Scene) -> str:
    """Return the caption of a scene in the style."""
    if len(scene.things) == 1:
        first, place = _noun_first(scene.things[0]), scenes.PLACES[scene.layout]
        return _ONE.format(background=scene.background, first=first, place=place)
    first, second = map(_noun_first, scene.things)
    relation = scenes.RELATIONS[scene.layout][0]
    return _TWO.format(background=scene.background, first=first, relation=relation, second=second)


def read_styled(caption: str) -> Scene | None:
    """Return the scene that a caption in the style describes, None for a caption in another style."""
    found = _STYLE.fullmatch(caption.strip())
    if found is None or found[4] not in _PHRASES:
        return None
    layout, number = _PHRASES[found[4]]
    things = [_thing(*found.group(1, 2, 3))] + ([_thing(*found.group(5, 6, 7))] if found[5] else [])
    if (layout in scenes.RELATIONS) != (len(things) == 2):
        return None
    return Scene(background=found[8], things=tuple(things[:: -1 if number else 1]), layout=layout)


def write_styled(folder: Path, num_images: dict[scenes.Split, int]) -> Path:
    """Write so many images of each split, one caption in the style each, and return the path of their labels."""
    folder.mkdir(parents=True)
    with (folder / "labels.jsonl").open("w") as lines:
        for split, count in num_images.items():
            for example in scenes.examples(split, count):
                (folder / example.image_id).write_bytes(example.image)
                row = {"image": example.image_id, "caption": styled(example.scene), "split": split}
                lines.write(json.dumps(row) + "\n")
    return folder / "labels.jsonl"


def _noun_first(thing: Thing) -> str:
    return f"{thing.shape} {thing.colour} {thing.size}"


def _thing(shape: str, colour: str, size: str) -> Thing:
    return Thing(size=size, colour=colour, shape=shape)
