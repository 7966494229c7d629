"""Pillow's antialiased resize of a part of a picture, as products of small matrices.

Each output sample is a weighted mean of a few source samples, first along the rows, then along the columns, rounded
and clipped to uint8 in between: Pillow's own algorithm (src/libImaging/Resample.c), so the results differ by 1/255 at
most. Sixteen neighbouring outputs share one small weight matrix; BLAS then needs half the time of Pillow's scalar loop.
The weights are multiples of 2^-15 and every sum of products stays below 2^24, so float32 is exact: the pixels do not
depend on the order of summation, and thus not on the machine.
"""

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.Image import Resampling

from captioner.images.preprocessing import Box

__all__ = ["Axis", "axes", "resample"]

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

_ONE = 1 << 15  # 255 * 1.5 * 2^15 < 2^24; 1.5 is more than the absolute weights of any filter sum to
_OUTPUTS_PER_BLOCK = 16  # measured at 1024x768 on one core: 2.3 ms; 32 outputs 3.2 ms, 64 outputs 4.6 ms
_FEW_PIXELS = 96 * 96  # up to here numpy takes the colours apart in less time than a call of Pillow for each
_LINES_PER_STRIP = 512  # float32 strips that stay in the cache, and a 100-megapixel picture never becomes float32 whole


class Block(NamedTuple):
    """Weights of a few neighbouring outputs."""

    outputs: slice
    sources: slice  # from the start of its axis
    weights: Floats  # float32[sources, outputs], multiples of 2^-15 that sum to 1 along the sources


class Axis(NamedTuple):
    """One direction of a resize: source samples start..stop are all that it reads."""

    start: int
    stop: int
    blocks: list[Block]


def axes(size: tuple[int, int], box: Box, num_outputs: int, kernel: Resampling) -> tuple[Axis, Axis]:
    """Return the columns' and the rows' axis of a resize of `box`, in an image of `size`, to a square."""
    (width, height), (left, top, right, bottom) = size, box
    return _axis(width, left, right, num_outputs, kernel), _axis(height, top, bottom, num_outputs, kernel)


def resample(image: Image.Image, columns: Axis, rows: Axis) -> Pixels:
    """Return `uint8[bands, S, S]`, contiguous, of an L or RGB image that holds just what the two axes read."""
    planes = _planes(image)
    num_planes, height, width = planes.shape
    num_columns, num_rows = columns.blocks[-1].outputs.stop, rows.blocks[-1].outputs.stop
    lines, narrow = planes.reshape(-1, width), np.empty((num_planes * height, num_columns), np.float32)
    for top in range(0, len(lines), _LINES_PER_STRIP):
        strip = lines[top : top + _LINES_PER_STRIP].astype(np.float32)
        narrow_strip = narrow[top : top + _LINES_PER_STRIP]
        for block in columns.blocks:
            np.matmul(strip[:, block.sources], block.weights, out=narrow_strip[:, block.outputs])
        _round(narrow_strip)
    narrow = narrow.reshape(num_planes, height, num_columns)
    small = np.empty((num_planes, num_rows, num_columns), np.float32)
    for block in rows.blocks:
        np.matmul(block.weights.T, narrow[:, block.sources], out=small[:, block.outputs])
    return _round(small).astype(np.uint8)


def _planes(image: Image.Image) -> Pixels:
    if image.width * image.height <= _FEW_PIXELS:
        pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, -1)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    bands = image.getbands()
    planes = np.empty((len(bands), image.height, image.width), np.uint8)
    for plane, band in zip(planes, bands, strict=True):
        plane.reshape(-1)[:] = np.frombuffer(image.tobytes("raw", band), np.uint8)
    return planes


def _round(levels: Floats) -> Floats:
    np.rint(levels, out=levels)
    return levels.clip(0, 255, out=levels)  # np.clip costs small pictures as much again


@functools.lru_cache(maxsize=32)  # cameras and crawlers write few sizes
def _axis(length: int, low: float, high: float, num_outputs: int, kernel: Resampling) -> Axis:
    first, last, weights = _taps(length, low, high, num_outputs, kernel)
    starts = np.arange(0, num_outputs, _OUTPUTS_PER_BLOCK)
    stops = np.minimum(starts + _OUTPUTS_PER_BLOCK, num_outputs)
    begins, ends = first[starts], last[stops - 1]
    block, column = np.divmod(np.arange(num_outputs), _OUTPUTS_PER_BLOCK)
    offsets = (first - begins[block])[:, None] + np.arange(weights.shape[1])
    dense = np.zeros((len(starts), int(offsets.max()) + 1, _OUTPUTS_PER_BLOCK), np.float32)
    dense[block[:, None], offsets, column[:, None]] = weights
    blocks = [
        Block(slice(start, stop), slice(begin, end), weights[: end - begin, : stop - start])
        for start, stop, begin, end, weights in zip(
            starts.tolist(),
            stops.tolist(),
            (begins - first[0]).tolist(),
            (ends - first[0]).tolist(),
            dense,
            strict=True,
        )
    ]
    return Axis(int(first[0]), int(last[-1]), blocks)


def _taps(
    length: int, low: float, high: float, num_outputs: int, kernel: Resampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return first and last (exclusive) source of each output, and the weights float64[outputs, most sources]."""
    support, function = _KERNELS[kernel]
    scale = (high - low) / num_outputs
    stretch = max(scale, 1.0)  # antialiasing: the filter grows with the shrinking
    centres = low + (np.arange(num_outputs) + 0.5) * scale
    first = np.maximum((centres - support * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + support * stretch + 0.5).astype(np.int64), length)
    sources = first[:, None] + np.arange((last - first).max())
    weights = function(np.abs((sources - centres[:, None] + 0.5) / stretch)) * (sources < last[:, None])
    whole = np.rint(weights * (_ONE / weights.sum(axis=1, keepdims=True)))
    heaviest = whole.argmax(axis=1)
    whole[np.arange(num_outputs), heaviest] += _ONE - whole.sum(axis=1)  # so that a plain colour stays itself
    return first, last, whole / _ONE


def _bilinear(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.maximum(1 - x, 0)


def _bicubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _lanczos(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)


_KERNELS = {
    Resampling.BILINEAR: (1.0, _bilinear),
    Resampling.BICUBIC: (2.0, _bicubic),
    Resampling.LANCZOS: (3.0, _lanczos),
}
