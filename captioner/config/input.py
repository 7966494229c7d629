"""Flags for the images of a job: where they are, which columns are used."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Fixed, Suppress

from captioner.config.checks import check, check_hosts

__all__ = ["InputConfig", "InputFormat"]

InputFormat = Literal["auto", "files", "list", "parquet", "webdataset"]


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Which images are captioned, and which of their columns are used."""

    input_format: InputFormat = "auto"
    """Format of INPUT. `auto` tells it by the name: .parquet is a table, .tar a shard, .txt and .csv are lists of URIs.
    A folder has the format of most of its files: images, tars or Parquet. Other files are skipped and counted."""

    image_column: str | None = None
    """Column of a table that holds the image: bytes, Hugging Face's struct<bytes, path>, or a URI.
    By default the only column that can hold images."""

    id_column: str | None = None
    """Column with the image_id of the output. By default it is the URI, the tar member, or file#row."""

    keep_columns: tuple[str, ...] = ()
    """Input columns to copy into the output; `a=b` names column a b.
    For tars: a member's extension (`txt`) or a key of its .json. Columns that --prompts names are kept without it."""

    tar_images: Literal["first", "all"] = "first"
    """Images of a tar's sample - members whose names agree up to the first dot, as v1.0.jpg and v1.5.jpg - that are
    captioned: the first, as the webdataset library reads them, and the others are counted; or all, each as a row with
    the texts that follow it."""

    explode_images: bool = False
    """Caption every image of a row whose image column is a list, each as a row with the row's other columns.
    By default the first of each row is captioned, and the others are counted."""

    prompt_columns: Annotated[tuple[str, ...], Fixed, Suppress] = ()
    """No flag: the input columns that named prompts ask for."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of the input's store, as JSON. By default the usual environment variables. Never saved."""

    output_storage_options: dict[str, object] | None = None
    """fsspec options of the output's store, as JSON.
    By default those of the input, when both are on the same server (kind of store and host) or the input is local."""

    allow_local_uris: bool = False
    """Follow local paths and inner hosts that a remote list points to: loopback, link-local, cloud metadata, this
    machine's own addresses. Private networks (10/8, 172.16/12, 192.168/16) are followed unless they are denied."""

    deny_private_hosts: bool = False
    """Follow no URL, of a local list neither, to a web server in a private network (10/8, 172.16/12, 192.168/16) or to
    an inner host, except to INPUT's own server."""

    home_addresses: Annotated[tuple[str, ...] | None, Fixed, Suppress] = None
    """No flag: the inner addresses of INPUT's web server, as the driver found them, so that all workers agree."""

    limit: int | None = None
    """Caption only the first N images of the input. A later run without it continues."""

    def __post_init__(self) -> None:
        check(self.limit is None or self.limit > 0, "--limit", self.limit, "at least 1")
        check_hosts(self.allow_local_uris, self.deny_private_hosts)
        names = list(self.kept_columns)
        repeated = sorted({name for name in names if names.count(name) > 1})
        check(not repeated, "--keep-columns", ",".join(self.keep_columns), "each new name once")

    @property
    def kept_columns(self) -> dict[str, str]:
        """Name in the output -> name in the input, of each kept column; those that prompts ask for among them."""
        pairs = [name.partition("=") for name in self.keep_columns]
        kept = {new or old: old for old, _, new in pairs}
        return kept | {name: name for name in self.prompt_columns if name not in kept.values()}

    def flag_of(self, column: str) -> str:
        """Return the flag by which an input column is kept."""
        asked = {old for old, _, _ in (name.partition("=") for name in self.keep_columns)}
        return "--keep-columns" if column in asked else "--prompts"
