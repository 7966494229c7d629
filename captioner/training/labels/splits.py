"""Splits of labelled images: the names they go by, and the split of an image whose labels name none.

The latter depends on the image's name and the seed alone: other images may come and go. Knows names and hashes; reads
only Flickr8k's lists.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Literal, get_args

from captioner.storage import Store
from captioner.storage.urls import join, name, parent

__all__ = ["SPLITS", "Split", "random_split", "read_split_lists", "split_named", "split_of_file"]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "restval"), "train"),  # restval: Karpathy's further training images
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_IN_A_NAME = re.compile(r"(?<![a-z])(train|validation|valid|val|dev|test)(?:ing)?(?:20\d\d)?(?![a-z])")
_LIST = re.compile(r".*[._](train|dev|test)images\.txt")


def split_named(text: str) -> Split | None:
    """Return the split of this name: `val` and `dev` are validation, `restval` is train. None for an unknown name."""
    return _NAMES.get(text.strip().lower())


def split_of_file(url: str) -> Split | None:
    """Return the split in the name of a file or of its folder: `captions_val2017.json`, `train/part-0.parquet`."""
    for text in (name(url), name(parent(url))):
        found = {_NAMES[word] for word in _IN_A_NAME.findall(text.lower())}
        if len(found) == 1:
            return found.pop()
    return None


def random_split(image_id: str, *, seed: int, validation_share: float, test_share: float) -> Split:
    """Return the split of an image, a function of these arguments alone."""
    digest = hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest) / 2**64
    if position < validation_share:
        return "validation"
    return "test" if position >= 1 - test_share else "train"


def read_split_lists(store: Store, folder: str) -> Mapping[str, Split]:
    """Return the split of each image in Flickr8k's lists (`Flickr_8k.trainImages.txt`), by file name; none without."""
    found: dict[str, Split] = {}
    for file in store.names(folder):
        if match := _LIST.fullmatch(file.lower()):
            lines = store.read_bytes(join(folder, file)).decode("utf-8-sig", "backslashreplace").splitlines()
            found |= {line.strip(): _NAMES[match[1]] for line in lines if line.strip()}
    return found
