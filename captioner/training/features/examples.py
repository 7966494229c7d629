"""Examples to fit a projector on: features beside captions, in splits.

    examples = features.load("train")
    examples.features[7], examples.captions[7], examples.image_ids[7]

`FeatureSet` is small and can be pickled: a worker anywhere loads from it. The numbers become one file a split in the
local cache folder, made once a machine and memory-mapped, so that a million images (2 GB) cost the workers of a machine
their page cache once. Knows no pixels, no model and no Ray.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner.config import TrainingConfig
from captioner.errors import JobError
from captioner.storage import open_store
from captioner.storage.local_cache import MONTH_S, make_once
from captioner.storage.parquet import open_parquet_file
from captioner.storage.urls import absolute, join, shown
from captioner.training.features.feature_plan import FeaturePlan, count_reasons
from captioner.training.features.features import FeatureCache, FeatureIndex, Positions
from captioner.training.labels.labels import Count, Labels

__all__ = ["Examples", "FeatureSet", "gather", "sampled_rows"]

_PLACE = ("part", "row")


@dataclass(frozen=True)
class Examples:
    """N images of one split, in the order of the labels."""

    image_ids: list[str]
    features: npt.NDArray[np.float16]
    """float16[N, F], memory-mapped, not to be written to."""

    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.image_ids)

    def sample(self, most: int) -> "Examples":
        """Return a random sample of at most so many images, the same each time: files are often sorted by content."""
        rows = sampled_rows(len(self), most)
        return Examples(
            [self.image_ids[row] for row in rows], self.features[rows], [self.captions[row] for row in rows]
        )


def sampled_rows(num_images: int, most: int) -> Positions:
    """Return the rows of a split that `Examples.sample` takes, int64[at most `most`]."""
    rows: Positions = np.random.default_rng(0).permutation(num_images)[:most]
    return rows


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """The features of labelled images, all computed."""

    url: str
    """Parquet file of the examples: image_id, captions, split, the part and row of their features, the row in the
    labels, the address of their bytes where these are kept."""

    storage_options: Mapping[str, Any]
    """Its storage options; the cache may be on another store."""

    cache: FeatureCache
    num_features: int
    """Width F; 0 where features are not kept."""

    counts: Mapping[str, Count]
    fingerprint: str = ""
    """Hex digest of the examples: names, captions, splits, and the version of each image."""

    failed: Mapping[str, int] = field(default_factory=dict)
    """Images without features, and images and rows that the labels could not use, by reason."""

    num_computed: int = 0
    num_reused: int = 0

    def load(self, split: str) -> Examples:
        """Return the examples of `train`, `validation` or `test`; raises JobError where a part is damaged."""
        rows = self._rows(split, ["image_id", "captions", *_PLACE])
        return Examples(rows["image_id"].to_pylist(), self._features(rows), rows["captions"].to_pylist())

    def features_of(self, split: str) -> npt.NDArray[np.float16]:
        """Return the features of `load` alone: of a million captions as texts, a process holds hundreds of MiB."""
        return self._features(self._rows(split, _PLACE))

    def images_of(self, split: str, labels: Labels) -> pa.Table:
        """Return the `image_id` and `uri` of the images of `load`; the URI is an address where `cache` keeps images."""
        if self.cache.kept_images:
            return self._rows(split, ["image_id", "address"]).drop_columns("split").rename_columns(["image_id", "uri"])
        return labels.table.select(["image_id", "uri"]).take(self._rows(split, ["label"])["label"])

    def validation_sample(self, training: TrainingConfig) -> Examples:
        """Return the validation images that a fit is evaluated on."""
        return self.load("validation").sample(training.num_measured_images)

    def _rows(self, split: str, columns: Sequence[str]) -> pa.Table:
        store = open_store(self.url, self.storage_options)
        with open_parquet_file(store.open(self.url)) as file:
            table = file.read(["split", *columns])
        return table.filter(pc.equal(table["split"], split))

    def _features(self, rows: pa.Table) -> npt.NDArray[np.float16]:
        if not rows.num_rows or not self.num_features:
            return np.empty((rows.num_rows, self.num_features), np.float16)  # an empty file cannot be mapped
        parts = rows.schema.metadata[b"captioner.parts"].decode().split("\n")
        numbers, places = rows["part"].to_numpy(), rows["row"].to_numpy()
        named = hashlib.blake2b(f"{self.cache.url}\n{parts}".encode(), digest_size=12)
        named.update(numbers.tobytes() + places.tobytes())
        copy = make_once(
            "features",
            f"{named.hexdigest()}.npy",
            lambda partial: self._assemble(partial, parts, numbers, places),
            keep_s=MONTH_S,
        )
        found: npt.NDArray[np.float16] = np.load(copy, mmap_mode="r")
        return found

    def _assemble(self, target: Path, parts: list[str], numbers: Positions, places: Positions) -> None:
        """Write float16[N, F], part by part."""
        values = np.lib.format.open_memmap(target, "w+", np.float16, (len(numbers), self.num_features))
        for number in sorted(set(numbers.tolist())):
            here = np.flatnonzero(numbers == number)
            values[here] = self.cache.read_features(parts[number], places[here])
        values.flush()


def gather(plan: FeaturePlan, num_features: int) -> FeatureSet:
    """Return the features of the labels' images once all are computed, and the reasons why some have none.

    An unchanged image in a changed file keeps its features, under the file's new version. Raises InputError when more
    images failed than `--max-failed-share` allows, JobError for an image with neither features nor a reason.
    """
    labels, sources = plan.labels, plan.labels.table["source"]
    num_touched = _restamp(plan)
    index = plan.cache.index()
    places = index.find(sources, plan.versions)
    failures = index.failures_of(sources, plan.versions, are_final=False).filter(pa.array(places < 0))
    failed = Counter(plan.rejected) + count_reasons(failures)
    labels.check_failed(failed, _example(failures))
    num_lost = int((places < 0).sum()) - failed.total()
    if num_lost:
        raise JobError(f"{num_lost:,} images of {shown(labels.location)} changed while they were read; run it again")
    num_computed = int((places[plan.missing] >= 0).sum()) - num_touched
    kept = labels.table.filter(pa.array(places >= 0))
    url, fingerprint = _save(labels, places, index, plan)
    return FeatureSet(
        url=url,
        fingerprint=fingerprint,
        storage_options=plan.output_options,
        cache=plan.cache,
        num_features=num_features,
        counts=replace(labels, table=kept).counts(),
        failed=dict(Counter(labels.failed) + failed),
        num_computed=num_computed,
        num_reused=kept.num_rows - num_computed,
    )


def _restamp(plan: FeaturePlan) -> int:
    """Copy the features of unchanged images to their new version; return how many."""
    index, missing = plan.cache.index(), pa.array(plan.missing)
    sources, versions = plan.labels.table["source"].take(missing), plan.versions.take(missing)
    failures = index.failures_of(sources, versions, are_final=False)
    is_open = (index.find(sources, versions) < 0) & failures["reason"].is_null().to_numpy()
    left = pa.array(np.flatnonzero(is_open))
    known = plan.index.digests(sources.take(left))
    pairs = zip(sources.take(left).to_pylist(), versions.take(left).to_pylist(), strict=True)
    found = [(known[source][0], version) for source, version in pairs if source in known]
    plan.cache.set_versions(
        plan.index, np.array([place for place, _ in found], np.int64), [version for _, version in found]
    )
    return len(found)


def _example(failures: pa.Table) -> str:
    rows = failures.drop_null().slice(0, 1).to_pylist()
    return f"{rows[0]['reason']}: {rows[0]['detail']}" if rows else ""


def _save(labels: Labels, places: Positions, index: FeatureIndex, plan: FeaturePlan) -> tuple[str, str]:
    """Write captions and the place of their features below the run folder; return the URL and the fingerprint."""
    has_features = places >= 0
    rows = labels.table.filter(pa.array(has_features)).select(["image_id", "captions", "split"])
    found = index.rows.take(pa.array(places[has_features]))
    fingerprint = _fingerprint(rows, pc.coalesce(found["digest"], found["version"]))
    for name in ("part", "row", *(["address"] if plan.cache.kept_images else [])):
        rows = rows.append_column(name, found[name])
    rows = rows.append_column("label", pa.array(np.flatnonzero(has_features)))
    rows = rows.replace_schema_metadata({"captioner.parts": "\n".join(index.parts)})
    buffer = pa.BufferOutputStream()
    pq.write_table(rows, buffer, compression="zstd")
    url = join(absolute(plan.run_folder), "examples.parquet")
    open_store(url, plan.output_options).write_atomic(url, bytes(buffer.getvalue()))
    return url, fingerprint


def _fingerprint(rows: pa.Table, contents: Any) -> str:
    """Return a digest of the examples; contents: a digest or version of each image's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in rows.append_column("content", contents).to_batches(max_chunksize=8192):
        digest.update(repr(batch.to_pylist()).encode())
    return digest.hexdigest()
