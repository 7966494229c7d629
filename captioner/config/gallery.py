"""What a user may set for jobs/gallery.py."""

import re
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from captioner.config.checks import check
from captioner.config.image_access import ImageAccessConfig

__all__ = ["MAX_CARDS", "GalleryConfig"]

MAX_CARDS = 5_000  # browsers slow down on pages with more


@dataclass(frozen=True, kw_only=True)
class GalleryConfig:
    """Show captions beside their images, on one page that needs no server and loads nothing."""

    table: Annotated[Positional[str], arg(metavar="TABLE")] = "captions-demo"
    """The OUTPUT of a caption job, on any fsspec store; it may still be running."""

    output: Annotated[Positional[str], arg(metavar="OUT.html")] = ""
    """The page to write, on any fsspec store. By default the table's name with .html, in this folder."""

    sample: int = 200
    """Images on the page: drawn at random, the first rows of --query, or with --compare the largest changes."""

    seed: int = 0
    """Seed of the random sample."""

    query: str | None = None
    """SQL whose rows are shown, in their order, in place of a sample; see jobs/query.py.
    The rows need `key` or `image_id`; columns that the SQL computes are shown on each card."""

    compare: str | None = None
    """Another table of the same images to show beside this one, the largest changes first."""

    references: str | None = None
    """Reference captions to show beside them: any file that jobs/evaluate.py reads; `demo` is the embedded images."""

    caption_column: str = ""
    """The prompt whose answers are shown in place of the captions, and compared by --compare in both tables: any that
    the table answers, also one that was added later. By default `caption`."""

    reference_column: str = ""
    """Column of --references with the texts, of a caption table the name of any prompt. By default `caption`,
    `captions` or `text`."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of the tables' store, as JSON. By default the usual environment variables."""

    image_access: ImageAccessConfig = field(default_factory=ImageAccessConfig)

    def __post_init__(self) -> None:
        if not self.output:
            object.__setattr__(self, "output", re.split(r"[/\\]", self.table.rstrip("/"))[-1] + ".html")
        is_page = self.output.lower().endswith((".html", ".htm"))
        check(is_page, "OUT.html", self.output, "a name that ends in .html")
        check(1 <= self.sample <= MAX_CARDS, "--sample", self.sample, f"1 to {MAX_CARDS:,}")
        check(not (self.compare and self.references), "--references", self.references, "none with --compare")
        has_columns = self.references not in (None, "demo")
        check(
            has_columns or not self.reference_column,
            "--reference-column",
            self.reference_column,
            "--references with it, a file or a caption table",
        )
        check(not (self.compare and self.query), "--query", self.query, "none with --compare")
