"""The turn that EXIF asks for. Knows no resize and no preprocessing."""

import struct
from typing import NamedTuple

from PIL import ExifTags, Image

__all__ = ["Turn", "turn_of", "upright"]

_EXIF_ERRORS = (AttributeError, LookupError, OSError, OverflowError, SyntaxError, TypeError, ValueError, struct.error)


class Turn(NamedTuple):
    """The steps that turn an image as stored upright: the swap first, then the mirrors."""

    swaps_axes: bool = False
    mirrors_x: bool = False
    mirrors_y: bool = False


_UPRIGHT = Turn()
_TURNS = {  # by EXIF orientation
    2: Turn(mirrors_x=True),
    3: Turn(mirrors_x=True, mirrors_y=True),
    4: Turn(mirrors_y=True),
    5: Turn(swaps_axes=True),
    6: Turn(swaps_axes=True, mirrors_x=True),
    7: Turn(swaps_axes=True, mirrors_x=True, mirrors_y=True),
    8: Turn(swaps_axes=True, mirrors_y=True),
}


def turn_of(image: Image.Image) -> Turn:
    """Return the turn that EXIF asks for; none where EXIF is missing or broken: such an image is read all the same."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _EXIF_ERRORS:
        return _UPRIGHT
    return _TURNS.get(orientation, _UPRIGHT) if isinstance(orientation, int) else _UPRIGHT


def upright(size: tuple[int, int], turn: Turn) -> tuple[int, int]:
    """Return width and height after the turn."""
    return size[::-1] if turn.swaps_axes else size
