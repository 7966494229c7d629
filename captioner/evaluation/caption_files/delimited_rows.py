"""Captions in a CSV or TSV file with a header."""

from collections.abc import Iterator, Mapping

from captioner.evaluation.caption_files.records import ColumnNames, Record
from captioner.inputs.delimited import DelimitedRow, open_delimited
from captioner.storage import Store
from captioner.storage.json_text import parse_json
from captioner.storage.urls import shown

__all__ = ["read_delimited_rows"]


def read_delimited_rows(store: Store, url: str, wanted: ColumnNames, *, delimiter: str) -> Iterator[Record]:
    """Yield the rows of a file with a header. A row that cannot be read is a problem, not an error.

    A cell may hold several captions, as a JSON list."""
    where = shown(url)
    with open_delimited(store, url, delimiter) as file:
        columns = wanted.choose(file.header, where)
        places = {field: file.header.index(column) for field, column in columns.items()}
        for row in file.rows:
            yield Record(problem=row.problem) if row.problem else _record(row, places, where)


def _record(row: DelimitedRow, places: Mapping[str, int], where: str) -> Record:
    record = Record(**{field: row.cells[place] for field, place in places.items()})
    text = record.captions.strip()
    if not text.startswith(('["', "['")):
        return record
    try:
        return record._replace(captions=parse_json(text))
    except ValueError:
        seen = f"{where}, line {row.line} has the caption {text[:40]!r}"
        return Record(problem=f'{seen}, a list that is not JSON; expected a text, or a list as ["a cat", "the cat"]')
