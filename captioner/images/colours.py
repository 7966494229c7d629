"""Any picture that Pillow opens -> the same picture in L or RGB, 8 bits.

As transformers' `convert_to_rgb`: alpha and transparent colours on white, everything else by `Image.convert`. Colour
profiles (ICC) are ignored, as CLIP's own preprocessing ignores them. What Pillow would clip is scaled instead:

    I;16 (all byte orders)  65535 is white
    I, F                    white is the smallest of 1, 255 and 65535 that no value exceeds; with negative or greater
                            values, the darkest becomes black and the brightest white. NaN counts as the darkest.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["as_8_bit", "in_colour"]


def as_8_bit(image: Image.Image) -> Image.Image:
    """Return a whole picture without deep samples: L where it was I;16, I or F, else the same object."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(_from_16_bit(image))
    if image.mode in ("I", "F"):
        return Image.fromarray(_stretched(np.asarray(image, dtype=np.float64)))
    return image


def in_colour(image: Image.Image) -> Image.Image:
    """Return an 8-bit picture in L or RGB, on white where it was transparent."""
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _from_16_bit(image: Image.Image) -> npt.NDArray[np.uint8]:
    samples = np.asarray(image).astype(np.uint32)
    levels = ((samples * 255 + 32895) >> 16).astype(np.uint8)  # = round(samples / 257)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        levels[samples == transparent] = 255
    return levels


def _stretched(samples: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    finite = samples[np.isfinite(samples)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if low >= 0 and high <= 65535:
        low, high = 0.0, next(white for white in (1.0, 255.0, 65535.0) if high <= white)
    levels = (np.nan_to_num(samples, nan=low, posinf=high, neginf=low) - low) * (255 / (high - low or 1.0))
    return np.rint(levels).astype(np.uint8)
