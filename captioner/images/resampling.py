"""Pillow's antialiased resize of a part of an image, as products of small matrices.

Each output sample is a weighted mean of a few source samples, first along one axis, then along the other, rounded and
clipped to uint8 in between: Pillow's own algorithm (src/libImaging/Resample.c), so the results differ by 2/255 at most.
Sixteen neighbouring outputs share one small weight matrix, and the source is read where Pillow keeps it. The weights
are multiples of 2^-15 and every sum of products stays below 2^24, so float32 is exact: the pixels do not depend on the
order of summation, and thus not on the machine.

Why not `Image.resize`: a whole decode of camera JPEGs of up to 5 megapixels had 1.44 to 1.56 times the speed of plain
Pillow this way on two EPYC cores, and 1.22 times with `resize(box=)`. On two busy Xeon cores both had 1.12 times at
1024x768, in quieter minutes 1.2 to 1.4 against 1.15 to 1.2; above 2048x1536 both are the same. The JPEG alone is 52 %.
Tried there at 1024x768, and no quicker than three strided copies: `getchannel`, and masks and shifts of whole pixels.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from PIL.Image import Resampling

from captioner.images.preprocessing import Box

__all__ = ["resample", "resizes_rows_first"]

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

_ONE = 1 << 15  # 255 * 1.5 * 2^15 < 2^24; 1.5 is more than the absolute weights of any filter sum to
_OUTPUTS_PER_BLOCK = 16  # 8 or 32 take a fifth longer at 1024x768
_LINES_PER_STRIP = 64  # of float32, which stay in the cache; 24 or 256 take a fifth longer at 1024x768


class _Block(NamedTuple):
    """Weights of a few neighbouring outputs."""

    outputs: slice
    sources: slice
    weights: Floats  # float32[sources, outputs], multiples of 2^-15 that sum to 1 along the sources


class _Axis(NamedTuple):
    """One direction of a resize: source samples start..stop are all that it reads; blocks count from `start`."""

    start: int
    stop: int
    blocks: list[_Block]
    background: Floats | None  # float32[outputs], the weight of what is around the source; None without padding


def resample(
    image: Image.Image,
    box: Box,
    size: tuple[int, int],
    kernel: Resampling,
    *,
    swaps_axes: bool = False,
    canvas: Box | None = None,
    background: tuple[int, ...] = (),
) -> Pixels:
    """Return `uint8[rows, bands, columns]` of a box of an L, RGB or RGBX image, resized to `size`, columns and rows.

    The columns are resized first, then the rows; with `swaps_axes` rows become columns before. canvas: where the image
    goes on in the colour `background`, so that the box may reach beyond the image; then the image has bands for it.
    """
    samples, (width, height) = _samples(image), size
    if swaps_axes:
        samples, (width, height), box = samples.transpose(1, 0, 2), (height, width), _swapped(box)
        canvas = canvas and _swapped(canvas)
    left, top, right, bottom = box
    columns = _axis(samples.shape[1], left, right, width, kernel, canvas and (canvas[0], canvas[2]))
    rows = _axis(samples.shape[0], top, bottom, height, kernel, canvas and (canvas[1], canvas[3]))
    colour = np.array(background, np.float32)
    narrow = _narrowed(samples[rows.start : rows.stop, columns.start : columns.stop], columns, width, colour)
    num_lines, num_bands, _ = narrow.shape
    lines, small = narrow.reshape(num_lines, -1), np.empty((height, num_bands * width), np.float32)
    for block in rows.blocks:
        np.matmul(block.weights.T, lines[block.sources], out=small[block.outputs])
    if rows.background is not None:
        small += rows.background[:, None] * colour.repeat(width)
    return _round(small).astype(np.uint8).reshape(height, num_bands, width)


@functools.cache
def resizes_rows_first() -> bool:
    """Return whether the installed Pillow resizes the rows of a tall image before its columns, as Pillow 13 does."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 64), dtype=np.uint8))
    columns_first = noise.resize((32, 200), Resampling.BICUBIC).resize((32, 100), Resampling.BICUBIC)
    return noise.resize((32, 100), Resampling.BICUBIC).tobytes() != columns_first.tobytes()


def _swapped(box: Box) -> Box:
    left, top, right, bottom = box
    return top, left, bottom, right


def _samples(image: Image.Image) -> Pixels:
    """Return `uint8[height, width, 1 or 3]`: a view of the image's own memory where it is in one piece."""
    try:
        flat = pa.array(image) if image.mode == "L" else pa.array(image).values
        samples = np.frombuffer(flat.buffers()[1], np.uint8)  # `to_numpy` imports pandas, which takes 0.24 s
    except ValueError:  # above 16 MB Pillow keeps an image in several blocks
        samples = np.frombuffer(image.tobytes("raw", "L" if image.mode == "L" else "RGBX"), np.uint8)
    return samples.reshape(image.height, image.width, -1)[:, :, :3]


