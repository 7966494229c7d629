"""A draw between weighted texts that is the same wherever and whenever it is made."""

import hashlib
from collections.abc import Sequence
from itertools import accumulate

__all__ = ["weighted_choice"]

_BITS = 64


def weighted_choice(weights: Sequence[float], seed: int, image_id: str, name: str) -> int:
    """Return an index, drawn in proportion to the weights: a function of seed, image_id and the prompt's name alone."""
    content = "\0".join([str(seed), name, image_id]).encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(content, digest_size=_BITS // 8).digest(), "little")
    sums = list(accumulate(weights))
    point = number / (1 << _BITS) * sums[-1]
    return next((index for index, end in enumerate(sums) if point < end), len(sums) - 1)
