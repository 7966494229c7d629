"""Drawn JPEGs that behave like those of cameras: dead leaves.

Ellipses and polygons cover one another, many small and few large ones (density r^-3), under uneven light and sensor
noise. Of 125 camera JPEGs the medians are 2.0 to 2.3 bits a pixel and a Laplacian of 18 in the 224-pixel square; of
these, 2.1 to 2.6 and 11 to 22. Reduced decoding errs as on the camera JPEGs, or more: by 10 to 49/255 at most where
these have a median of 11 to 14. Smooth drawings without edges make it look exact.
"""

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["photograph"]

Random = np.random.Generator

_PIXELS_PER_LEAF = 400
_MIN_RADIUS, _MAX_RADIUS_SHARE = 1.5, 0.35  # pixels; of the short side
_SAMPLINGS = ("4:2:2", "4:2:0")


def photograph(width: int, height: int, seed: int) -> bytes:
    """Return a JPEG of quality 92; even seeds have 4:2:2, odd ones 4:2:0."""
    random = np.random.default_rng(seed)
    image = _leaves(width, height, random).convert("RGB").filter(ImageFilter.GaussianBlur(0.6))
    light = 1 + 0.175 * _octaves(width, height, random)
    levels = np.asarray(image, np.float32) * light[:, :, None]
    levels += random.normal(0, 2.5, (height, width, 1)) + random.normal(0, 1.25, (height, width, 3))
    buffer = io.BytesIO()
    image = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=92, subsampling=_SAMPLINGS[seed % 2])
    return buffer.getvalue()


def _leaves(width: int, height: int, random: Random) -> Image.Image:
    image = Image.new("YCbCr", (width, height), (115, 128, 128))
    draw = ImageDraw.Draw(image)
    num = width * height // _PIXELS_PER_LEAF
    low, high = _MIN_RADIUS**-2, (_MAX_RADIUS_SHARE * min(width, height)) ** -2
    radii = (low - random.random(num) * (low - high)) ** -0.5
    centres = random.random((num, 2)) * (width, height)
    stretches = np.exp(random.normal(0, 0.25, num))
    angles, corners = random.random(num) * math.tau, random.integers(3, 7, num)
    for index, colour in enumerate(_colours(num, random)):
        radius, stretch = radii[index], stretches[index]
        half = np.array((radius * stretch, radius / stretch))
        if index % 2:
            draw.ellipse((*(centres[index] - half), *(centres[index] + half)), fill=colour)
        else:
            points = centres[index] + half * _polygon(corners[index], angles[index])
            draw.polygon([(x, y) for x, y in points.tolist()], fill=colour)
    return image


def _colours(num: int, random: Random) -> list[Any]:
    """Return YCbCr of each leaf; one in ten is black or white."""
    luma, chroma = random.normal(115, 55, num), random.normal(128, 22, (num, 2))
    is_pure = random.random(num) < 0.1
    luma[is_pure] = np.where(random.random(is_pure.sum()) < 0.5, 0, 255)
    chroma[is_pure] = 128
    return [tuple(colour) for colour in np.clip(np.column_stack([luma, chroma]), 0, 255).astype(int).tolist()]


def _polygon(num_corners: int, angle: float) -> npt.NDArray[np.float64]:
    turns = angle + np.arange(num_corners) * (math.tau / num_corners)
    return np.column_stack([np.cos(turns), np.sin(turns)])


def _octaves(width: int, height: int, random: Random) -> npt.NDArray[np.float32]:
    """Return float32[height, width] of coarse to fine random structure, with a standard deviation of 1."""
    total = np.zeros((height, width), np.float32)
    for octave in range(1, 10):
        columns = 2**octave + 1
        rows = max(2, columns * height // width)
        coarse = Image.fromarray(random.normal(0, 1, (rows, columns)).astype(np.float32))
        total += 0.6**octave * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return total / np.float32(total.std())
