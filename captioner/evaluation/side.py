"""One side of an evaluation, captions or references: all of a file, or a column of a caption table.

Of a table, a column that is named may be that of any prompt, one that was added later too, and a condition may select
rows: these come from its view `captions`. Knows no metric.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from captioner.config import EvaluateConfig
from captioner.errors import ConfigError
from captioner.evaluation.caption_files import SCORED_COLUMN, CaptionRow, read_captions
from captioner.storage import Location
from captioner.storage.faults import output_errors
from captioner.tables.table import CaptionTable, hint_at_table, table_around

__all__ = ["Side"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Side:
    """What is read of one side."""

    path: str
    storage_options: Mapping[str, object]
    column: str
    """Column with the texts; empty where its flag is not given."""

    flag: str
    where: str = ""

    @classmethod
    def captions(cls, config: EvaluateConfig) -> "Side":
        """Return the captions that are measured."""
        return cls(
            path=config.captions,
            storage_options=config.storage_options,
            column=config.caption_column,
            flag="--caption-column",
            where=config.where,
        )

    @classmethod
    def references(cls, config: EvaluateConfig) -> "Side":
        """Return what they are measured against."""
        return cls(
            path=config.references,
            storage_options=config.storage_options,
            column=config.reference_column,
            flag="--reference-column",
        )

    @property
    def _place(self) -> Location:
        return Location(self.path, self.storage_options)

    def read(self, use: Callable[[Iterator[CaptionRow]], T], rows_per_batch: int) -> T:
        """Return what `use` makes of the rows. It is called again where parts of a table were moved meanwhile.

        A null of a table is no text: an image that has no answer yet, or none that is whole. Raises as `read_captions`
        and `query.texts.texts_sql` do, and ConfigError for a condition on what is no caption table."""
        table = self._table() if self.column or self.where else None
        if table is not None:
            return self._read_table(table, use, rows_per_batch)
        if self.where:
            raise ConfigError(
                f"--where is {self.where}, but {self._place} is no caption table; expected the OUTPUT of a caption"
                f" job{hint_at_table(self._place)}, or no --where"
            )
        column = (self.column, self.flag) if self.column else None
        return use(read_captions(self.path, self.storage_options, column=column, rows_per_batch=rows_per_batch))

    def _table(self) -> CaptionTable | None:
        with output_errors(self._place):
            return CaptionTable(self._place) if table_around(self._place) == self._place.folder else None

    def _read_table(self, table: CaptionTable, use: Callable[[Iterator[CaptionRow]], T], rows_per_batch: int) -> T:
        from captioner.query.texts import texts_sql  # here, not above: DuckDB is for these two flags alone
        from captioner.query.views import ask, stream

        column = self.column or SCORED_COLUMN
        score = "clip_score" if column == SCORED_COLUMN else "NULL"
        sql = texts_sql(table, {column: self.flag}, where=self.where, others=[score])
        return ask(table, lambda connection: use(_rows(stream(connection, sql, rows_per_batch))), sql)


def _rows(batches: pa.RecordBatchReader) -> Iterator[CaptionRow]:
    for batch in batches:
        keys, image_ids, texts, scores = (column.to_pylist() for column in batch.columns)
        for key, image_id, text, score in zip(keys, image_ids, texts, scores, strict=True):
            if text is not None:
                yield CaptionRow(image_id, text, "", key, score)
