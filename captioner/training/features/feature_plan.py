"""The features to compute before a projector is fitted: the version of each image, those in the cache, the rest.

Everything that can be refused is refused here, before Ray starts. Asks the stores, reads no pixels; torch-free,
like everything that a read task imports.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner.config import CaptionJobConfig, ImageConfig, ModelConfig
from captioner.errors import InputError, JobError
from captioner.images import Preprocessing
from captioner.inputs import Columns, Fetcher, Unit
from captioner.inputs.listing import ListingWriter
from captioner.inputs.slices import Slice, SliceReader, cut, listing_rows
from captioner.schema import MAX_UNIT_ROWS, TRANSIENT_REASONS, Reject, split_key
from captioner.storage import Location
from captioner.storage.faults import output_errors
from captioner.storage.urls import absolute, join, shown
from captioner.training.features.features import IMAGE, FeatureCache, FeatureIndex, Positions
from captioner.training.labels.labels import Labels

if TYPE_CHECKING:
    from captioner.model.bundle import BundleDescription  # not at run time: it brings torch

__all__ = ["VERSION_COLUMNS", "FeaturePlan", "LabelReader", "LabelSlice", "count_reasons", "plan_features"]

VERSION_COLUMNS = (
    pa.field("source", pa.string()),
    pa.field("version", pa.string()),
    pa.field("digest", pa.string()),
)
"""Columns that stay with an image through reading and decoding: its source and version."""


@dataclass(frozen=True, kw_only=True)
class FeaturePlan:
    """Features of labelled images: those in the cache, and those to compute."""

    labels: Labels
    cache: FeatureCache
    image: ImageConfig
    run_folder: str
    output_options: Mapping[str, Any]
    clip_options: Mapping[str, Any]
    """Storage options of the CLIP."""

    model: ModelConfig
    """How the CLIP computes; its dtype is part of the cache's identity."""

    versions: pa.Array
    """Version of each row of the labels; null if the store has no such image."""

    rejected: Mapping[str, int]
    """Images that their stores do not have or deliver, by reason."""

    missing: Positions
    """Rows of the labels whose features have to be computed."""

    index: FeatureIndex = field(repr=False)

    keeps_features: bool = True
    """Whether features are computed and kept; else images are only checked, and a step computes its own."""

    @property
    def kept_columns(self) -> tuple[pa.Field, ...]:
        """Columns that stay with an image through reading and decoding."""
        return (*VERSION_COLUMNS, IMAGE) if self.cache.kept_images else VERSION_COLUMNS

    @property
    def bytes_to_keep(self) -> int:
        """Bytes of the images to keep: at most those of the files that they are in, as far as stores say."""
        if not self.cache.kept_images or self.labels.frozen is None:
            return 0
        wanted = set((self.labels.table["key"].take(pa.array(self.missing)).to_numpy() >> 32).tolist())
        return sum(unit.size_bytes or 0 for unit in self.labels.frozen.units if unit.ordinal in wanted)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the versions of all images."""
        digest = hashlib.blake2b(digest_size=16)
        for source, version in zip(self.labels.table["source"].to_pylist(), self.versions.to_pylist(), strict=True):
            digest.update(f"{source}\n{version}\n".encode())
        return digest.hexdigest()

    @property
    def job(self) -> CaptionJobConfig:
        """The caption job that would decode the same images."""
        access = replace(self.labels.access, keep_columns=())
        return CaptionJobConfig(input_path=self.labels.location, output=self.run_folder, input=access, image=self.image)

    def slices(self) -> "list[LabelSlice]":
        """Write a listing of the images to read, and return it in slices, one a read task."""
        with output_errors(self.run_folder):
            return list(self._listed() if self.labels.frozen is None else self._contained())

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute what is missing in the block. No listing is left, nor one of a run that was killed: a URI may hold a
        signature."""
        if len(self.missing):
            self.cache.claim()
        try:
            yield
        finally:
            ListingWriter(Location(self.run_folder, self.output_options), lambda _: None).discard()

    @property
    def reader(self) -> "LabelReader":
        """The reader of the slices, in any process."""
        frozen = self.labels.frozen
        columns = Columns(kept=VERSION_COLUMNS) if frozen is None else replace(frozen.columns, kept=(), kept_from=())
        return LabelReader(
            SliceReader(config=self.job, columns=columns, run_folder=Location(self.run_folder, self.output_options)),
            keeps_images=self.cache.kept_images is not None,
        )

    def _listed(self) -> "Iterator[LabelSlice]":
        writer = ListingWriter(Location(self.run_folder, self.output_options), lambda _: None)
        writer.kept = VERSION_COLUMNS
        rows = self.labels.table.take(pa.array(self.missing))
        versions = self.versions.take(pa.array(self.missing)).to_pylist()
        columns = (rows[name].to_pylist() for name in ("uri", "image_id", "source"))
        for uri, image_id, source, version in zip(*columns, versions, strict=True):
            writer.add(uri, image_id=image_id, kept=(source, version, None))
        num_listed = listing_rows(len(self.missing))
        for unit in writer.close():
            assert unit.num_rows is not None
            for piece in cut(unit, unit.num_rows, lambda start, stop: np.zeros(stop - start, bool), {}, num_listed):
                yield LabelSlice(**vars(piece))

    def _contained(self) -> "Iterator[LabelSlice]":
        assert self.labels.frozen is not None
        missing = pa.array(self.missing)
        rows, versions = self.labels.table.take(missing), self.versions.take(missing)
        keys, known = rows["key"].to_numpy(), self.index.digests(rows["source"].to_pylist())
        for unit in self.labels.frozen.units:
            here = np.flatnonzero(keys >> 32 == unit.ordinal)
            if len(here):
                sources = rows["source"].take(pa.array(here)).to_pylist()
                pairs = zip(keys[here].tolist(), sources, strict=True)
                digests = {key: known[source][1] for key, source in pairs if source in known}
                yield from _slices(unit, keys[here], versions[int(here[0])].as_py(), digests)


