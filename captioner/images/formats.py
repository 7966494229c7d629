"""Which image formats are read, and what bytes that no decoder knows seem to be.

Read is what Pillow decodes by itself. Left out on purpose: EPS and WMF (run other programs), BUFR, GRIB, HDF5 and MPEG
(recognised but never decoded), FITS (unpacks gzip without bounds), IMT, IPTC, McIdas and Photo CD (signatures so weak
that they take other files for pictures), and IM (Pillow gives it up). A list, so that a format that a later Pillow adds
is not let in unseen.
"""

import functools
from typing import NamedTuple

from PIL import Image

from captioner.rows import RejectReason

__all__ = ["Guess", "guess", "readable_formats"]

# The common ones first, and those without a signature (SPIDER, TGA) last. MPO comes with JPEG, APNG with PNG.
_READABLE = (
    *(
        "JPEG",
        "PNG",
        "WEBP",
        "GIF",
        "TIFF",
        "BMP",
        "AVIF",
        "JPEG2000",
        "ICO",
        "CUR",
        "ICNS",
        "PPM",
        "PSD",
        "QOI",
        "DDS",
    ),
    *("DIB", "PCX", "DCX", "SGI", "SUN", "XBM", "XPM", "MSP", "FLI", "BLP", "FTEX", "GBR", "PIXAR", "XVTHUMB"),
    *("SPIDER", "TGA"),
)


class Guess(NamedTuple):
    """What bytes seem to be, by their start."""

    name: str
    reason: RejectReason  # what it means when no decoder takes them


_BROKEN = RejectReason.CORRUPT
_UNREAD = RejectReason.UNSUPPORTED
_OTHER = RejectReason.NOT_AN_IMAGE

_SIGNATURES: tuple[tuple[int, bytes, str, RejectReason], ...] = (
    (0, b"\xff\xd8\xff", "JPEG", _BROKEN),
    (0, b"\x89PNG", "PNG", _BROKEN),
    (0, b"GIF8", "GIF", _BROKEN),
    (8, b"WEBP", "WEBP", _BROKEN),
    (0, b"II*\0", "TIFF", _BROKEN),
    (0, b"MM\0*", "TIFF", _BROKEN),
    (0, b"II+\0", "TIFF", _BROKEN),
    (0, b"MM\0+", "TIFF", _BROKEN),
    (4, b"ftypavi", "AVIF", _BROKEN),
    (0, b"\0\0\0\x0cjP  ", "JPEG2000", _BROKEN),
    (0, b"\xff\x4f\xff\x51", "JPEG2000", _BROKEN),
    (0, b"8BPS", "PSD", _BROKEN),
    (0, b"qoif", "QOI", _BROKEN),
    (0, b"DDS ", "DDS", _BROKEN),
    (0, b"icns", "ICNS", _BROKEN),
    (0, b"\0\0\1\0", "ICO", _BROKEN),
    (4, b"ftyphe", "HEIC", _UNREAD),
    (4, b"ftypm", "HEIC, or video", _UNREAD),
    (0, b"\xff\x0a", "JPEG XL", _UNREAD),
    (4, b"JXL ", "JPEG XL", _UNREAD),
    (0, b"%!PS", "EPS", _UNREAD),
    (0, b"\xc5\xd0\xd3\xc6", "EPS", _UNREAD),
    (0, b"\xd7\xcd\xc6\x9a", "WMF", _UNREAD),
    (0, b"%PDF", "PDF", _UNREAD),
    (0, b"<svg", "SVG", _UNREAD),
    (0, b"SIMPLE  =", "FITS", _UNREAD),
    (0, b"\x76\x2f\x31\x01", "OpenEXR", _UNREAD),
    (0, b"AT&TFORM", "DjVu", _UNREAD),
    (0, b"version https://git-lfs", "Git LFS pointer", _OTHER),
    (0, b"<?xml", "XML", _OTHER),
    (0, b"<", "HTML or XML", _OTHER),
    (0, b"{", "JSON", _OTHER),
    (0, b"PK\3\4", "ZIP", _OTHER),
    (0, b"\x1f\x8b", "gzip", _OTHER),
    (0, b"PAR1", "Parquet", _OTHER),
    (0, b"\0" * 16, "zeros", _OTHER),
    (4, b"ftyp", "MP4 video", _OTHER),
)


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return the formats to hand to `Image.open`: those named above that this build of Pillow knows."""
    Image.init()
    return tuple(name for name in _READABLE if name in Image.OPEN)


def guess(data: bytes) -> Guess:
    """Return what the first bytes look like; the name is '' when they look like nothing known."""
    head = data[:512].lstrip() if data[:1].isspace() else data[:512]
    if head.startswith(b"<") and b"<svg" in head:
        return Guess("SVG", _UNREAD)
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return Guess("BMP", _BROKEN)
    for offset, magic, name, reason in _SIGNATURES:
        if head.startswith(magic, offset):
            return Guess(name, reason)
    return Guess("", _OTHER)
