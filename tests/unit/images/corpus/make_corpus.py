"""Make the corpus: small files as the field has them, each of a kind that decoders trip over, and what is expected.

    python tests/unit/images/corpus/make_corpus.py

Writes `files/` and `outcomes.tsv`, which both stand in the repository. An outcome is `pixels`, for a file that shows
the gradient of `GRADIENT`, or the reason of its reject and a part of the detail.
"""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

HERE = Path(__file__).parent
GRADIENT = np.tile(np.arange(20, 220, 5, dtype=np.uint8), (30, 1))  # 40 x 30, from dark to bright
LONG_TEXT = "0123456789abcdef" * 70_000
PIXELS = "pixels"

CORPUS: dict[str, tuple[Callable[[], bytes], str]] = {}


def saved(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(GRADIENT).convert("RGB").save(file, kind, **options)
    return file.getvalue()


def replaced(data: bytes, start: int, value: bytes) -> bytes:
    return data[:start] + value + data[start + len(value) :]


# --- PNG ---


def png_with_chunk(name: bytes, content: bytes, *, checksum: bytes | None = None, at: int = 33) -> bytes:
    plain = saved("PNG")
    chunk = struct.pack(">I", len(content)) + name + content
    chunk += zlib.crc32(name + content).to_bytes(4, "big") if checksum is None else checksum
    return plain[:at] + chunk + plain[at:] if at >= 0 else plain[: at - 12] + chunk + plain[-12:]


def png_with_long_text(compressed: bool, international: bool) -> bytes:
    info = PngInfo()
    if international:
        info.add_itxt("workflow", LONG_TEXT, zip=compressed)
    else:
        info.add_text("workflow", LONG_TEXT, zip=compressed)
    return saved("PNG", pnginfo=info)


CORPUS |= {
    "long_ztxt.png": (lambda: png_with_long_text(True, False), PIXELS),
    "long_itxt.png": (lambda: png_with_long_text(True, True), PIXELS),
    "long_profile.png": (lambda: saved("PNG", icc_profile=bytes(3 << 20)), PIXELS),
    "bad_checksum_of_ancillary_chunk.png": (lambda: png_with_chunk(b"pHYs", bytes(9), checksum=b"oops"), PIXELS),
    "bad_checksum_of_text.png": (lambda: png_with_chunk(b"tEXt", b"a\0b", checksum=b"oops"), PIXELS),
    "profile_that_is_no_zlib.png": (lambda: png_with_chunk(b"iCCP", b"icc\0\0nonsense"), PIXELS),
    "short_physical_size.png": (lambda: png_with_chunk(b"pHYs", b"\0"), PIXELS),
    "no_end.png": (lambda: saved("PNG")[:-12], PIXELS),
    "bad_checksum_of_header.png": (lambda: replaced(saved("PNG"), 29, b"oops"), "corrupt bad header checksum"),
    "cut_after_long_text.png": (lambda: png_with_long_text(True, False)[:-60], "corrupt PNG"),
}

# --- JPEG ---


def jpeg_frame(marker: bytes = b"\xc0", bits: int = 8, num_layers: int = 3) -> bytes:
    """A JPEG whose frame header says something else."""
    data = saved("JPEG")
    start = data.index(b"\xff\xc0")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    header = data[start + 5 : start + 9] + bytes([num_layers]) + data[start + 10 : start + 10 + 3 * num_layers]
    frame = b"\xff" + marker + struct.pack(">HB", 3 + len(header), bits) + header
    return data[:start] + frame + data[end:]


def lossless_jpeg() -> bytes:
    """SOF3, predictor 1, one layer; each Huffman code has four bits."""
    height, width = GRADIENT.shape
    table = b"\xff\xc4" + struct.pack(">HB", 2 + 1 + 16 + 9, 0) + bytes([0, 0, 0, 9] + [0] * 12) + bytes(range(9))
    frame = b"\xff\xc3" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\1\x11\0"
    scan = b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\1\0" + b"\1\0\0"
    bits = ""
    for y in range(height):
        for x in range(width):
            before = int(GRADIENT[y, x - 1] if x else GRADIENT[y - 1, 0] if y else 128)
            difference = int(GRADIENT[y, x]) - before
            size = abs(difference).bit_length()
            bits += f"{size:04b}"
            if size:
                bits += f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}"
    bits += "1" * (-len(bits) % 8)
    packed = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"\xff\xd8" + table + frame + scan + packed + b"\xff\xd9"


CORPUS |= {
    "lossless.jpg": (lossless_jpeg, PIXELS),
    "no_end.jpg": (lambda: saved("JPEG")[:-2], PIXELS),
    "half_an_end.jpg": (lambda: saved("JPEG")[:-1], PIXELS),
    "no_end_progressive.jpg": (lambda: saved("JPEG", progressive=True)[:-2], PIXELS),
    "bytes_after_the_end.jpg": (lambda: saved("JPEG") + bytes(99), PIXELS),
    "cut.jpg": (lambda: saved("JPEG", quality=95)[:-20], "corrupt truncated"),
    "12_bits.jpg": (lambda: jpeg_frame(bits=12), "unsupported cannot handle 12-bit layers"),
    "two_layers.jpg": (lambda: jpeg_frame(num_layers=2), "unsupported cannot handle 2-layer images"),
}

# --- TIFF ---


