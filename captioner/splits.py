"""Splits of labelled images: what people call them, and which one an image falls into where nobody said.

Knows names and hashes; reads only Flickr8k's lists. An image falls by its own name and the seed, so that adding or
removing another moves none.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Literal, get_args

from captioner.sources.store import Store
from captioner.sources.urls import join, name, parent

__all__ = ["SPLITS", "Split", "draw_split", "read_split_lists", "split_called", "split_of_file"]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_CALLED: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "restval"), "train"),  # restval: Karpathy's images that may be trained on too
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_IN_A_NAME = re.compile(r"(?<![a-z])(train|validation|valid|val|dev|test)(?:ing)?(?:20\d\d)?(?![a-z])")
_LIST = re.compile(r".*[._](train|dev|test)images\.txt")


def split_called(text: str) -> Split | None:
    """Return the split that people call so: `val` and `dev` are validation, `restval` is train. None for no name."""
    return _CALLED.get(text.strip().lower())


def split_of_file(url: str) -> Split | None:
    """Return the split that a file's or its folder's name says: `captions_val2017.json`, `train/part-0.parquet`."""
    for text in (name(url), name(parent(url))):
        found = {_CALLED[word] for word in _IN_A_NAME.findall(text.lower())}
        if len(found) == 1:
            return found.pop()
    return None


def draw_split(image_id: str, *, seed: int, validation_share: float, test_share: float) -> Split:
    """Return the split that an image falls into; it depends on nothing but these."""
    digest = hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest) / 2**64
    if place < validation_share:
        return "validation"
    return "test" if place >= 1 - test_share else "train"


def read_split_lists(store: Store, folder: str) -> Mapping[str, Split]:
    """Return the split of each image in Flickr8k's lists (`Flickr_8k.trainImages.txt`), by file name; none without."""
    found: dict[str, Split] = {}
    for file in store.names(folder):
        if match := _LIST.fullmatch(file.lower()):
            lines = store.read_bytes(join(folder, file)).decode("utf-8-sig", "backslashreplace").splitlines()
            found |= {line.strip(): _CALLED[match[1]] for line in lines if line.strip()}
    return found