def _slices(unit: Unit, keys: Positions, version: str, digests: Mapping[int, str]) -> "Iterator[LabelSlice]":
    """Yield the slices of a unit that lead to these rows."""
    positions = keys & (MAX_UNIT_ROWS - 1)

    def finished(start: int, stop: int) -> np.ndarray:
        found = np.ones(stop - start, bool)
        found[positions[(positions >= start) & (positions < stop)] - start] = False
        return found

    for piece in cut(unit, int(positions.max()) + 1, finished, {}):
        here = {key: digest for key, digest in digests.items() if piece.start <= split_key(key)[1] < (piece.stop or 0)}
        yield LabelSlice(**vars(piece), version=version, digests=here)


@dataclass(frozen=True, kw_only=True)
class LabelSlice(Slice):
    """A slice of the images whose features are missing."""

    version: str = ""
    """Version of the file that they are in."""

    digests: Mapping[int, str] = field(default_factory=dict)
    """Row key -> digest of the bytes that the cached features were computed from."""


@dataclass(frozen=True)
class LabelReader:
    """Reads slices with the versions of their images; leaves out images whose bytes have not changed."""

    reader: SliceReader
    keeps_images: bool = False
    """Whether the bytes of images stay with them."""

    def read(self, piece: LabelSlice) -> Iterator[pa.Table]:
        """Yield rows of `schema.source_schema(FeaturePlan.kept_columns)`."""
        for table in self.reader.read(piece):
            rows = table if piece.unit.kind == "listing" else _with_versions(table, piece)
            yield rows.append_column(IMAGE, rows["data"]) if self.keeps_images else rows


def _with_versions(table: pa.Table, piece: LabelSlice) -> pa.Table:
    digests = [_digest(data) for data in table["data"]]
    sources = [
        source_of(piece.unit, *pair) for pair in zip(*(table[n].to_pylist() for n in ("key", "image_id")), strict=True)
    ]
    columns = (sources, [piece.version] * table.num_rows, digests)
    for kind, values in zip(VERSION_COLUMNS, columns, strict=True):
        table = table.append_column(kind, pa.array(values, kind.type))
    known = (piece.digests.get(key) for key in table["key"].to_pylist())
    changed = [digest is None or digest != before for digest, before in zip(digests, known, strict=True)]
    return table.filter(pa.array(changed, pa.bool_()))


