"""Braces and wildcards in a path that a user wrote: what they expand to and what they match.

Knows text only; lists nothing.
"""

import re
from collections.abc import Iterator
from itertools import product

from fsspec.utils import glob_translate

from captioner.storage.urls import scheme

__all__ = ["expand_braces", "glob_pattern", "glob_prefix", "has_braces", "has_glob"]

_NUMBERS = re.compile(r"(\d+)\.\.(\d+)\Z")


def has_braces(path: str) -> bool:
    """Return whether `path` has a brace group that `expand_braces` would expand."""
    return next(_groups(path), None) is not None


def expand_braces(path: str) -> list[str]:
    """Return every name that `{0000..0099}` and `{a,b}` in `path` stand for; the last group varies fastest.

    Braces that hold neither a range nor a comma mean themselves; groups do not nest.
    """
    pieces: list[list[str]] = []
    end = 0
    for start, stop, choices in _groups(path):
        pieces += [[path[end:start]], choices]
        end = stop
    return ["".join(chosen) for chosen in product(*pieces, [path[end:]])]


def _groups(path: str) -> Iterator[tuple[int, int, list[str]]]:
    for match in re.finditer(r"\{([^{}]*)\}", path):
        choices = _choices(match.group(1))
        if choices is not None:
            yield match.start(), match.end(), choices


def _choices(inside: str) -> list[str] | None:
    if numbers := _NUMBERS.match(inside):
        first, last = numbers.groups()
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        step = 1 if int(first) <= int(last) else -1
        return [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]
    return inside.split(",") if "," in inside else None


def has_glob(path: str) -> bool:
    """Return whether `path` has wildcards. In http(s) URLs `?` starts the query, so only `*` counts there."""
    return bool(re.search(r"\*" if scheme(path).startswith("http") else r"[*?]|\[[^\]]+\]", path))


def glob_prefix(pattern: str) -> str:
    """Return the part of a glob before its first wildcard: what a store can list by."""
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0]


def glob_pattern(pattern: str) -> re.Pattern[str]:
    """Return what a whole URL must match; `**` crosses folders, `*` and `?` do not."""
    return re.compile(glob_translate(pattern))