def _narrowed(samples: Pixels, columns: _Axis, side: int, colour: Floats) -> Floats:
    """Return `float32[lines, bands, side]`, whole numbers from 0 to 255. colour: that of the padding, if any."""
    num_lines, width, num_bands = samples.shape
    narrow = np.empty((num_lines, num_bands, side), np.float32)
    strip = np.empty((_LINES_PER_STRIP, num_bands, width), np.float32)
    for top in range(0, num_lines, _LINES_PER_STRIP):
        source = samples[top : top + _LINES_PER_STRIP]
        for band in range(num_bands):
            strip[: len(source), band] = source[:, :, band]
        lines = strip[: len(source)].reshape(-1, width)
        narrow_lines = narrow[top : top + len(source)].reshape(-1, side)
        for block in columns.blocks:
            np.matmul(lines[:, block.sources], block.weights, out=narrow_lines[:, block.outputs])
        if columns.background is not None:
            narrow[top : top + len(source)] += columns.background * colour[:, None]
        _round(narrow_lines)
    return narrow


def _round(levels: Floats) -> Floats:
    np.rint(levels, out=levels)
    return levels.clip(0, 255, out=levels)  # np.clip costs small images as much again


@functools.lru_cache(maxsize=32)  # cameras and crawlers write few sizes
def _axis(
    length: int,
    low: float,
    high: float,
    num_outputs: int,
    kernel: Resampling,
    canvas: tuple[float, float] | None = None,
) -> _Axis:
    first, last, weights, background = _taps(length, low, high, num_outputs, kernel, canvas)
    starts = np.arange(0, num_outputs, _OUTPUTS_PER_BLOCK)
    stops = np.minimum(starts + _OUTPUTS_PER_BLOCK, num_outputs)
    begins, ends = first[starts], last[stops - 1]
    block, column = np.divmod(np.arange(num_outputs), _OUTPUTS_PER_BLOCK)
    offsets = (first - begins[block])[:, None] + np.arange(weights.shape[1])
    dense = np.zeros((len(starts), int(offsets.max()) + 1, _OUTPUTS_PER_BLOCK), np.float32)
    dense[block[:, None], offsets, column[:, None]] = weights
    blocks = [
        _Block(slice(start, stop), slice(begin, end), weights[: end - begin, : stop - start])
        for start, stop, begin, end, weights in zip(
            starts.tolist(),
            stops.tolist(),
            (begins - first[0]).tolist(),
            (ends - first[0]).tolist(),
            dense,
            strict=True,
        )
    ]
    return _Axis(int(first[0]), int(last[-1]), blocks, background)


def _taps(
    length: int, low: float, high: float, num_outputs: int, kernel: Resampling, canvas: tuple[float, float] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64], Floats | None]:
    """Return first and last (exclusive) source of each output, the weights float64[outputs, most sources], and the
    weight of what is around the source, float32[outputs]; a canvas makes the source longer at both ends."""
    support, function = _KERNELS[kernel]
    start, stop = (math.floor(canvas[0]), math.ceil(canvas[1])) if canvas else (0, length)
    scale = (high - low) / num_outputs
    stretch = max(scale, 1.0)  # antialiasing: the filter grows with the shrinking
    centres = low - start + (np.arange(num_outputs) + 0.5) * scale
    first = np.maximum((centres - support * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + support * stretch + 0.5).astype(np.int64), stop - start)
    sources = first[:, None] + np.arange((last - first).max())
    weights = function(np.abs((sources - centres[:, None] + 0.5) / stretch)) * (sources < last[:, None])
    if canvas:  # of a reduced image it may begin and end within a sample
        weights *= (np.minimum(sources + 1 + start, canvas[1]) - np.maximum(sources + start, canvas[0])).clip(0, 1)
    whole = np.rint(weights * (_ONE / weights.sum(axis=1, keepdims=True)))
    heaviest = whole.argmax(axis=1)
    whole[np.arange(num_outputs), heaviest] += _ONE - whole.sum(axis=1)  # so that a plain colour stays itself
    if not canvas:
        return first, last, whole / _ONE, None
    return _within(first + start, last + start, whole / _ONE, length)


def _within(
    first: npt.NDArray[np.int64], last: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64], Floats]:
    """Return taps of 0..length alone, and the weight of the others."""
    sources = first[:, None] + np.arange(weights.shape[1])
    is_outside = (sources < 0) | (sources >= length)
    background = (weights * is_outside).sum(axis=1).astype(np.float32)
    first, last = first.clip(0, length - 1), last.clip(1, length)
    inside = np.zeros_like(weights)
    rows, columns = np.nonzero(~is_outside)
    inside[rows, (sources - first[:, None])[rows, columns]] = weights[rows, columns]
    return first, last, inside, background


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
