"""Text files from other programs, in whichever Unicode encoding their first bytes name."""

import codecs
import io
from typing import TextIO

from captioner.errors import InputError
from captioner.storage import Place, Store, as_location

__all__ = ["MAX_LINE_CHARS", "decoded", "open_text"]

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LOOKED_AT = 4096  # bytes
MAX_LINE_CHARS = 1 << 26
_ODD_BYTES = "backslashreplace"


def open_text(store: Store, place: Place) -> TextIO:
    r"""Return a reader of lines as they are; bytes of no character are `\xNN`.

    Raises InputError for a binary file, and for UTF-16 without a mark; StoreError."""
    file = store.open(place)
    encoding = _encoding(file.read(_LOOKED_AT), place)
    file.seek(0)
    return _Lines(file, encoding, errors=_ODD_BYTES, newline="")


class _Lines(io.TextIOWrapper):
    """Lines of bounded length: a file may be one line without end."""

    _num_lines = 0

    def __next__(self) -> str:  # type: ignore[override]  # typeshed has it only on the class of bytes
        line = self.readline(MAX_LINE_CHARS)
        if not line:
            raise StopIteration
        self._num_lines += 1
        if len(line) == MAX_LINE_CHARS:
            raise InputError(
                f"line {self._num_lines:,} of a list has {MAX_LINE_CHARS:,} characters or more; expected a row a line"
            )
        return line


def decoded(data: bytes, place: Place) -> str:
    """Return the text in the bytes of a whole file. Raises as `open_text` does."""
    return data.decode(_encoding(data[:_LOOKED_AT], place), _ODD_BYTES)


def _encoding(head: bytes, place: Place) -> str:
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" in head:
        raise InputError(f"{as_location(place)} has bytes that no text has: a binary file, or UTF-16; expected UTF-8")
    return "utf-8"