def _digest(data: pa.Scalar) -> str | None:
    return hashlib.blake2b(data.as_buffer(), digest_size=16).hexdigest() if data.is_valid else None


def source_of(unit: Unit, key: int, image_id: str) -> str:
    """Return the permanent name of an image inside a file, as `labels` does."""
    if unit.kind == "parquet":
        return f"{shown(unit.path)}#{split_key(key)[1]}"
    return shown(unit.path) + image_id.removeprefix(unit.name)


def plan_features(
    labels: Labels,
    model: "BundleDescription",
    config: ModelConfig,
    image: ImageConfig,
    *,
    run_folder: str,
    features_folder: str | None = None,
    features_options: Mapping[str, Any] | None = None,
    clip_options: Mapping[str, Any] | None = None,
    output_options: Mapping[str, Any] | None = None,
    keeps_features: bool = True,
) -> FeaturePlan:
    """Return the plan that gives each labelled image the features of a model's CLIP. Writes nothing.

    features_folder: where the cache is, which runs may share; by default `features` below the run folder, with its
    options. keeps_features: else images are only checked: a row says that one can be decoded, and where the bytes of
    one inside a file are kept. Raises InputError when more images are missing than `--max-failed-share` allows,
    JobError for a failing store.
    """
    folder = features_folder or join(run_folder, "features")
    options = features_options if features_folder else output_options
    pixels, clip = Preprocessing.from_config(model.preprocessing), model.clip_fingerprint
    of_tower = partial(FeatureCache.of_tower, fingerprint=clip, preprocessing=pixels, dtype=config.dtype)
    of_decoding = partial(FeatureCache.of_decoding, preprocessing=pixels, keeps_images=labels.frozen is not None)
    cache = (of_tower if keeps_features else of_decoding)(folder, image=image, storage_options=options)
    versions, rejects = _versions(labels, image)
    with output_errors(cache.url):
        index = cache.index()
    sources = labels.table["source"]
    failures = index.failures_of(sources, versions, are_final=True)
    rejected = Counter(str(reject.reason) for reject in rejects)
    example = f"{rejects[0].reason}: {rejects[0].detail}" if rejects else ""
    labels.check_failed(rejected + count_reasons(failures), example)
    is_open = pc.and_(versions.is_valid(), pc.is_null(failures["reason"].combine_chunks()))
    missing = np.flatnonzero(is_open.to_numpy(zero_copy_only=False) & (index.find(sources, versions) < 0))
    return FeaturePlan(
        labels=labels,
        cache=cache,
        image=image,
        run_folder=absolute(run_folder),
        output_options=output_options or {},
        clip_options=clip_options or {},
        model=config,
        versions=versions,
        rejected=rejected,
        missing=missing,
        index=index,
        keeps_features=keeps_features,
    )


def count_reasons(failures: pa.Table) -> Counter[str]:
    """Return the number of images by reason."""
    return Counter(failures["reason"].drop_null().to_pylist())


def _versions(labels: Labels, image: ImageConfig) -> tuple[pa.Array, list[Reject]]:
    """Return the version of each image, null for none, and the rejects of those without."""
    fetcher = Fetcher(labels.location, replace(labels.access, keep_columns=()), image)
    if labels.frozen is not None:
        of_unit = {unit.ordinal: _file_version(fetcher, unit) for unit in labels.frozen.units}
        return pa.array([of_unit[key >> 32] for key in labels.table["key"].to_pylist()], pa.string()), []
    found = fetcher.versions(labels.table["uri"].to_pylist())
    versions = [None if isinstance(version, Reject) else version for version in found]
    return pa.array(versions, pa.string()), [version for version in found if isinstance(version, Reject)]


def _file_version(fetcher: Fetcher, unit: Unit) -> str:
    [version] = fetcher.versions([unit.path])
    if isinstance(version, Reject):
        kind = JobError if version.reason in TRANSIENT_REASONS else InputError
        raise kind(f"{shown(unit.path)} cannot be read: {version.detail}")
    return version
