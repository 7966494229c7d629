"""Some hundred small image files of all kinds, drawn by code, each with its expected outcome. Deterministic.

Every file shows four quadrants: `COLOURS`, or `GREYS` where its format has no colours. An outcome is the quadrants that
are seen, row by row, or the reason of a reject. Formats that a build of Pillow may lack are left out where it does.
"""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, features

from captioner.schema import RejectReason

WIDTH, HEIGHT = 48, 32
RED, GREEN, BLUE, GREY, WHITE = (220, 30, 40), (30, 200, 50), (40, 50, 210), (128, 128, 128), (255, 255, 255)
COLOURS = (RED, GREEN, BLUE, GREY)
GREYS = tuple((level,) * 3 for level in (40, 100, 160, 220))
Quadrants = Sequence[tuple[int, int, int]]
Samples = npt.NDArray[Any]


class DrawnFile(NamedTuple):
    """A file and what is expected of it: quadrants, or the reason of its reject."""

    name: str
    data: bytes
    expected: Quadrants | RejectReason
    size: tuple[int, int] = (WIDTH, HEIGHT)


def drawn_files() -> Iterator[DrawnFile]:
    """Yield all files, in the same order each time, each under a name of its own."""
    yield from _of_modes()
    yield from _jpegs()
    yield from _turned()
    yield from _with_profiles()
    yield from _pngs()
    yield from _dark()
    yield from _tiffs()
    yield from _netpbm()
    yield from _bitmaps()
    yield from _of_frames()
    yield from _cut()


