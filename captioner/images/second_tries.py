"""Valid images that Pillow refuses: the same image in bytes that it reads.

Metadata never costs an image its pixels: Pillow gives a PNG up for text or a colour profile above 1 MB, and for a wrong
checksum of any chunk. A JPEG that lacks just its end marker is complete. Knows no Pillow.
"""

import zlib
from collections.abc import Iterator

__all__ = ["completed_jpegs", "without_metadata"]

_PNG = b"\x89PNG\r\n\x1a\n"
_SEEN = (b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf")  # ancillary chunks that change pixels: colour, frames, turn
_TURNING_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_MAX_TEXT_BYTES = 1 << 20  # Pillow's own limit
_END = b"\xff\xd9"
_FILLERS = (b"\x00" * 64, b"\xaa" * 64)


def without_metadata(data: bytes) -> bytes | None:
    """Return a PNG without the chunks that do not change its upright pixels; None for other data."""
    if not data.startswith(_PNG):
        return None
    return _PNG + b"".join(chunk for chunk in _chunks(data) if _is_seen(chunk))


def completed_jpegs(data: bytes) -> tuple[bytes, bytes] | None:
    """Return a JPEG without end marker with two different endings; None for other data.

    All its pixels are there if the whole of both is the same: else the decoder read on into the endings.
    """
    if not data.startswith(b"\xff\xd8") or data.endswith(_END):
        return None
    start = data.removesuffix(b"\xff")
    return start + _FILLERS[0] + _END, start + _FILLERS[1] + _END


def _chunks(data: bytes) -> Iterator[bytes]:
    """Yield the chunks, each with length, name and checksum; the last may be cut."""
    start = len(_PNG)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        yield data[start:end]
        start = end


def _is_seen(chunk: bytes) -> bool:
    name, content = chunk[4:8], chunk[8:-4]
    if not name[:1].islower():  # critical
        return True
    if name not in _SEEN and not (content.startswith(_TURNING_TEXTS) and _is_short_text(name, content)):
        return False
    return zlib.crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]


def _is_short_text(name: bytes, content: bytes) -> bool:
    if name == b"tEXt" or (name == b"iTXt" and b"\0\0\0" in content[:64]):  # not compressed
        return len(content) <= _MAX_TEXT_BYTES
    compressed = content.partition(b"\0")[2][1:]
    try:
        unpacked = zlib.decompressobj().decompress(compressed, _MAX_TEXT_BYTES)
    except zlib.error:
        return False
    return name == b"zTXt" and len(unpacked) < _MAX_TEXT_BYTES
