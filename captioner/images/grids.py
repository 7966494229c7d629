"""Which grid of tiles an image gets, and what it measures inside it: the arithmetic of LLaVA's AnyRes.

Knows sizes alone. It returns what transformers' `select_best_resolution` and `get_patch_output_size` do.
"""

import math
from collections.abc import Sequence

__all__ = ["Resolution", "best_resolution", "fitted_size"]

Resolution = tuple[int, int]
"""height, width in pixels, as configs write it."""


def best_resolution(width: int, height: int, resolutions: Sequence[Resolution]) -> Resolution:
    """Return the resolution that keeps most of the image's pixels, and of those the one that wastes the fewest."""

    def kept_and_spare(resolution: Resolution) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=kept_and_spare)


def fitted_size(width: int, height: int, resolution: Resolution) -> tuple[int, int]:
    """Return width and height of the image once it is resized, its shape kept, to fill a resolution one way."""
    scale_x, scale_y = resolution[1] / width, resolution[0] / height
    if scale_x < scale_y:
        return resolution[1], min(math.ceil(height * scale_x), resolution[0])
    return min(math.ceil(width * scale_y), resolution[1]), resolution[0]
