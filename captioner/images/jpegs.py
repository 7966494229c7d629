"""JPEGs in colour by simplejpeg, where it is installed: the same libjpeg-turbo and the same pixels as Pillow's.

It writes four bytes a pixel at once, where Pillow copies each line into an image that it has cleared before: a fifth of
the decode at 12 megapixels. Whatever it refuses, or warns of, is left to Pillow.
"""

from typing import Any

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

try:
    import simplejpeg
except ImportError:  # a platform without a wheel
    simplejpeg = None

__all__ = ["HAS_SIMPLEJPEG", "read_jpeg"]

HAS_SIMPLEJPEG = simplejpeg is not None


def read_jpeg(data: bytes, image: Image.Image, scale: int) -> Image.Image | None:
    """Return a JPEG in RGBX, decoded at 1 / `scale` of its size: 1, 2, 4 or 8; None where Pillow has to decode it.

    image: the same JPEG, open and not loaded."""
    if simplejpeg is None or not isinstance(image, JpegImageFile) or image.mode != "RGB":
        return None
    smallest = {"min_width": image.width // scale, "min_height": image.height // scale} if scale > 1 else {}
    try:
        samples: Any = simplejpeg.decode_jpeg(data, colorspace="RGBX", min_factor=scale, strict=True, **smallest)
    except ValueError:  # also of what is no fault, as bytes behind the end
        return None
    size = -(-image.width // scale), -(-image.height // scale)
    if samples.shape != (size[1], size[0], 4):  # a lossless JPEG cannot be scaled
        return None
    return Image.frombuffer("RGBX", size, samples, "raw", "RGBX", 0, 1)