def _quadrants(values: Samples) -> Samples:
    """Return values[4, ...] as an image of four quadrants."""
    top, bottom = np.array([0] * (WIDTH // 2) + [1] * (WIDTH // 2)), np.array([2] * (WIDTH // 2) + [3] * (WIDTH // 2))
    return values[np.stack([top] * (HEIGHT // 2) + [bottom] * (HEIGHT // 2))]


COLOUR_SAMPLES = _quadrants(np.array(COLOURS, np.uint8))
GREY_SAMPLES = _quadrants(np.array([grey[0] for grey in GREYS], np.uint8))


def _drawn(mode: str) -> Image.Image:
    if mode in ("L", "LA", "I;16", "I", "F", "1"):
        grey = Image.fromarray(GREY_SAMPLES)
        if mode == "I;16":
            return Image.fromarray(GREY_SAMPLES.astype(np.uint16) * 257)
        if mode == "1":
            return grey.point([255 * (level > 128) for level in range(256)]).convert("1")
        return grey.convert(mode)
    image = Image.fromarray(COLOUR_SAMPLES)
    return image.quantize(4) if mode == "P" else image.convert(mode)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


_BLACK_AND_WHITE: Quadrants = ((0, 0, 0), (0, 0, 0), WHITE, WHITE)
_MODES: dict[str, tuple[str, ...]] = {
    "AVIF": ("L", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "DDS": ("L", "LA", "RGB", "RGBA"),
    "DIB": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
    "MSP": ("1",),
    "PCX": ("1", "L", "P", "RGB"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "PPM": ("1", "L", "RGB", "RGBA", "I;16", "F"),
    "QOI": ("RGB", "RGBA"),
    "SGI": ("L", "RGB", "RGBA"),
    "SPIDER": ("F",),
    "TGA": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "WEBP": ("L", "RGB", "RGBA", "P"),
    "XBM": ("1",),
}
_OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
_MAY_LACK = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}


def _of_modes() -> Iterator[DrawnFile]:
    for kind, modes in _MODES.items():
        if kind in _MAY_LACK and not features.check(_MAY_LACK[kind]):
            continue
        for mode in modes:
            data = _saved(_drawn(mode), kind, **_OPTIONS.get(kind, {}))
            yield DrawnFile(f"{mode} in {kind}", data, _seen_in(mode, kind))


def _seen_in(mode: str, kind: str) -> Quadrants:
    if mode == "1":
        return tuple(_BLACK_AND_WHITE)
    return GREYS if mode in ("L", "LA", "I;16", "I", "F") else COLOURS


# --- JPEG: layouts, orientations, profiles ---


def _jpegs() -> Iterator[DrawnFile]:
    image = _drawn("RGB")
    for subsampling, is_progressive, restarts in product((0, 1, 2), (False, True), (0, 1)):
        options = {"subsampling": subsampling, "progressive": is_progressive, "restart_marker_rows": restarts}
        name = f"JPEG, subsampling {subsampling}, progressive {is_progressive}, restarts {restarts}"
        yield DrawnFile(name, _saved(image, "JPEG", quality=95, **options), COLOURS)
    yield DrawnFile("JPEG that keeps RGB", _saved(image, "JPEG", quality=95, keep_rgb=True), COLOURS)
    yield DrawnFile("JPEG with bytes behind it", _saved(image, "JPEG", quality=95) + bytes(100), COLOURS)
    yield DrawnFile("JPEG behind a long comment", _saved(image, "JPEG", quality=95, comment=b"x" * 60_000), COLOURS)
    second = Image.fromarray(255 - COLOUR_SAMPLES)
    data = _saved(image, "MPO", save_all=True, append_images=[second], quality=95)
    yield DrawnFile("the first of two images in an MPO", data, COLOURS)


_TURNED = {1: (0, 1, 2, 3), 2: (1, 0, 3, 2), 3: (3, 2, 1, 0), 4: (2, 3, 0, 1)}
_TURNED |= {5: (0, 2, 1, 3), 6: (2, 0, 3, 1), 7: (3, 1, 2, 0), 8: (1, 3, 0, 2)}
_OUT_OF_RANGE = (0, 9, 65535)


def _turned() -> Iterator[DrawnFile]:
    kinds = ["JPEG", "PNG", "TIFF", *(kind for kind in ("WEBP", "AVIF") if features.check(kind.lower()))]
    for kind, orientation in product(kinds, (*_TURNED, *_OUT_OF_RANGE)):
        if kind == "AVIF" and orientation in _OUT_OF_RANGE:
            continue  # Pillow does not write it
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = _saved(_drawn("RGB"), kind, exif=exif, **_OPTIONS.get(kind, {}))
        order = _TURNED.get(orientation, _TURNED[1])
        size = (HEIGHT, WIDTH) if orientation in (5, 6, 7, 8) else (WIDTH, HEIGHT)
        yield DrawnFile(f"{kind}, turned by EXIF {orientation}", data, [COLOURS[place] for place in order], size)
    whole = _saved(_drawn("RGB"), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    yield DrawnFile("JPEG with broken EXIF", whole, COLOURS)


def _with_profiles() -> Iterator[DrawnFile]:
    """Profiles do not change pixels, as in CLIP's own preprocessing, whether they are right or not."""
    profiles = {"nonsense": b"no profile", "long": bytes(range(256)) * 300}
    if features.check("littlecms2"):
        from PIL import ImageCms

        profiles["sRGB"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for (name, profile), kind in product(profiles.items(), ("JPEG", "PNG", "TIFF", "WEBP")):
        if features.check(_MAY_LACK.get(kind, "jpg")):
            data = _saved(_drawn("RGB"), kind, icc_profile=profile, **_OPTIONS.get(kind, {}))
            yield DrawnFile(f"{kind} with a profile: {name}", data, COLOURS)


# --- PNG: all depths, transparent colours, interlacing ---


def png(rows: Samples, bits: int, colour_type: int, chunks: bytes = b"", *, is_interlaced: bool = False) -> bytes:
    """A PNG of samples[H, W, ...], of so many bits."""
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], bits, colour_type, 0, 0, is_interlaced)
    steps = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    passes = [rows[y::dy, x::dx] for x, y, dx, dy in steps] if is_interlaced else [rows]
    lines = b"".join(b"\0" + packed(row, bits) for part in passes if part.size for row in part)
    body = png_chunk(b"IHDR", header) + chunks + png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def packed(row: Samples, bits: int, order: str = ">") -> bytes:
    """The samples of a row, the first in the highest bits; 16 and more bits in an order of bytes."""
    if bits in (16, 32):
        return row.astype(f"{order}u{bits // 8}").tobytes()
    bits_of = (row.reshape(-1, 1).astype(np.int64) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(bits_of.astype(np.uint8).ravel()).tobytes()


def _levels(bits: int, samples: Samples = GREY_SAMPLES) -> Samples:
    return np.rint(samples.astype(float) * ((1 << bits) - 1) / 255).astype(np.int64)


def _seen_levels(bits: int) -> Quadrants:
    """The quadrants that so few bits can show."""
    return [
        (round(int(level) * 255 / ((1 << bits) - 1)),) * 3 for level in _levels(bits, np.array([40, 100, 160, 220]))
    ]


def _with_alpha(samples: Samples, alpha: int) -> Samples:
    samples = samples.reshape(HEIGHT, WIDTH, -1)
    return np.concatenate([samples, np.full((HEIGHT, WIDTH, 1), alpha, samples.dtype)], axis=2)


def _pngs() -> Iterator[DrawnFile]:
    for bits, is_interlaced in product((1, 2, 4, 8, 16), (False, True)):
        data = png(_levels(bits), bits, 0, is_interlaced=is_interlaced)
        yield DrawnFile(f"grey PNG of {bits} bits, interlaced {is_interlaced}", data, _seen_levels(bits))
    palette = png_chunk(b"PLTE", bytes(np.array(COLOURS, np.uint8)))
    places = _quadrants(np.arange(4))
    for bits, is_interlaced in product((2, 4, 8), (False, True)):
        data = png(places, bits, 3, palette, is_interlaced=is_interlaced)
        yield DrawnFile(f"PNG with a palette, {bits} bits, interlaced {is_interlaced}", data, COLOURS)
    for bits, is_interlaced in product((8, 16), (False, True)):
        data = png(_levels(bits, COLOUR_SAMPLES), bits, 2, is_interlaced=is_interlaced)
        yield DrawnFile(f"PNG in RGB of {bits} bits, interlaced {is_interlaced}", data, COLOURS)
        for name, colour_type, samples, seen in (("RGB", 6, COLOUR_SAMPLES, COLOURS), ("grey", 4, GREY_SAMPLES, GREYS)):
            most = (1 << bits) - 1
            for alpha, expected in ((most, seen), (0, [WHITE] * 4), (most // 2, [_on_white(c) for c in seen])):
                data = png(_with_alpha(_levels(bits, samples), alpha), bits, colour_type, is_interlaced=is_interlaced)
                yield DrawnFile(
                    f"PNG, {name} of {bits} bits with alpha {alpha}, interlaced {is_interlaced}", data, expected
                )
    some = [COLOURS[0], WHITE, *COLOURS[2:]]
    yield DrawnFile(
        "PNG, a transparent colour of the palette", png(places, 8, 3, palette + png_chunk(b"tRNS", b"\xff\0")), some
    )
    colour = png_chunk(b"tRNS", struct.pack(">HHH", *GREEN))
    yield DrawnFile("PNG, a transparent colour in RGB", png(COLOUR_SAMPLES, 8, 2, colour), some)
    level = png_chunk(b"tRNS", struct.pack(">H", 100 * 257))
    seen = [GREYS[0], WHITE, *GREYS[2:]]
    yield DrawnFile("PNG, a transparent level of 16 bits", png(_levels(16), 16, 0, level), seen)
    for bits in (10, 12, 14):
        deep = _levels(bits, COLOUR_SAMPLES)
        for alpha, seen in ((65535, COLOURS), ((1 << bits) - 1, COLOURS), (0, [WHITE] * 4)):
            data = png(_with_alpha(deep, alpha), 16, 6)
            yield DrawnFile(f"PNG in RGBA of 16 bits, {bits} in use, alpha {alpha}", data, seen)
        yield DrawnFile(f"grey PNG of 16 bits, {bits} in use", png(_levels(bits), 16, 0), GREYS)
        yield DrawnFile(f"PNG in RGB of 16 bits, {bits} in use", png(_levels(bits, COLOUR_SAMPLES), 16, 2), COLOURS)


def _dark() -> Iterator[DrawnFile]:
    """Dark images of 8 bits in 16: both bytes of each sample are equal, and they stay dark."""
    colours = tuple(tuple(level // 5 for level in colour) for colour in COLOURS)
    greys = tuple(tuple(level // 5 for level in grey) for grey in GREYS)
    yield DrawnFile("a dark grey PNG of 16 bits", png(GREY_SAMPLES.astype(int) // 5 * 257, 16, 0), greys)
    yield DrawnFile("a dark PNG in RGB of 16 bits", png(COLOUR_SAMPLES.astype(int) // 5 * 257, 16, 2), colours)
    data = png(_with_alpha(COLOUR_SAMPLES.astype(int) // 5 * 257, 65535), 16, 6)
    yield DrawnFile("a dark PNG in RGBA of 16 bits", data, colours)


def _on_white(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = ((level + 255) // 2 for level in colour)
    return red, green, blue


# --- TIFF: depths, orders, kinds of samples ---


def tiff(
    content: bytes,
    *,
    bits: int = 8,
    photometric: int = 1,
    samples_per_pixel: int = 1,
    sample_format: int = 1,
    order: str = "<",
    tags: dict[int, tuple[int, list[int]]] | None = None,
) -> bytes:
    """A TIFF of one strip that is not compressed. tags: more of them, each with its type."""
    short, long = 3, 4
    values: dict[int, tuple[int, list[int]]] = {256: (short, [WIDTH]), 257: (short, [HEIGHT]), 259: (short, [1])}
    values |= {258: (short, [bits] * samples_per_pixel), 262: (short, [photometric]), 273: (long, [0])}
    values |= {277: (short, [samples_per_pixel]), 278: (short, [HEIGHT]), 279: (long, [len(content)])}
    values |= {339: (short, [sample_format] * samples_per_pixel)} | (tags or {})
    start = 8 + 2 + 12 * len(values) + 4
    beside = b""
    fields = {
        tag: struct.pack(order + ("H" if kind == short else "I") * len(found), *found)
        for tag, (kind, found) in values.items()
    }
    values[273] = (long, [start + sum(len(field) for field in fields.values() if len(field) > 4)])
    fields[273] = struct.pack(order + "I", *values[273][1])
    entries = b""
    for tag in sorted(values):
        field = fields[tag]
        if len(field) > 4:
            place, beside = struct.pack(order + "I", start + len(beside)), beside + field
        else:
            place = field.ljust(4, b"\0")
        entries += struct.pack(order + "HHI", tag, values[tag][0], len(values[tag][1])) + place
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(values))
    return head + entries + bytes(4) + beside + content


def _tiffs() -> Iterator[DrawnFile]:
    image = _drawn("RGB")
    for compression in ("tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits", "jpeg"):
        options = {"quality": 95} if compression == "jpeg" else {}
        yield DrawnFile(f"TIFF, {compression}", _saved(image, "TIFF", compression=compression, **options), COLOURS)
    for compression in ("group3", "group4", "tiff_ccitt"):
        yield DrawnFile(f"TIFF, {compression}", _saved(_drawn("1"), "TIFF", compression=compression), _BLACK_AND_WHITE)
    for bits, order in product((2, 4, 8, 12, 16), "<>"):
        rows = b"".join(packed(row, bits, order) for row in _levels(bits))
        yield DrawnFile(f"TIFF of {bits} bits, {order}", tiff(rows, bits=bits, order=order), _seen_levels(bits))
        if bits != 12:
            rows = b"".join(packed(row, bits, order) for row in (1 << bits) - 1 - _levels(bits))
            data = tiff(rows, bits=bits, order=order, photometric=0)
            yield DrawnFile(f"TIFF of {bits} bits, white is zero, {order}", data, _seen_levels(bits))
    for bits, order in product((9, 10, 12, 14), "<>"):
        data = tiff(packed(_levels(bits), 16, order), bits=16, order=order)
        if bits != 9:
            yield DrawnFile(f"TIFF of 16 bits, {bits} in use, {order}", data, GREYS)
        if order == "<" and bits != 9:
            data = tiff(packed((1 << bits) - 1 - _levels(bits), 16, "<"), bits=16, photometric=0)
            yield DrawnFile(f"TIFF of 16 bits, {bits} in use, white is zero", data, GREYS)
        most = {281: (3, [(1 << bits) - 1])}
        data = tiff(packed(_levels(bits), 16, order), bits=16, order=order, tags=most)
        yield DrawnFile(f"TIFF of 16 bits, {bits} as a tag says, {order}", data, GREYS)
        if bits == 9:
            continue
        colours = packed(_levels(bits, COLOUR_SAMPLES), 16, order)
        data = tiff(colours, bits=16, photometric=2, samples_per_pixel=3, order=order)
        yield DrawnFile(f"TIFF in RGB of 16 bits, {bits} in use, {order}", data, COLOURS)
    yield from _other_samples()


def _other_samples() -> Iterator[DrawnFile]:
    for order in "<>":
        data = tiff(
            packed(_levels(16, COLOUR_SAMPLES), 16, order), bits=16, photometric=2, samples_per_pixel=3, order=order
        )
        yield DrawnFile(f"TIFF in RGB of 16 bits, {order}", data, COLOURS)
        signed = (_levels(16) - 32768).astype(f"{order}i2").tobytes()
        darkest_to_brightest = [(round((level - 40) * 255 / 180),) * 3 for level in (40, 100, 160, 220)]
        data = tiff(signed, bits=16, sample_format=2, order=order)
        yield DrawnFile(f"TIFF of signed 16 bits, {order}", data, darkest_to_brightest)
        large = tiff(packed(_levels(32), 32, order), bits=32, order=order)
        yield DrawnFile(f"TIFF of 32 bits, {order}", large, darkest_to_brightest)
        for name, kind, code, samples, seen in (
            ("signed 16 bits", "i2", 2, _levels(16) - 32768, darkest_to_brightest),
            ("signed 32 bits", "i4", 2, _levels(32) - (1 << 31), darkest_to_brightest),
            ("32 bits", "u4", 1, _levels(32), darkest_to_brightest),
            ("floats", "f4", 3, GREY_SAMPLES / 255, GREYS),
            ("doubles", "f8", 3, GREY_SAMPLES / 255, GREYS),
        ):
            content, bits = samples.astype(order + kind).tobytes(), 8 * int(kind[1])
            for is_compressed in (False, True):
                data = tiff(
                    zlib.compress(content) if is_compressed else content,
                    bits=bits,
                    sample_format=code,
                    order=order,
                    tags={259: (3, [8])} if is_compressed else {},
                )
                yield DrawnFile(f"TIFF of {name}, {order}, compressed {is_compressed}", data, seen)
        for name, scale in (("1", 255), ("255", 1), ("65535", 1 / 257)):
            data = tiff((GREY_SAMPLES / scale).astype(f"{order}f4").tobytes(), bits=32, sample_format=3, order=order)
            yield DrawnFile(f"TIFF of floats up to {name}, {order}", data, GREYS)
    opposite = tiff((255 - GREY_SAMPLES).astype("<f4").tobytes(), bits=32, sample_format=3, photometric=0)
    yield DrawnFile("TIFF of floats, white is zero", opposite, GREYS)
    halves = tiff((GREY_SAMPLES / 255).astype("<f2").tobytes(), bits=16, sample_format=3)
    yield DrawnFile("TIFF of half floats", halves, RejectReason.UNSUPPORTED)
    for name, extra, alpha, expected in (
        ("no alpha", 0, 0, COLOURS),
        ("alpha", 2, 255, COLOURS),
        ("all transparent", 2, 0, [WHITE] * 4),
    ):
        data = tiff(
            _with_alpha(COLOUR_SAMPLES, alpha).tobytes(), photometric=2, samples_per_pixel=4, tags={338: (3, [extra])}
        )
        yield DrawnFile(f"TIFF of four samples: {name}", data, expected)


# --- Netpbm, bitmaps ---


def _netpbm() -> Iterator[DrawnFile]:
    for most in (15, 255, 1023, 4095, 65535):
        size = "B" if most < 256 else "H"
        levels = np.rint(GREY_SAMPLES.astype(float) * most / 255).astype(f">u{struct.calcsize(size)}")
        colours = np.rint(COLOUR_SAMPLES.astype(float) * most / 255).astype(f">u{struct.calcsize(size)}")
        head = f"{WIDTH} {HEIGHT}\n# a comment\n{most}\n".encode()
        seen = [[(round(round(level * most / 255) * 255 / most)) for level in colour] for colour in (*GREYS, *COLOURS)]
        quadrants: list[tuple[int, int, int]] = [(red, green, blue) for red, green, blue in seen]
        yield DrawnFile(f"PGM up to {most}", b"P5\n" + head + levels.tobytes(), quadrants[:4])
        yield DrawnFile(f"PPM up to {most}", b"P6\n" + head + colours.tobytes(), quadrants[4:])
        text = " ".join(map(str, levels.ravel())).encode()
        yield DrawnFile(f"PGM as text up to {most}", b"P2\n" + head + text, quadrants[:4])
        text = " ".join(map(str, colours.ravel())).encode()
        yield DrawnFile(f"PPM as text up to {most}", b"P3\n" + head + text, quadrants[4:])
    black = _drawn("1")
    yield DrawnFile("PBM", _saved(black, "PPM"), _BLACK_AND_WHITE)
    bits = " ".join("0" if level else "1" for level in np.asarray(black).ravel())
    yield DrawnFile("PBM as text", f"P1\n{WIDTH} {HEIGHT}\n{bits}".encode(), _BLACK_AND_WHITE)


def bmp(
    rows: bytes, bits: int, *, palette: bytes = b"", compression: int = 0, height: int = HEIGHT, masks: bytes = b""
) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, height, 1, bits, compression, len(rows), 0, 0, len(palette) // 4, 0)
    start = 14 + len(header) + len(masks) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + masks + palette + rows


def _bitmaps() -> Iterator[DrawnFile]:
    palette = b"".join(bytes([blue, green, red, 0]) for red, green, blue in COLOURS)
    places = _quadrants(np.arange(4))
    for bits in (4, 8):
        rows = [packed(row, bits) for row in places]
        yield DrawnFile(f"BMP of {bits} bits", bmp(b"".join(rows[::-1]), bits, palette=palette), COLOURS)
        yield DrawnFile(
            f"BMP of {bits} bits from the top", bmp(b"".join(rows), bits, palette=palette, height=-HEIGHT), COLOURS
        )
    runs = b"".join(bytes([WIDTH // 2, row[0], WIDTH // 2, row[-1], 0, 0]) for row in places[::-1]) + b"\0\1"
    yield DrawnFile("BMP of runs", bmp(runs, 8, palette=palette, compression=1), COLOURS)
    red, green, blue = (COLOUR_SAMPLES[::-1, :, band].astype(np.uint16) for band in range(3))
    yield DrawnFile("BMP of 15 bits", bmp((red >> 3 << 10 | green >> 3 << 5 | blue >> 3).tobytes(), 16), COLOURS)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    data = (red >> 3 << 11 | green >> 2 << 5 | blue >> 3).tobytes()
    yield DrawnFile("BMP of 16 bits with masks", bmp(data, 16, compression=3, masks=masks), COLOURS)
    for name, options in (("runs", {"compression": "tga_rle"}), ("from the top", {"orientation": 1})):
        yield DrawnFile(f"TGA, {name}", _saved(_drawn("RGB"), "TGA", **options), COLOURS)
    for kind, sizes in (("ICO", [(48, 32)]), ("ICO", [(16, 16), (48, 32)])):
        data = _saved(_drawn("RGBA"), kind, sizes=sizes)
        yield DrawnFile(f"{kind} of {len(sizes)} sizes", data, COLOURS)
    yield DrawnFile("ICO of bitmaps", _saved(_drawn("RGBA"), "ICO", sizes=[(48, 32)], bitmap_format="bmp"), COLOURS)


# --- several frames: the first is the image ---


def _of_frames() -> Iterator[DrawnFile]:
    first, second = _drawn("RGB"), Image.fromarray(255 - COLOUR_SAMPLES)
    kinds = ["GIF", "PNG", "TIFF", *(kind for kind in ("WEBP", "AVIF") if features.check(kind.lower()))]
    for kind in kinds:
        data = _saved(first, kind, save_all=True, append_images=[second, first], **_OPTIONS.get(kind, {}))
        yield DrawnFile(f"{kind} of three frames", data, COLOURS)
    for disposal in (1, 2, 3):
        data = _saved(_drawn("P"), "GIF", save_all=True, append_images=[second], disposal=disposal)
        yield DrawnFile(f"GIF, disposal {disposal}", data, COLOURS)


# --- cut files ---


def _cut() -> Iterator[DrawnFile]:
    """Files that lack half of themselves, or all but their header, or that are nothing but one byte."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    for kind in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"):
        if kind in _MAY_LACK and not features.check(_MAY_LACK[kind]):
            continue
        data = _saved(noise.convert("P") if kind == "GIF" else noise, kind)
        for share in (0.3, 0.6, 0.9):
            yield DrawnFile(f"{kind}, {share} of it", data[: int(share * len(data))], RejectReason.CORRUPT)
