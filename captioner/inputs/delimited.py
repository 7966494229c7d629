"""Files of delimited values with a header, read strictly: a value is right, or its line is a problem.

Lists of images, labels and references all come through here. Knows the syntax of such files and no column of theirs.
"""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from captioner.errors import InputError
from captioner.inputs.suffixes import IMAGE_SUFFIXES
from captioner.inputs.text_files import open_text
from captioner.storage import Store, urls

__all__ = ["DelimitedFile", "DelimitedRow", "open_delimited"]

_MAX_CELL_CHARS = 1 << 26
_QUOTES = 'expected "..." around a value that has a " in it, and each " in it twice'
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


class DelimitedRow(NamedTuple):
    """The cells of a row, as many as the header has; a short row is filled up. Or a `problem`, which names the line."""

    line: int
    cells: list[str]
    problem: str = ""


class DelimitedFile(NamedTuple):
    """The header of a file and its rows, which are read as they are asked for."""

    header: list[str]
    rows: Iterator[DelimitedRow]


@contextmanager
def open_delimited(store: Store, url: str, delimiter: str) -> Iterator[DelimitedFile]:
    """Yield a file, open. Raises InputError that names line and remedy for a header that is none; StoreError."""
    csv.field_size_limit(_MAX_CELL_CHARS)  # of the whole process; 128 KiB by default
    where = urls.shown(url)
    with open_text(store, url) as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next((cells for cells in reader if cells), [])
        except csv.Error as error:
            raise InputError(f"{where}, line 1: {_explained(error)}; expected a header") from error
        _check_header(header, delimiter, where)
        yield DelimitedFile(header, _rows(reader, len(header), delimiter, where))


def _check_header(header: list[str], delimiter: str, where: str) -> None:
    for other, name in _DELIMITERS.items():
        if other != delimiter and header and other in header[0] and (len(header) == 1 or other != ","):
            column = "one column" if len(header) == 1 else "a column"
            raise InputError(
                f"{where} has {column}, {header[0][:80]!r}: its values seem to be separated by {name}; expected"
                f" {_DELIMITERS[delimiter]}: name it .tsv if these are tabs, else write it again as CSV"
            )
    if header and header[0].startswith("#"):
        raise InputError(
            f"{where} begins with {header[0][:80]!r}; expected the names of its columns: leave comments out"
        )
    if image := next((name for name in header if "://" in name or urls.suffix(name) in IMAGE_SUFFIXES), None):
        raise InputError(
            f"{where} begins with {urls.redact(image)}, where a CSV has the names of its columns; add such a line, or"
            " call a plain list of URIs .txt"
        )
    if twice := next((name for name in header if name and header.count(name) > 1), None):
        raise InputError(f"{where} has two columns of the name {twice}; expected different names")


def _rows(reader: Any, width: int, delimiter: str, where: str) -> Iterator[DelimitedRow]:
    """Yield the rows. Raises InputError for a wrong quote that swallows lines: how many rows are lost is not known."""
    while True:
        line, cells, problem = reader.line_num + 1, [], ""
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = _explained(error)
        problem = problem or _problem(cells, width, delimiter)
        if problem and reader.line_num > line:
            raise InputError(f"{where}, line {line}: {problem}; it runs to line {reader.line_num}")
        if problem:
            yield DelimitedRow(line, [], f"{where}, line {line}: {problem}")
        elif cells:
            yield DelimitedRow(line, [*cells[:width], *[""] * (width - len(cells))])


def _problem(cells: list[str], width: int, delimiter: str) -> str:
    """Return what is wrong with a row, empty if nothing is. Empty cells at its end may be too many."""
    if any(cells[width:]):
        inside = _DELIMITERS[delimiter]
        return f'it has {len(cells)} values, the header {width}; expected as many, and "..." around one with {inside}'
    if delimiter == "\t" and any("\n" in cell and "\t" in cell for cell in cells):
        return f'a value that begins with " holds whole rows; {_QUOTES}'
    return ""


def _explained(error: csv.Error) -> str:
    text = str(error)
    if "unexpected end" in text:
        return f'a value that begins with " never ends; {_QUOTES}'
    if "expected after" in text:
        return f'a value that begins with " goes on after the next "; {_QUOTES}'
    if "field larger" in text:
        return f"a value is longer than {_MAX_CELL_CHARS:,} characters; {_QUOTES}"
    return f"{text}; expected rows as the header has them"
