"""What a user may set for jobs/query.py."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from tyro.conf import Positional, arg

from captioner.config.checks import check
from captioner.config.gallery import MAX_CARDS
from captioner.config.image_access import ImageAccessConfig

__all__ = ["QueryConfig", "RowFormat"]

RowFormat = Literal["auto", "table", "csv", "json", "parquet"]


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Query a caption table with DuckDB's SQL; without SQL print a summary of it."""

    table: Annotated[Positional[str], arg(metavar="TABLE")] = "captions-demo"
    """The OUTPUT of a caption job, on any fsspec store; it may still be running."""

    sql: Annotated[Positional[str], arg(metavar="SQL")] = ""
    """One SELECT over captions, failures, attempts, unanswered, images and runs.
    `DESCRIBE captions` shows a view's columns."""

    format: RowFormat = "auto"
    """Format of the rows: a table for terminals, or all rows as csv, json (one object a line) or parquet.
    `auto`: by the suffix of --out; without --out a table."""

    out: str = ""
    """File for the rows, on any fsspec store, in place of stdout. A name that ends in .html makes a gallery of them."""

    csv_safe: bool = False
    """In CSV, put `'` before a text that a spreadsheet would run as a formula: it begins with = + - @ or a tab."""

    review: int | None = None
    """Show the N most doubtful captions in place of SQL: improbable, repetitive, truncated, with a low CLIPScore.
    Without --format they become a gallery, --out or review.html."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of the table's store, as JSON. By default the usual environment variables."""

    image_access: ImageAccessConfig = field(default_factory=ImageAccessConfig)

    def __post_init__(self) -> None:
        is_count = self.review is None or 0 < self.review <= MAX_CARDS
        check(is_count, "--review", self.review, f"1 to {MAX_CARDS:,}")
        check(self.review is None or not self.sql, "SQL", self.sql, "none with --review, which brings its own")
        if self.review is not None and not self.out and self.format == "auto":
            object.__setattr__(self, "out", "review.html")
        has_rows = bool(self.sql) or self.review is not None
        check(has_rows or not self.out, "--out", self.out, "SQL or --review with it: a summary goes to stdout")
        check(has_rows or self.format == "auto", "--format", self.format, "SQL or --review with it")
        endings = "a name that ends in .csv, .json, .jsonl, .parquet or .html, or --format"
        check(self.is_gallery or self.chosen_format in get_args(RowFormat)[1:], "--out", self.out, endings)
        is_csv = self.chosen_format == "csv"
        check(is_csv or not self.csv_safe, "--csv-safe", "given", "--format csv with it, or an --out that ends in .csv")
        check(self.chosen_format != "parquet" or bool(self.out), "--format", "parquet", "--out FILE with it")
        check(self.chosen_format != "table" or not self.out, "--format", "table", "csv, json or parquet with --out")

    @property
    def prints_rows(self) -> bool:
        """Whether stdout is given rows, in place of a summary."""
        return not self.out and (bool(self.sql) or self.review is not None)

    @property
    def is_gallery(self) -> bool:
        """Whether the rows become a page of images."""
        return self.format == "auto" and self.out.lower().endswith((".html", ".htm"))

    @property
    def chosen_format(self) -> str:
        """The format of the rows; of an --out with another suffix, that suffix."""
        if self.format != "auto" or not self.out:
            return "table" if self.format == "auto" else self.format
        ending = self.out.lower().rpartition(".")[2]
        return {"jsonl": "json", "ndjson": "json", "pq": "parquet"}.get(ending, ending)
