"""The text of an image as SQL, from a template such as `{caption} {tags}`.

A null is an empty text, a list its values with commas between, an answer with a JSON schema its JSON. Knows
SQL and nothing of files.
"""

import string
from collections.abc import Callable, Iterable, Mapping

from captioner.errors import ConfigError
from captioner.query.views import quoted

__all__ = ["named_columns", "one_a_line", "text_sql", "texts_sql"]

_OF_CANDIDATE = "candidate"


def text_sql(template: str, kinds: Mapping[str, str]) -> str:
    """Return SQL of the text that a template makes of one row. kinds: column -> its type in SQL.

    Raises ConfigError for braces that do not close, and for a column that the table does not have."""
    return _joined(template, kinds, lambda column: _as_text(quoted(column), kinds[column]))


def texts_sql(template: str, kinds: Mapping[str, str]) -> str:
    """Return SQL of the texts of all candidates of a row, as a list; of a row without candidates its one text.

    Raises ConfigError as `text_sql`, and for a template without `{caption}`, whose texts would all be the same."""
    of_row = text_sql(template, kinds)
    if "caption" not in named_columns(template):
        raise ConfigError(
            f"--captions is all, and --text {template} is the same for each candidate; expected {{caption}} in it, or"
            " --captions best"
        )
    candidates = kinds.get("candidates", "")

    def value(column: str) -> str:
        if column == "caption":  # the other columns are those of the image
            return f"coalesce({_OF_CANDIDATE}.caption, '')"
        return _as_text(quoted(column), kinds[column])

    if not candidates.startswith("STRUCT"):
        return f"[{of_row}]"
    of_each = f"list_transform(candidates, lambda {_OF_CANDIDATE}: {_joined(template, kinds, value)})"
    return f"CASE WHEN len(candidates) > 0 THEN list_filter({of_each}, lambda text: text <> '') ELSE [{of_row}] END"


def named_columns(template: str) -> list[str]:
    """Return the columns that a template names, in its order."""
    return [column for _, column, _, _ in _parsed(template) if column]


def one_a_line(texts: Iterable[str]) -> bytes:
    """Return the bytes of a text file with a caption a line: line breaks within one become spaces."""
    return "".join(f"{' '.join(text.splitlines())}\n" for text in texts).encode()


def _joined(template: str, kinds: Mapping[str, str], value: Callable[[str], str]) -> str:
    pieces: list[str] = []
    for literal, column, form, conversion in _parsed(template):
        pieces += [_literal(literal)] if literal else []
        if column is None:
            continue
        if form or conversion or column not in kinds:
            given = column + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ConfigError(f"--text has {{{given}}}; expected columns of the table in braces: {', '.join(kinds)}")
        pieces.append(value(column))
    return f"trim({' || '.join(pieces) or _literal('')})"


def _parsed(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"--text is {template}: {error}; expected columns in braces: '{{caption}}'") from error


def _as_text(value: str, kind: str) -> str:
    if kind.endswith("[]"):
        as_text = f"array_to_string({value}, ', ')"
    else:
        as_text = f"to_json({value})::VARCHAR" if kind.startswith("STRUCT(") else f"{value}::VARCHAR"
    return f"coalesce({as_text}, '')"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
