"""Labelled splits: images with captions, each image in exactly one of train, validation and test.

    labels = read_labels(config, run_folder)
    labels.counts()                     # {"train": Count(num_images=9, num_captions=45), ...}
    labels.table                        # schema LABELS: one row an image

Rows with one URI are one image. Where the files hold the images, rows with one sample name (tar) or one image_id
(Parquet) are, and rows without an image_id if their bytes are equal. A row that cannot be used is counted by its
reason; too many of them are an error. Knows no pixels, no model and no Ray.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from captioner.config import InputConfig, LabelsConfig
from captioner.errors import InputError
from captioner.inputs.units import Frozen
from captioner.storage.urls import shown
from captioner.training.labels.label_files import read_rows
from captioner.training.labels.rows import LabelRow
from captioner.training.labels.splits import SPLITS, Split, random_split, split_named

__all__ = ["LABELS", "Count", "Labels", "read_labels"]

log = logging.getLogger("captioner")

_LOG_EVERY_S = 15.0  # while rows are read

LABELS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("key", pa.int64()),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
"""One row an image. `source` names its bytes permanently, without credentials. They are at `uri`, or where that is
null, in the row `key` of the frozen input."""


class Count(NamedTuple):
    """Size of a split."""

    num_images: int
    num_captions: int


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Images with captions, in splits that share no image."""

    config: LabelsConfig
    location: str
    """URL of the file or files that were read."""

    access: InputConfig
    """How the images are read: as a caption job whose input they are."""

    table: pa.Table
    frozen: Frozen | None = None
    """Where `key` leads; None where every image has a URI."""

    failed: Mapping[str, int] = field(default_factory=dict)
    """Images and rows that cannot be used, by reason."""

    left_out: Mapping[str, int] = field(default_factory=dict)
    """Images left out on purpose, by reason: `limit`, `in_no_split_list`."""

    def counts(self) -> dict[str, Count]:
        """Return how many images and captions each split has."""
        return {split: _count(self.split(split)) for split in SPLITS}

    def split(self, split: str) -> pa.Table:
        """Return the rows of one split."""
        return self.table.filter(pc.equal(self.table["split"], split))

    def check_failed(self, failed: Mapping[str, int], example: str = "") -> None:
        """Raise InputError, naming the counts, when these failures, beside the labels' own, are more than allowed."""
        is_cut = "limit" in self.left_out  # then the labels' own failures include images beyond the limit
        counts = Counter(failed) if is_cut else Counter(self.failed) + Counter(failed)
        total = self.table.num_rows + (0 if is_cut else sum(self.failed.values()))
        _check_share(self.config, counts, total, example)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the images' names, captions and splits, wherever they lie."""
        digest = hashlib.blake2b(digest_size=16)
        for batch in self.table.select(["image_id", "captions", "split"]).to_batches(max_chunksize=8192):
            digest.update(repr(batch.to_pylist()).encode())
        return digest.hexdigest()


def _count(table: pa.Table) -> Count:
    return Count(table.num_rows, pc.sum(pc.list_value_length(table["captions"])).as_py() or 0)


def read_labels(
    config: LabelsConfig,
    run_folder: str,
    output_options: Mapping[str, Any] | None = None,
    *,
    clock: Callable[[], float] = monotonic,
) -> Labels:
    """Return the labelled images of LABELS. Writes below `run_folder` where the images are, to read them later.

    Raises InputError for files that cannot be read, an image in two splits, a split with an unknown name, more failures
    than `max_failed_share`, or no train split; JobError for a store that does not deliver.
    """
    files = read_rows(config, run_folder, output_options)
    images = _Images()
    for row in _log_progress(files.rows, _shown(config), clock):
        images.add(row)
    if config.split_column and not images.has_splits:
        raise InputError(
            f"no row of {_shown(config)} has a split by --split-column {config.split_column}; expected train,"
            " validation or test in it. Name the right column, or leave the flag out"
        )
    found = images.in_splits(config)
    _check_share(config, images.failed, len(found) + images.failed.total(), images.first_problem)
    rows, left_out = _limited(found, config.limit)
    labels = Labels(
        config=config,
        location=files.location,
        access=files.access,
        table=_table(rows),
        frozen=files.frozen,
        failed=dict(images.failed),
        left_out=dict(images.left_out + left_out),
    )
    if not labels.counts()["train"].num_images:
        raise InputError(f"{_shown(config)} has no image of the split train; expected images with captions to fit on")
    return labels


def _log_progress(rows: Iterator[LabelRow], where: str, clock: Callable[[], float]) -> Iterator[LabelRow]:
    """Yield the rows, and log from time to time how many have come."""
    began_at = logged_at = clock()
    for number, row in enumerate(rows, 1):
        yield row
        now = clock()
        if now - logged_at >= _LOG_EVERY_S:
            log.info("labels=%s rows=%d rows_per_s=%.0f", where, number, number / (now - began_at))
            logged_at = now


