"""The squares that the model reads: cut out of a decoded image, reduced, resized and turned upright.

An image is first reduced by whole numbers to the means of k x k pixels where at least `_MIN_OVERSAMPLING` times the
pixels a side remain, because a resize of the whole would take as long as the decode. Dead-leaves images at the sizes of
cameras then differ from CLIPImageProcessor by at most 3/255 and by 0.2/255 on average (`python -m tests.bench.images`);
of 71 camera JPEGs with 1.8 to 16 megapixels the median was 1 to 2 at most, the worst 3.
"""

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from captioner.images.colours import in_colour, is_plain
from captioner.images.orientation import Turn, upright
from captioner.images.preprocessing import Box, Preprocessing, View
from captioner.images.resampling import resample, resizes_rows_first

__all__ = ["reduction", "squares"]

Pixels = npt.NDArray[np.uint8]

_MIN_OVERSAMPLING = 4  # at 3 the worst of the camera JPEGs was 6/255 off
_KERNEL_REACH = 3  # output pixels: Lanczos reads three to each side, the other kernels fewer


def squares(
    image: Image.Image, size: tuple[int, int], turn: Turn, preprocessing: Preprocessing, *, scale: int = 1
) -> Pixels:
    """Return uint8[3, S, S], or uint8[T, 3, S, S] of an image in tiles; upright, contiguous and writable.

    The first of the tiles is the whole image; the others follow row by row. image: 8 bits a sample, as stored, decoded
    at 1 / `scale` of its `size`.
    """
    width, height = upright(size, turn)
    resolution = preprocessing.resolution(width, height)
    whole = _resized(image, size, turn, preprocessing.square_view(width, height), preprocessing, scale)
    if resolution is None:
        return whole
    view = preprocessing.grid_view(width, height, resolution)
    left, top = (resolution[1] - view.width) // 2, (resolution[0] - view.height) // 2
    grid = np.zeros((3, *resolution), np.uint8)  # black around the image, before normalisation
    grid[:, top : top + view.height, left : left + view.width] = _resized(image, size, turn, view, preprocessing, scale)
    side = preprocessing.size
    rows, columns = resolution[0] // side, resolution[1] // side
    tiles = np.empty((1 + rows * columns, 3, side, side), np.uint8)
    tiles[0] = whole
    tiles[1:] = grid.reshape(3, rows, side, columns, side).transpose(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    return tiles


def _resized(
    image: Image.Image, size: tuple[int, int], turn: Turn, view: View, preprocessing: Preprocessing, scale: int
) -> Pixels:
    """Return uint8[3, height, width] of a view, upright, contiguous and writable."""
    box, canvas = (_divided(_stored(part, size, turn), scale) for part in (view.box, view.canvas or view.box))
    outputs = upright((view.width, view.height), turn)
    part, (box, canvas) = _reduced(image, box, canvas, outputs)
    if view.canvas and part.mode == "L":
        part = part.convert("RGB")  # the padding is coloured
    rows_first = _rows_first(view)
    samples = resample(
        part,
        box,
        outputs,
        preprocessing.resample,
        swaps_axes=turn.swaps_axes != rows_first,
        canvas=canvas if view.canvas else None,
        background=preprocessing.background,
    )
    pixels = samples.transpose((1, 2, 0) if rows_first else (1, 0, 2))
    if turn.mirrors_x:
        pixels = pixels[:, :, ::-1]
    if turn.mirrors_y:
        pixels = pixels[:, ::-1]
    return np.array(np.broadcast_to(pixels, (3, *pixels.shape[1:])), order="C")


def _stored(box: Box, size: tuple[int, int], turn: Turn) -> Box:
    """Return the box of the image as stored that is a box of the upright image."""
    width, height = upright(size, turn)
    left, top, right, bottom = box
    if turn.mirrors_x:
        left, right = width - right, width - left
    if turn.mirrors_y:
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if turn.swaps_axes else (left, top, right, bottom)


def reduction(size: tuple[int, int], box: Box, outputs: tuple[int, int]) -> int:
    """Return, for a box that is resized to so many columns and rows, the greatest factor to reduce by that leaves
    pixels enough and meets no incomplete cell.

    Pillow weights the last cell of an axis like the others though it has fewer pixels: up to 11/255 off.
    """
    most = int(min((box[2] - box[0]) / outputs[0], (box[3] - box[1]) / outputs[1]) / _MIN_OVERSAMPLING)

    def fits(factor: int) -> bool:
        ends = (
            _read_range(box[0], box[2], size[0], outputs[0], factor)[1],
            _read_range(box[1], box[3], size[1], outputs[1], factor)[1],
        )
        return all(end % factor == 0 for end in ends)

    return next((factor for factor in range(most, 1, -1) if fits(factor)), 1)


def _rows_first(view: View) -> bool:
    """Return whether CLIPImageProcessor's resize of an upright image begins with its rows; both ways round and clip.

    Pillow 13 (src/libImaging/Resample.c) compares the sizes of the whole image, not of the crop.
    """
    width, height, resized_width, resized_height = view.whole
    shrinks_by = height - resized_height
    return resizes_rows_first() and shrinks_by > 0 and shrinks_by > 2 * (width - resized_width)


def _reduced(
    image: Image.Image, box: Box, canvas: Box, outputs: tuple[int, int]
) -> tuple[Image.Image, tuple[Box, Box]]:
    """Return an L or RGB image with all that a resize of `box` reads, at a fraction of its size if that is much more
    than the resize needs, and box and canvas in that image."""
    factor = reduction(image.size, box, outputs)
    if factor == 1 and is_plain(image):
        return image, (box, canvas)
    left, right = _read_range(box[0], box[2], image.width, outputs[0], factor)
    top, bottom = _read_range(box[1], box[3], image.height, outputs[1], factor)
    region = (left, top, right, bottom)
    part = image.reduce(factor, box=region) if is_plain(image) else _cropped(image, region, factor)
    return part, (_divided(_moved(box, left, top), factor), _divided(_moved(canvas, left, top), factor))


def _cropped(image: Image.Image, region: tuple[int, int, int, int], factor: int) -> Image.Image:
    part = in_colour(image.crop(region))
    return part.reduce(factor) if factor > 1 else part


def _read_range(low: float, high: float, length: int, num_outputs: int, factor: int) -> tuple[int, int]:
    """Return first sample and end of those that a resize of low..high reads, in whole cells of `factor`."""
    reach = _KERNEL_REACH * max((high - low) / num_outputs, 1)
    first, end = math.floor((low - reach) / factor) * factor, math.ceil((high + reach) / factor) * factor
    return max(first, 0), min(end, length)


def _moved(box: Box, left: int, top: int) -> Box:
    return box[0] - left, box[1] - top, box[2] - left, box[3] - top


def _divided(box: Box, by: int) -> Box:
    left, top, right, bottom = box
    return left / by, top / by, right / by, bottom / by
