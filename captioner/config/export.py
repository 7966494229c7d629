"""What a user may set for jobs/export.py."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from captioner.config.checks import check, typed, worker_range
from captioner.config.image_access import ImageAccessConfig

__all__ = ["ExportConfig"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the captions of a table in a format that trainers and lakes read; a rerun adds what is new."""

    table: Annotated[Positional[str], arg(metavar="TABLE")] = "captions-demo"
    """The OUTPUT of a caption job, on any fsspec store; it may still be running."""

    output: Annotated[Positional[str], arg(metavar="OUT")] = ""
    """Folder to write, on any fsspec store: a new one, or that of an earlier export with the same settings.
    By default TABLE-FORMAT in this folder."""

    format: str = "jsonl"
    """One of the formats that this help lists."""

    text: str = "{caption}"
    """The text of an image, from columns of the table, as `{caption} {tags}`. An image whose text is empty is left out.
    Where it is not `{caption}`, tables and JSON lines get it as a column `text`."""

    where: str = ""
    """SQL condition over the columns of `captions`, as `clip_score > 0.25`: which images are exported."""

    columns: tuple[str, ...] = ()
    """Columns of `captions` that are exported, where the format has columns; by default all."""

    captions: Literal["best", "all"] = "best"
    """`all`: every candidate of `caption` is a caption of its own, where the format holds several."""

    names: Literal["tree", "beside"] = "tree"
    """Where txt puts NAME.txt: in a tree below OUT like that of the images, or beside each image.
    With `beside` OUT holds only the record of what was written."""

    rows_per_file: int | None = None
    """Most images in one file. By default 1,000,000, or 10,000 where the file holds the images."""

    bytes_per_file: int = 512 << 20
    """Most bytes of images in one file that holds images."""

    images: bool = True
    """Whether webdataset and hf read the images again, or write captions alone."""

    prompt: str | None = None
    """What the human says in llava's conversations. By default the prompt whose answer --text names first."""

    csv_safe: bool = False
    """In CSV, put `'` before a text that a spreadsheet would run as a formula: it begins with = + - @ or a tab."""

    iceberg_table: str = "captioner.captions"
    """Namespace and name of the Iceberg table."""

    iceberg_catalog: dict[str, object] = field(default_factory=dict)
    """Properties of the Iceberg catalog, as JSON, as pyiceberg calls them. By default SQLite in OUT."""

    push_to_hub: str = ""
    """Data set on the Hugging Face hub, as `org/name`, to which what OUT holds is uploaded, except for what it has
    already. HF_TOKEN and HF_ENDPOINT work as usual; a data set that is not there is made, and is private."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of the table's store, as JSON. By default the usual environment variables."""

    output_storage_options: dict[str, object] | None = None
    """fsspec options of OUT's store, as JSON. By default those of the table, when both are on the same server."""

    image_access: ImageAccessConfig = field(default_factory=ImageAccessConfig)

    workers: str = "auto"
    """Ray tasks that read images and write files at once, where images are read: a number, or `auto`."""

    def __post_init__(self) -> None:
        if not self.output:
            name = re.split(r"[/\\]", self.table.rstrip("/"))[-1]
            object.__setattr__(self, "output", f"{name}-{self.format}")
        check(self.text.strip() != "", "--text", repr(self.text), "a text with columns in braces: '{caption}'")
        is_count = self.rows_per_file is None or self.rows_per_file >= 1
        check(is_count, "--rows-per-file", self.rows_per_file, "1 or more")
        check(self.bytes_per_file >= 1, "--bytes-per-file", self.bytes_per_file, "1 or more")
        is_txt = self.format == "txt" or self.names == "tree"
        check(is_txt, "--names", self.names, "--format txt with it")
        if self.prompt is not None:
            object.__setattr__(self, "prompt", typed(self.prompt))
        check(self.prompt is None or self.format == "llava", "--prompt", self.prompt, "--format llava with it")
        check(self.format == "csv" or not self.csv_safe, "--csv-safe", "given", "--format csv with it")
        named = "." in self.iceberg_table.strip(".")
        check(named, "--iceberg-table", self.iceberg_table, "namespace and name: captioner.captions")
        worker_range(self.workers, "--workers")
