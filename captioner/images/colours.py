"""Any image that Pillow opens -> the same image in L or RGB, 8 bits.

As transformers' `convert_to_rgb`: alpha and transparent colours on white, everything else by `Image.convert`. Colour
profiles (ICC) are ignored, as CLIP's own preprocessing ignores them. Samples that Pillow would clip are scaled:

    more than 8 bits    of a TIFF with 9 to 15 bits a sample, white is all of them set (4095 of 12 bits). Else white is
                        what a TIFF says (MaxSampleValue), or the most of 1, 8, 10, 12, 14 or 16 bits, the fewest that
                        hold all values: cameras and scanners leave the upper bits of 16 unused. Values
                        whose two bytes are equal were 8 bits of the full range, and are again.
    beyond 16 bits      with negative or greater values, the darkest is black and the brightest white. NaN counts as
                        the darkest.
    white is zero       a TIFF that says so is turned into its opposite, which Pillow does for 8 bits alone
"""

import math
import re
import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

__all__ = ["as_8_bit", "in_colour", "in_full_range", "is_plain", "lower_bytes_mode"]

_WHITES = tuple((1 << bits) - 1 for bits in (1, 8, 10, 12, 14, 16))
_MOST_UPPER = 63  # of the upper bytes of 14 bits
_DEEP = re.compile(r"(RGB|RGBA|RGBX);16([LBN])")  # raw modes
_OPPOSITE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}  # orders of bytes in a raw mode


def as_8_bit(image: Image.Image) -> Image.Image:
    """Return the image with 8-bit samples: in L where it was in I;16, I or F, else the same object."""
    if image.mode.startswith("I;16"):
        levels = _from_16_bit(image)
    elif image.mode in ("I", "F"):
        levels = _stretched(_samples(image), image)
    else:
        return image
    return Image.fromarray(255 - levels if _tag(image, ExifTags.Base.PhotometricInterpretation) == 0 else levels)


def lower_bytes_mode(image: Image.Image) -> str | None:
    """Return the raw mode in which Pillow reads the lower bytes of an image in RGB or RGBA of 16 bits, not loaded yet.

    By itself Pillow reads the upper bytes alone. None for other images."""
    tiles = getattr(image, "tile", None)
    args = tiles[0].args if tiles else None
    raw = args[0] if isinstance(args, tuple) and args else args
    found = _DEEP.fullmatch(raw) if isinstance(raw, str) and "transparency" not in image.info else None
    return f"{found[1]};16{_OPPOSITE[found[2]]}" if found else None


def in_full_range(upper: Image.Image, lower: Callable[[], Image.Image]) -> Image.Image:
    """Return an image in RGB or RGBA whose upper bytes are `upper`; with `lower` if the upper bits are unused."""
    high = np.asarray(upper)
    if high[..., :3].max() > _MOST_UPPER:
        return upper
    samples = high.astype(np.uint32) * 256 + np.asarray(lower())
    levels = [_scaled(samples[..., :3], _white_in_use(samples[..., :3]))]
    if samples.shape[2] == 4:
        levels.append(_scaled(samples[..., 3:], _white_in_use(samples[..., 3:])))
    return Image.fromarray(np.concatenate(levels, axis=2))


def is_plain(image: Image.Image) -> bool:
    """Whether an image is in L, RGB or RGBX and opaque."""
    return image.mode in ("L", "RGB", "RGBX") and not image.has_transparency_data


def in_colour(image: Image.Image) -> Image.Image:
    """Return an 8-bit image in L or RGB, on white where it was transparent; the same object if it is plain."""
    if is_plain(image):
        return image
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def _samples(image: Image.Image) -> npt.NDArray[np.float64]:
    samples = np.asarray(image)
    is_unsigned = image.mode == "I" and _tag(image, ExifTags.Base.SampleFormat) == 1
    return (samples.view(np.uint32) if is_unsigned and samples.itemsize == 4 else samples).astype(np.float64)


def _from_16_bit(image: Image.Image) -> npt.NDArray[np.uint8]:
    samples = np.asarray(image).astype(np.uint32)
    bits = _tag(image, ExifTags.Base.BitsPerSample) or 16
    white = (1 << bits) - 1 if 8 < bits < 16 else _stated_white(image, int(samples.max())) or _white_in_use(samples)
    levels = _scaled(samples, white)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        levels[samples == transparent] = 255
    return levels


def _scaled(samples: npt.NDArray[np.uint32], white: int) -> npt.NDArray[np.uint8]:
    return ((samples * 255 + white // 2) // white).astype(np.uint8)


def _stated_white(image: Image.Image, most: int) -> int | None:
    stated = _tag(image, ExifTags.Base.MaxSampleValue) or 0
    return stated if 0 < stated <= _WHITES[-1] and most <= stated else None


def _white_in_use(samples: npt.NDArray[np.uint32]) -> int:
    return _WHITES[-1] if not (samples % 257).any() else _white_of(int(samples.max()))


def _white_of(most: float) -> int:
    return next(white for white in _WHITES if most <= white)


def _tag(image: Image.Image, tag: int) -> int | None:
    """Return a number that a TIFF says, the first of several; None where it says none, and for other files."""
    found = image.tag_v2.get(tag) if isinstance(image, TiffImageFile) else None
    first = found[0] if isinstance(found, tuple) and found else found
    return first if isinstance(first, int) else None


def _stretched(samples: npt.NDArray[np.float64], image: Image.Image) -> npt.NDArray[np.uint8]:
    finite = samples[np.isfinite(samples)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if low >= 0 and high <= _WHITES[-1]:
        low, high = 0.0, float(_stated_white(image, math.ceil(high)) or _white_of(high))
    levels = (np.nan_to_num(samples, nan=low, posinf=high, neginf=low) - low) * (255 / (high - low or 1.0))
    return np.rint(levels).astype(np.uint8)
