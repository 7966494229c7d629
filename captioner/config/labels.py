"""Flags for the labelled images of a fit."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from captioner.config.checks import check, check_hosts, flag_name

__all__ = ["LabelsConfig"]


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Images with captions, and how they are split into train, validation and test."""

    labels_path: Annotated[Positional[str], arg(metavar="LABELS")] = "demo"
    """Images with captions, on any fsspec store: a file of one of the formats above, several as train-{00..07}.tar,
    a glob or a folder. `demo` is the embedded scenes."""

    labels_format: str = "auto"
    """What LABELS is: one of the formats above. `auto` goes by its name."""

    image_root: str | None = None
    """Folder that relative image names start from. By default the folder of LABELS.
    With braces as in LABELS, one folder for each of its files."""

    image_column: str | None = None
    """Column with the image: bytes, Hugging Face's struct<bytes, path>, or a URI.
    By default the only one that can hold images. For tars: the suffix of the member."""

    caption_column: str | None = None
    """Column with a caption or a list of captions. By default `caption`, `captions` or `text`.
    For tars: the suffix of a member, or a key of its .json; by default `txt`, or `caption` in the .json."""

    split_column: str | None = None
    """Column with the split: train, validation or test, also as val, dev or restval. By default `split`, if there is
    one."""

    where: str = ""
    """Of a caption table as LABELS: take the captions for which this condition in SQL holds, over the columns of its
    view captions, as `clip_score > 0.28`."""

    validation_share: float = 0.05
    """Share of the images, 0 to 1, that becomes the validation split where LABELS names none."""

    test_share: float = 0.05
    """Share of the images, 0 to 1, that becomes the test split where LABELS names no split at all; 0 for none."""

    split_seed: int = 0
    """Seed of these splits. An image's split depends on its name only, so that more images move none."""

    limit: int | None = None
    """Use only the first N images of each split."""

    max_failed_share: float = 0.05
    """Share of the images, 0 to 1, that may be missing, unreadable or without a caption; above it the job stops."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of the store of LABELS, as JSON. By default the usual environment variables. Never saved."""

    allow_local_uris: bool = False
    """Follow local paths, and loopback or link-local hosts, that remote LABELS point to."""

    deny_private_hosts: bool = False
    """Follow no URL to a web server in a private network (10/8, 172.16/12, 192.168/16) or to an inner host, except to
    LABELS' own server."""

    def __post_init__(self) -> None:
        check_hosts(self.allow_local_uris, self.deny_private_hosts)
        for name in ("validation_share", "test_share", "max_failed_share"):
            check(0 <= getattr(self, name) <= 1, flag_name(name), getattr(self, name), "0 to 1")
        held_out = self.validation_share + self.test_share
        check(held_out < 1, "--validation-share and --test-share together", held_out, "less than 1")
        check(self.limit is None or self.limit > 0, "--limit", self.limit, "at least 1")