def tiff(
    compression: int, data: bytes, *, bits: int = 8, photometric: int = 1, order: str = "<", is_big: bool = False
) -> bytes:
    height, width = GRADIENT.shape
    values = {256: width, 257: height, 258: bits, 259: compression, 262: photometric}
    values |= {273: 0, 277: 1, 278: height, 279: len(data)}
    size, head = (20, 24) if is_big else (12, 10)
    values[273] = head + size * len(values) + (8 if is_big else 4)
    file = b"II" if order == "<" else b"MM"
    file += struct.pack(order + ("HHHQQ" if is_big else "HIH"), *((43, 8, 0, 16) if is_big else (42, 8)), len(values))
    for tag, value in values.items():
        file += struct.pack(order + ("HHQ" if is_big else "HHI"), tag, 4 if tag in (273, 279) else 3, 1)
        field = struct.pack(order + ("I" if tag in (273, 279) else "H"), value)
        file += field.ljust(8 if is_big else 4, b"\0")
    return file + bytes(8 if is_big else 4) + data


def twelve_bits() -> bytes:
    samples = (GRADIENT.astype(int) * 4095 // 255).reshape(-1, 2)
    packed = samples[:, 0] >> 4, (samples[:, 0] & 15) << 4 | samples[:, 1] >> 8, samples[:, 1] & 255
    return np.stack(packed, axis=1).astype(np.uint8).tobytes()


RAW = GRADIENT.tobytes()
CORPUS |= {
    "8_bits.tif": (lambda: tiff(1, RAW), PIXELS),
    "12_bits.tif": (lambda: tiff(1, twelve_bits(), bits=12), PIXELS),
    "16_bits.tif": (lambda: tiff(1, (GRADIENT.astype("<u2") * 257).tobytes(), bits=16), PIXELS),
    "16_bits_big_endian.tif": (lambda: tiff(1, (GRADIENT.astype(">u2") * 257).tobytes(), bits=16, order=">"), PIXELS),
    "big.tif": (lambda: tiff(1, RAW, is_big=True), PIXELS),
    "big_and_big_endian.tif": (lambda: tiff(1, RAW, order=">", is_big=True), "unsupported big-endian BigTIFF"),
    "webp_inside.tif": (lambda: tiff(50001, saved("WEBP"), photometric=2), "unsupported TIFF"),
    "jpeg_2000_inside.tif": (lambda: tiff(34712, bytes(90)), "unsupported TIFF: 34712"),
    "24_bits.tif": (lambda: tiff(1, bytes(3 * 1200), bits=24), "unsupported TIFF"),
}

# --- others ---


def psd(bits: int, version: int = 1) -> bytes:
    height, width = GRADIENT.shape
    header = b"8BPS" + struct.pack(">H6xHIIHH", version, 1, height, width, bits, 1)
    samples = GRADIENT.astype(f">u{bits // 8}") if bits < 32 else GRADIENT.astype(">f4")
    return header + bytes(12) + b"\0\0" + samples.tobytes()


def brand(name: bytes) -> bytes:
    return b"\0\0\0\x14ftyp" + name + bytes(4) + name + bytes(40)


def os2_icon(kind: bytes) -> bytes:
    return kind + struct.pack("<IHHIIHHHH", 154, 0, 0, 26, 12, 16, 32, 1, 1) + bytes(128)


def huge_avif() -> bytes:
    data = saved("AVIF")
    return replaced(data, data.index(b"ispe") + 8, struct.pack(">II", 17_000, 17_000))


CORPUS |= {
    "8_bits.psd": (lambda: psd(8), PIXELS),
    "16_bits.psd": (lambda: psd(16), "unsupported PSD: (1, 16)"),
    "32_bits.psd": (lambda: psd(32), "unsupported PSD: (1, 32)"),
    "large_document.psb": (lambda: psd(8, version=2), "unsupported PSB"),
    "small.avif": (lambda: saved("AVIF"), PIXELS),
    "17000_by_17000.avif": (huge_avif, "too_many_pixels 289000000 pixels"),
    "heic.heic": (lambda: brand(b"heic"), "unsupported HEIC"),
    "heif.heif": (lambda: brand(b"mif1"), "unsupported HEIF (mif1)"),
    "avc_in_heif.avci": (lambda: brand(b"avci"), "unsupported HEIF (avci)"),
    "jpeg_2000_in_heif.hej2": (lambda: brand(b"j2ki"), "unsupported HEIF (j2ki)"),
    "canon.cr3": (lambda: brand(b"crx "), "unsupported Canon CR3"),
    "video.mp4": (lambda: brand(b"mp42"), "not_an_image MP4 video"),
    "video.mov": (lambda: brand(b"qt  "), "not_an_image MP4 video"),
    "os2_colour_icon.ico": (lambda: os2_icon(b"CI"), "unsupported OS/2 icon"),
    "os2_pointer.ptr": (lambda: os2_icon(b"PT"), "unsupported OS/2 icon"),
    "os2_icon_array.ico": (lambda: b"BA" + struct.pack("<IIHH", 40, 0, 0, 0) + os2_icon(b"IC"), "unsupported OS/2"),
}


def main() -> None:
    lines = []
    for name, (build, outcome) in CORPUS.items():
        (HERE / "files" / name).write_bytes(build())
        lines.append(f"{name}\t{outcome}\n")
    (HERE / "outcomes.tsv").write_text("file\toutcome\n" + "".join(lines))


if __name__ == "__main__":
    main()
