"""Which image formats are read, and what other bytes seem to be.

The list has the formats that Pillow decodes itself, so that a format that a later Pillow adds is not accepted unseen.
Left out on purpose: EPS and WMF (run other programs), BUFR, GRIB, HDF5 and MPEG (identified but never decoded), FITS
(unpacks gzip without a limit), IMT, IPTC, McIdas and Photo CD (signatures so weak that other files match), and IM
(deprecated in Pillow).
"""

import codecs
import functools
import re
import struct
from typing import Any, NamedTuple

from PIL import Image, ImageFile, TiffImagePlugin

from captioner.schema import RejectReason

__all__ = ["Guess", "avif_pixels", "guess", "in_native_order", "readable_formats"]

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
    """A format that bytes seem to have, by their start."""

    name: str
    reason: RejectReason  # of the reject when no decoder accepts them


_CORRUPT = RejectReason.CORRUPT
_UNSUPPORTED = RejectReason.UNSUPPORTED
_NOT_AN_IMAGE = RejectReason.NOT_AN_IMAGE

_HEIF_BRANDS = (
    *(b"mif1", b"mif2", b"msf1", b"miaf", b"avci", b"avcs", b"j2ki", b"j2is"),
    *(b"jpeg", b"jpgs", b"vvic", b"vvis", b"evbi", b"evbs", b"1pic"),
)
_VIDEO = "MP4 video"
_UNREAD: tuple[tuple[Any, ...], ...] = (
    ("Fujifilm RAF", 0, b"FUJIFILMCCD-RAW"),
    ("Olympus ORF", 0, b"IIRO", b"IIRS", b"MMOR"),
    ("Panasonic RW2", 0, b"IIU\0"),
    ("Sigma X3F", 0, b"FOVb"),
    ("Minolta MRW", 0, b"\0MRM"),
    ("JPEG XR", 0, b"II\xbc"),
    ("Radiance HDR", 0, b"#?RADIANCE", b"#?RGBE"),
    ("DPX", 0, b"SDPX", b"XPDS"),
    ("KTX", 0, b"\xabKTX "),
    ("FLIF", 0, b"FLIF"),
    ("BPG", 0, b"BPG\xfb"),
    ("MNG or JNG", 0, b"\x8aMNG", b"\x8bJNG"),
    ("GIMP XCF", 0, b"gimp xcf"),
    ("Paint Shop Pro", 0, b"Paint Shop Pro Image File"),
    ("IFF bitmap", 8, b"ILBM", b"PBM "),
    ("EMF", 40, b" EMF"),
    ("DICOM", 128, b"DICM"),
)
"""Images that no decoder of ours reads: a name, where its signature stands, and the signature."""
_SIGNATURES: tuple[tuple[int, bytes, str, RejectReason], ...] = (
    (0, b"\xff\xd8\xff", "JPEG", _CORRUPT),
    (0, b"\x89PNG", "PNG", _CORRUPT),
    (0, b"GIF8", "GIF", _CORRUPT),
    (8, b"WEBP", "WEBP", _CORRUPT),
    (0, b"II*\0", "TIFF", _CORRUPT),
    (0, b"MM\0*", "TIFF", _CORRUPT),
    (0, b"II+\0", "TIFF", _CORRUPT),
    (0, b"MM\0+", "big-endian BigTIFF", _UNSUPPORTED),
    (4, b"ftypavif", "AVIF", _CORRUPT),
    (4, b"ftypavis", "AVIF", _CORRUPT),
    (0, b"\0\0\0\x0cjP  ", "JPEG2000", _CORRUPT),
    (0, b"\xff\x4f\xff\x51", "JPEG2000", _CORRUPT),
    (0, b"8BPS\0\2", "PSB", _UNSUPPORTED),
    (0, b"8BPS", "PSD", _CORRUPT),
    (0, b"qoif", "QOI", _CORRUPT),
    (0, b"DDS ", "DDS", _CORRUPT),
    (0, b"icns", "ICNS", _CORRUPT),
    (0, b"\0\0\1\0", "ICO", _CORRUPT),
    (4, b"ftyphe", "HEIC", _UNSUPPORTED),
    *((4, b"ftyp" + brand, f"HEIF ({brand.decode()})", _UNSUPPORTED) for brand in _HEIF_BRANDS),
    (4, b"ftypcrx ", "Canon CR3", _UNSUPPORTED),
    (0, b"\xff\x0a", "JPEG XL", _UNSUPPORTED),
    (4, b"JXL ", "JPEG XL", _UNSUPPORTED),
    (0, b"%!PS", "EPS", _UNSUPPORTED),
    (0, b"\xc5\xd0\xd3\xc6", "EPS", _UNSUPPORTED),
    (0, b"\xd7\xcd\xc6\x9a", "WMF", _UNSUPPORTED),
    (0, b"%PDF", "PDF", _UNSUPPORTED),
    (0, b"<svg", "SVG", _UNSUPPORTED),
    (0, b"SIMPLE  =", "FITS", _UNSUPPORTED),
    (0, b"\x76\x2f\x31\x01", "OpenEXR", _UNSUPPORTED),
    (0, b"AT&TFORM", "DjVu", _UNSUPPORTED),
    *((offset, start, name, _UNSUPPORTED) for name, offset, *starts in _UNREAD for start in starts),
    (0, b"version https://git-lfs", "Git LFS pointer", _NOT_AN_IMAGE),
    (0, b"<?xml", "XML", _NOT_AN_IMAGE),
    (0, b"<", "HTML or XML", _NOT_AN_IMAGE),
    (0, b"{", "JSON", _NOT_AN_IMAGE),
    (0, b"PK\3\4", "ZIP", _NOT_AN_IMAGE),
    (0, b"\x1f\x8b", "gzip", _NOT_AN_IMAGE),
    (0, b"PAR1", "Parquet", _NOT_AN_IMAGE),
    (0, b"\0" * 16, "zeros", _NOT_AN_IMAGE),
    (4, b"ftyp", _VIDEO, _NOT_AN_IMAGE),
)
# Two letters, sizes, hot spot and offset; then the size of the header that OS/2 bitmaps have. BA is an array of these.
_TIFF_LAYOUTS = {
    (order, photometric, (sample_format,), 1, (bits,), ()): modes
    for order, sample_format, bits, modes in (
        (b"II", 1, 12, ("I;16", "I;12")),
        (b"MM", 1, 12, ("I;16", "I;12")),
        (b"MM", 1, 16, ("I;16B", "I;16B")),
        (b"MM", 1, 32, ("I", "I;32BS")),
        (b"II", 3, 64, ("F", "F;64F")),
        (b"MM", 3, 64, ("F", "F;64BF")),
    )
    for photometric in (0, 1)
}
"""Grey TIFFs that Pillow's decoders read and its table lacks: order of bytes, kind and bits of samples -> modes."""
_BIG_ENDIAN = re.compile(r"^([IF];(?:16|32|64))B(S|F)?$")
_OS2_ICON = re.compile(rb"(BA.{12})?(IC|CI|CP|PT).{12}(\x0c|\x28|\x40)\0\0\0", re.DOTALL)
_AVIF_SIZE = re.compile(rb"ispe\0{4}(.{8})", re.DOTALL)


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return the formats for `Image.open`: those named above that this build knows. Teaches Pillow a few TIFFs."""
    Image.init()
    for layout, modes in _TIFF_LAYOUTS.items():
        TiffImagePlugin.OPEN_INFO.setdefault(layout, modes)
    return tuple(name for name in _READABLE if name in Image.OPEN)


def in_native_order(image: ImageFile.ImageFile) -> ImageFile.ImageFile:
    """Return an open image that is decoded in the order of bytes that libtiff gives; Pillow turns some twice."""
    image.tile = [
        tile._replace(args=(_BIG_ENDIAN.sub(r"\1N\2", tile.args[0]), *tile.args[1:]))
        if tile.codec_name == "libtiff" and isinstance(tile.args, tuple) and isinstance(tile.args[0], str)
        else tile
        for tile in image.tile
    ]
    return image


def guess(data: bytes) -> Guess:
    """Return the format that the first bytes seem to have; its name is '' if they match none."""
    head = data[:512].lstrip() if data[:1].isspace() else data[:512]
    head = head.removeprefix(codecs.BOM_UTF8)
    if head.startswith(b"<") and b"<svg" in head:
        return Guess("SVG", _UNSUPPORTED)
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return Guess("BMP", _CORRUPT)
    if _OS2_ICON.match(head):
        return Guess("OS/2 icon or pointer", _UNSUPPORTED)
    for offset, magic, name, reason in _SIGNATURES:
        if head.startswith(magic, offset):
            return Guess("HEIF", _UNSUPPORTED) if name == _VIDEO and _is_heif(head) else Guess(name, reason)
    return Guess("", _NOT_AN_IMAGE)


def _is_heif(head: bytes) -> bool:
    """Return whether a file of another brand says, in the box of its brands, that it is a HEIF image too."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return any(head[start : start + 4] in (b"heic", *_HEIF_BRANDS[:4]) for start in range(16, end, 4))


def avif_pixels(data: bytes) -> int:
    """Return the pixels of the largest image whose size an AVIF's header states; 0 if it states none."""
    sizes = [struct.unpack(">II", found.group(1)) for found in _AVIF_SIZE.finditer(data)]
    return max((width * height for width, height in sizes), default=0)