def _check_share(config: LabelsConfig, failed: Mapping[str, int], total: int, example: str) -> None:
    num_failed = sum(failed.values())
    if num_failed > config.max_failed_share * total:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(failed.items()))
        first = f"; one of them: {example}" if example else ""
        raise InputError(
            f"{num_failed:,} of {total:,} images of {_shown(config)} cannot be used ({reasons}), more than"
            f" --max-failed-share {config.max_failed_share:g}{first}. Correct them, or raise it"
        )


def _shown(config: LabelsConfig) -> str:
    return config.labels_path if config.labels_path == "demo" else shown(config.labels_path)


@dataclass
class _Image:
    """An image, gathered from its rows."""

    row: LabelRow
    split: Split | None = None
    captions: list[str] = field(default_factory=list)


class _Images:
    """Rows grouped by image."""

    def __init__(self) -> None:
        self.failed: Counter[str] = Counter()
        self.first_problem = ""
        self.has_splits = False
        self._left_out: dict[str, set[str]] = {}
        self._by_source: dict[str, _Image] = {}
        self._by_id: dict[str, _Image] = {}
        self._by_digest: dict[str, _Image] = {}

    def add(self, row: LabelRow) -> None:
        """Add a row to its image. Raises InputError where it contradicts an earlier row."""
        if row.problem:
            self._fail(row.problem, row.detail)
            return
        if row.left_out:
            self._left_out.setdefault(row.left_out, set()).add(row.source)
            return
        image = self._image(row)
        image.captions += filter(None, (" ".join(text.split()) for text in row.captions))
        split = _split(row)
        self.has_splits |= split is not None
        if split and image.split and split != image.split:
            raise InputError(
                f"image {image.row.image_id} is in two splits, {image.split} and {split}; expected each image in one:"
                " captions of one image in train and validation make every figure too good"
            )
        image.split = image.split or split

    def _image(self, row: LabelRow) -> _Image:
        """Return the image of a row: the one with its source, else with its name, or without a name with its bytes."""
        found = self._by_source.get(row.source)
        if found is None and row.is_named:
            found = self._by_id.get(row.image_id)
            if found is not None and (row.uri is not None or row.digest != found.row.digest):
                raise InputError(
                    f"image_id {row.image_id} means two images, {found.row.source} and {row.source}; expected one"
                )
        elif found is None and row.digest:
            found = self._by_digest.get(row.digest)
        if found is None:
            found = self._by_id[row.image_id] = self._by_source[row.source] = _Image(row)
            self._by_digest.setdefault(row.digest, found)
        return found

    def _fail(self, reason: str, detail: str) -> None:
        self.failed[reason] += 1
        self.first_problem = self.first_problem or f"{reason}: {detail}"

    @property
    def left_out(self) -> Counter[str]:
        """Images left out, by reason."""
        return Counter({reason: len(sources) for reason, sources in self._left_out.items()})

    def in_splits(self, config: LabelsConfig) -> list[_Image]:
        """Return the images that have captions, each with its split, in the order of their first rows."""
        kept = [image for image in self._by_source.values() if image.captions]
        self.failed += Counter({"no_caption": len(self._by_source) - len(kept)})
        _assign_splits(kept, config)
        return kept


def _split(row: LabelRow) -> Split | None:
    if not row.split:
        return None
    split = split_named(row.split)
    if split is None:
        raise InputError(
            f"image {row.image_id} has the split {row.split[:40]!r}; expected train, validation or test"
            " (also val, dev, restval), or name the right column with --split-column"
        )
    return split


def _assign_splits(images: Iterable[_Image], config: LabelsConfig) -> None:
    """Assign a split to each image without one. If LABELS has no validation split, take one from its train images."""
    known = {image.split for image in images} - {None}
    test_share = 0.0 if known else config.test_share
    for image in images:
        if image.split is None or (image.split == "train" and "validation" not in known):
            image.split = random_split(
                image.row.image_id,
                seed=config.split_seed,
                validation_share=config.validation_share,
                test_share=test_share,
            )


def _limited(images: Iterable[_Image], limit: int | None) -> tuple[list[_Image], Counter[str]]:
    counts: Counter[str] = Counter()
    kept = []
    for image in images:
        counts[str(image.split)] += 1
        if limit is None or counts[str(image.split)] <= limit:
            kept.append(image)
    return kept, Counter({"limit": counts.total() - len(kept)}) if limit else Counter()


def _table(images: Iterable[_Image]) -> pa.Table:
    def rows() -> Iterator[tuple[Any, ...]]:
        for image in images:
            row = image.row
            yield row.image_id, row.source, row.uri, row.key, image.captions, image.split

    columns = list(zip(*rows(), strict=True)) or [()] * len(LABELS)
    return pa.table([pa.array(values, kind.type) for values, kind in zip(columns, LABELS, strict=True)], LABELS)
