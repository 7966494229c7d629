"""Columns of a table that are stored together: those of the captions, and those of each prompt that was added later.

    captions/part-*, failures/part-*             all columns that the table was begun with
    columns/tags/prompt.json                     what an added prompt is
    columns/tags/answers/part-*, failures/part-* its answers, and the images that have a caption and failed to get one

A family has one row an image, by the keys of the table, and knows its own failed attempts. An added prompt is asked of
images that have a caption. Knows folders and columns, and no store.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.prompts import CAPTION, answer_fields, answered_prompts, details_name, is_prompt_name
from captioner.schema import ASKED, CAPTIONS, FAILURES, added_schema, captions_schema
from captioner.tables.identity import to_json

__all__ = [
    "COLUMNS",
    "FOLDERS",
    "ColumnFamily",
    "added_identity",
    "all_answers",
    "begun_with",
    "digest_of",
    "families_of",
    "is_added_name",
]

COLUMNS = "columns"
"""Folder of the added prompts."""

FOLDERS = ("captions", "failures")
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ColumnFamily:
    """Columns that are stored together."""

    prompt: str
    """The prompt that was added; of the captions `caption`."""

    rows: str
    """Folder of the parts that hold its columns, below the table."""

    failures: str
    """Folder of the attempts that failed to fill them."""

    digest: str
    """Digest of what it was made with, as in the footer of each of its parts."""

    prompts: tuple[str, ...] = ()
    """The prompts that it answers; of captions without named ones `caption`."""

    answers: tuple[pa.Field, ...] = ()
    """The columns that these add."""

    @property
    def is_added(self) -> bool:
        """Whether it is of a prompt that was added later."""
        return self.rows not in FOLDERS

    @property
    def folders(self) -> tuple[str, str]:
        """Both of its folders."""
        return self.rows, self.failures

    def asked(self, rows: pa.Table) -> pa.Table:
        """Return the rows that were asked its prompts: all where they have no column ASKED."""
        if ASKED.name not in rows.column_names:
            return rows.slice(0, 0) if self.is_added else rows
        return rows.filter(_names(rows, self.prompt))

    def failed(self, rows: pa.Table) -> pa.Table:
        """Return those of some failed rows that are its failures: of an added prompt, those that have a caption."""
        asked = self.asked(rows)
        return asked.filter(pc.invert(_names(asked, CAPTION))) if self.is_added and asked.num_rows else asked

    def schema(self, folder: str, kept: Sequence[pa.Field] = ()) -> pa.Schema:
        """Return the columns of the parts in one of its folders."""
        if folder == self.failures:
            return FAILURES
        return added_schema(self.answers) if self.is_added else captions_schema(kept, self.answers)


def _names(rows: pa.Table, prompt: str) -> pa.Array:
    return pa.array([prompt in asked for asked in rows.column(ASKED.name).to_pylist()], pa.bool_())


def families_of(
    begun_as: Mapping[str, Any], added: Mapping[str, Mapping[str, Any]], digest: str
) -> Iterator[ColumnFamily]:
    """Yield the families of a table: that of the captions, and one for each added prompt, by name.

    begun_as: the identity that its first run gave it. added: name -> identity of each prompt since. digest: of the
    captions."""
    prompts = answered_prompts(begun_as)
    rows, failures = FOLDERS
    yield ColumnFamily(
        prompt=CAPTION,
        rows=rows,
        failures=failures,
        digest=digest,
        prompts=tuple(prompts) or (CAPTION,),
        answers=tuple(answer_fields(prompts)),
    )
    for name in sorted(added):
        folder = f"{COLUMNS}/{name}"
        yield ColumnFamily(
            prompt=name,
            rows=f"{folder}/answers",
            failures=f"{folder}/{failures}",
            digest=digest_of(added_identity(digest, added[name])),
            prompts=(name,),
            answers=tuple(answer_fields({name: added[name]})),
        )


def all_answers(families: Sequence[ColumnFamily]) -> list[pa.Field]:
    """Return the columns that the prompts of all families add, in the order in which one family would have them."""
    fields = [field for family in families for field in family.answers]
    return sorted(fields, key=lambda field: (field.name.removesuffix(details_name("")), field.name))


def begun_with(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a job of an identity begins a table with: prompts without `caption` are added to its captions."""
    is_added = CAPTION not in identity.get("prompts", {})
    return {name: value for name, value in identity.items() if not (is_added and name == "prompts")}


def added_identity(table_digest: str, prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `prompt.json` holds: the prompt, and the table that it was added to."""
    return {"format": _FORMAT, "table": table_digest, "prompt": prompt}


def digest_of(identity: Mapping[str, Any]) -> str:
    """Return the digest of an identity, as in the footers of parts."""
    return hashlib.blake2b(to_json(identity), digest_size=16).hexdigest()


def is_added_name(name: str) -> bool:
    """Return whether a folder of `columns/` may be that of a prompt: hostile tables may name one as they like."""
    return is_prompt_name(name) and name not in CAPTIONS.names
