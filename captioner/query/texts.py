"""Columns of texts in a caption table, for jobs that read captions: of any prompt, and rows that a condition selects.

Knows the view `captions`, which has the answers to prompts that were added later beside the others; no job.
"""

from collections.abc import Mapping, Sequence

import pyarrow as pa

from captioner.errors import ConfigError, InputError
from captioner.query.views import quoted, read_rows
from captioner.tables import CaptionTable

__all__ = ["text_columns", "texts_sql"]


def text_columns(table: CaptionTable, where: str = "") -> list[str]:
    """Return the columns of `captions` that hold texts. Raises as `texts_sql` for a `where`."""
    try:
        names = read_rows(table, f"FROM captions{_condition(where)} LIMIT 0").schema
    except ConfigError as error:
        raise ConfigError(f"--where is {where}: {error}") from error
    return [field.name for field in names if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]


def texts_sql(table: CaptionTable, columns: Mapping[str, str], *, where: str = "", others: Sequence[str] = ()) -> str:
    """Return the SELECT of `key`, `image_id`, columns of texts and `others` of the rows for which `where` holds.

    columns: name -> the flag that says it. others: SQL. Raises InputError for a column that the table lacks, or that
    holds no texts, ConfigError for a `where` that is no condition over the columns of `captions`."""
    texts = text_columns(table, where)
    for name, flag in columns.items():
        if name not in texts:
            raise InputError(f"{table.location} has no column {name} of texts, for {flag}; it has {', '.join(texts)}")
    return f"SELECT {', '.join(['key', 'image_id', *map(quoted, columns), *others])} FROM captions{_condition(where)}"


def _condition(where: str) -> str:
    return f" WHERE ({where}\n)" if where else ""  # a line break ends a comment
