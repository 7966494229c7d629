"""What a person may hand over as an image - PIL, numpy, bytes, a path, an open file - as pixels or a reject.

Knows no model; the decoder decides what is an image.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import Image

from captioner.errors import InputError
from captioner.images import Decoded, Decoder
from captioner.schema import Reject, RejectReason

__all__ = ["ImageLike", "decoded", "is_one_image"]

ImageLike: TypeAlias = (
    Image.Image | npt.NDArray[np.uint8] | bytes | bytearray | memoryview | str | Path | io.RawIOBase | io.BufferedIOBase
)
_EXPECTED = "a PIL image, a numpy array of uint8[H, W, 3] or [H, W], bytes, a path or an open binary file"


def is_one_image(images: ImageLike | Sequence[ImageLike]) -> TypeGuard[ImageLike]:
    """Return whether this is an image and not a sequence of some; an array of four dimensions is several."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4 and images.dtype != object
    kinds = (Image.Image, bytes, bytearray, memoryview, str, Path)
    return isinstance(images, kinds) or hasattr(images, "read")


def decoded(image: ImageLike, decoder: Decoder) -> Decoded | Reject:
    """Return the pixels of an image, or why there are none. Raises InputError for what is no image at all."""
    if isinstance(image, np.ndarray):
        return decoder.decode_image(_from_array(image))
    if isinstance(image, Image.Image):
        return decoder.decode_image(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return decoder.decode(bytes(image))
    if isinstance(image, str | Path):
        return _from_path(Path(image), decoder)
    if not hasattr(image, "read"):
        raise InputError(f"an image is a {type(image).__name__}; expected {_EXPECTED}")
    return _from_file(image, decoder)


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    is_colour = array.ndim == 3 and array.shape[2] in (3, 4)
    if array.dtype != np.uint8 or not (array.ndim == 2 or is_colour) or 0 in array.shape:
        shape = ", ".join(map(str, array.shape))
        raise InputError(f"an image is a numpy array of {array.dtype}[{shape}]; expected {_EXPECTED}")
    return Image.fromarray(np.ascontiguousarray(array))


def _from_path(path: Path, decoder: Decoder) -> Decoded | Reject:
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            return Reject(RejectReason.MISSING, f"{path} is not a file but a folder, a device or a pipe")
        return decoder.decode(path.read_bytes())
    except (OSError, ValueError) as error:  # the last for a name with a null byte
        return Reject(RejectReason.MISSING, f"{type(error).__name__}: {error}")


def _from_file(file: Any, decoder: Decoder) -> Decoded | Reject:
    try:
        data = file.read()
    except OSError as error:
        return Reject(RejectReason.FETCH_FAILED, f"{type(error).__name__}: {error}")
    if not isinstance(data, bytes):
        raise InputError(f"an image is a file of {type(data).__name__}; expected one that is open for bytes, as 'rb'")
    return decoder.decode(data)
