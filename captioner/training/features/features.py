"""The cache of CLIP's features of labelled images: computed once, read by every epoch.

    FOLDER/<digest>/cache.json               everything the numbers depend on: tower, preprocessing, decode settings
    FOLDER/<digest>/features/part-*.parquet  FEATURES: one row an image, float16[F]
    FOLDER/<digest>/failures/part-*.parquet  FAILURES: images without features, with a reason
    FOLDER/<digest>/images/part-*.bin        bytes of images inside files, where steps read images; see `kept_images`

A row is an image's *version*: its place, and the version that its store reports. Another version is another row, so
only a touched image is computed again. Another tower or decode setting is another digest, so another folder. Parts are
written whole or not at all; two runs may share a folder. Knows no pixels, no model and no Ray.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner.config import ImageConfig
from captioner.errors import JobError
from captioner.schema import TRANSIENT_REASONS
from captioner.storage import Store, open_store
from captioner.storage.parquet import open_parquet_file
from captioner.storage.urls import absolute, join, redact
from captioner.tables.identity import to_json
from captioner.training.features.kept_images import KeptImages

__all__ = ["IMAGE", "FeatureCache", "FeatureIndex", "feature_schema"]

IMAGE = pa.field("image", pa.large_binary())
"""Column of the rows to write with the bytes of each image, where they are kept."""

_FORMAT = 1
_READERS = 8
_VERSIONED = [
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("version", pa.string(), nullable=False),
    pa.field("digest", pa.string()),
]
_ADDRESS = pa.field("address", pa.string(), nullable=False)
_FAILURES = pa.schema(
    [
        *_VERSIONED,
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("limits", pa.string(), nullable=False),
    ]
)
_KEY = ("source", "version")
Positions = npt.NDArray[np.int64]


def feature_schema(num_features: int) -> pa.Schema:
    """Return the columns of `features/part-*.parquet`; `digest` is that of the bytes, of an image inside a file."""
    kind = pa.list_(pa.field("item", pa.float16(), nullable=False), num_features)
    return pa.schema([*_VERSIONED, pa.field("features", kind, nullable=False)])


class FeatureCache:
    """Features of one tower under one way of decoding, on any store."""

    def __init__(
        self,
        folder: str,
        identity: Mapping[str, Any],
        limits: str,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.identity = {"format": _FORMAT, **identity}
        self.limits = limits
        digest = hashlib.blake2b(to_json(self.identity), digest_size=8).hexdigest()
        self.url = join(absolute(folder), digest)
        self.storage_options = dict(storage_options or {})
        self._store: Store = open_store(self.url, self.storage_options)

    @classmethod
    def of_tower(
        cls,
        folder: str,
        fingerprint: str,
        preprocessing: Any,
        dtype: str,
        image: ImageConfig,
        storage_options: Mapping[str, Any] | None = None,
    ) -> "FeatureCache":
        """Return the cache of a tower. fingerprint: its weights' and config's; preprocessing: an images.Preprocessing.

        Limits (bytes, pixels, time) decide which images fail, not what the numbers of the others are.
        """
        pixels = preprocessing.identity()
        identity = {"clip": fingerprint, "pixels": pixels, "dtype": dtype, "fast_decode": image.fast_decode}
        return cls(folder, identity, _limits(image), storage_options)

    @classmethod
    def of_decoding(
        cls,
        folder: str,
        preprocessing: Any,
        image: ImageConfig,
        storage_options: Mapping[str, Any] | None = None,
        *,
        keeps_images: bool = False,
    ) -> "FeatureCache":
        """Return what is known of images whose features are not kept: which can be decoded, and their bytes."""
        identity = {"clip": None, "pixels": preprocessing.identity(), "fast_decode": image.fast_decode}
        kept = {"images": "kept"} if keeps_images else {}
        return cls(folder, {**identity, **kept}, _limits(image), storage_options)

    @property
    def kept_images(self) -> KeptImages | None:
        """The bytes of the images; None where they are not kept."""
        return KeptImages(join(self.url, "images"), self.storage_options) if "images" in self.identity else None

    def claim(self) -> None:
        """Write cache.json, for people. Raises StoreError."""
        url = join(self.url, "cache.json")
        if self._store.info(url) is None:
            self._store.write_atomic(url, to_json(self.identity))

    def write(self, rows: pa.Table) -> None:
        """Write rows of a FeatureWorker: at most one new part each of features and failures."""
        is_image = pc.is_null(rows["reason"])
        good, bad = rows.filter(is_image), rows.filter(pc.invert(is_image))
        if good.num_rows and "features" in rows.schema.names:
            schema = feature_schema(rows.schema.field("features").type.list_size)
            self._write("features", good.select(schema.names).cast(schema))
        elif good.num_rows:
            if self.kept_images:  # before the rows that say where they are
                addresses = self.kept_images.write(_part_name(good), good[IMAGE.name])
                good = good.append_column(_ADDRESS, addresses)
            self._write("features", good.select(self._indexed.names).cast(self._indexed))
        if bad.num_rows:
            limits = pa.array([self.limits] * bad.num_rows)
            self._write("failures", bad.append_column("limits", limits).select(_FAILURES.names).cast(_FAILURES))

    def _write(self, folder: str, rows: pa.Table) -> None:
        buffer = pa.BufferOutputStream()
        pq.write_table(rows, buffer, compression="none")  # half floats do not compress
        self._store.write_atomic(join(self.url, folder, f"{_part_name(rows)}.parquet"), bytes(buffer.getvalue()))

    def num_written(self) -> int:
        """Return how many images have a row, by the names of the parts."""
        names = [name for folder in ("features", "failures") for name in self._names(folder)]
        return sum(int(name.removesuffix(".parquet").rpartition("-")[2]) for name in names)

    def _names(self, folder: str) -> list[str]:
        found = self._store.names(join(self.url, folder))
        return [name for name in found if name.startswith("part-") and name.endswith(".parquet")]

    def index(self) -> "FeatureIndex":
        """Return the versions of images in the cache. Raises JobError for a part that cannot be read."""
        names, columns = self._names("features"), self._indexed.names
        parts = [
            rows.append_column("part", pa.array(np.full(rows.num_rows, number, np.int32))).append_column(
                "row", pa.array(np.arange(rows.num_rows, dtype=np.int32))
            )
            for number, rows in enumerate(self._read_all("features", names, columns))
        ]
        empty = pa.schema([*self._indexed, pa.field("part", pa.int32()), pa.field("row", pa.int32())]).empty_table()
        rows = pa.concat_tables([empty, *parts]).combine_chunks()
        if self.kept_images:
            kept = pc.list_element(pc.split_pattern(rows["address"], "#"), 0)
            rows = rows.filter(pc.is_in(kept, pa.array(self.kept_images.names(), pa.string())))
        return FeatureIndex(names, rows, self._failures())

    @property
    def _indexed(self) -> pa.Schema:
        """The columns of a row, without the features."""
        return pa.schema([*_VERSIONED, *([_ADDRESS] if self.kept_images else [])])

    def _failures(self) -> pa.Table:
        """Return the failures under the current limits."""
        found = [_FAILURES.empty_table(), *self._read_all("failures", self._names("failures"), _FAILURES.names)]
        rows = pa.concat_tables(found).combine_chunks()
        return rows.filter(pc.equal(rows["limits"], self.limits))

    def _read_all(self, folder: str, names: Sequence[str], columns: Sequence[str]) -> list[pa.Table]:
        with ThreadPoolExecutor(_READERS) as threads:
            return list(threads.map(lambda name: self.read_part(folder, name, columns), names))

    def read_part(self, folder: str, name: str, columns: Sequence[str]) -> pa.Table:
        """Return some columns of a part. Raises JobError for a damaged part."""
        url = join(self.url, folder, name)
        try:
            with open_parquet_file(self._store.open(url)) as file:
                return file.read(columns=list(columns)).select(list(columns)).replace_schema_metadata()
        except (pa.ArrowException, KeyError) as error:
            raise JobError(
                f"{redact(url)} cannot be read: {error}; remove it, and its images are computed again"
            ) from error

    def read_features(self, name: str, rows: Positions) -> npt.NDArray[np.float16]:
        """Return float16[len(rows), F] of some rows of a part of the features."""
        column = self.read_part("features", name, ["features"])["features"].combine_chunks()
        width = column.type.list_size
        values: npt.NDArray[np.float16] = column.values.to_numpy().reshape(-1, width)
        return values[column.offset : column.offset + len(column)][rows]

    def set_versions(self, index: "FeatureIndex", places: Positions, versions: Sequence[str]) -> None:
        """Copy these rows of the index to other versions: the file changed, its images did not."""
        old = index.rows.take(pa.array(places))
        parts = old["part"].to_numpy()
        for part in sorted(set(parts.tolist())):
            here = np.flatnonzero(parts == part)
            rows = old.take(pa.array(here))
            new = {"version": pa.array([versions[place] for place in here.tolist()])}
            if self.identity["clip"] is None:
                kept = rows.select(self._indexed.names).set_column(2, "version", new["version"])
                self._write("features", kept.cast(self._indexed))
                continue
            values = self.read_features(index.parts[part], rows["row"].to_numpy())
            schema = feature_schema(values.shape[1])
            new["features"] = features_array(values)
            self._write(
                "features", pa.table([new[name] if name in new else rows[name] for name in schema.names], schema)
            )


def _limits(image: ImageConfig) -> str:
    return f"{image.max_image_bytes} bytes, {image.max_image_pixels} pixels"


def _part_name(rows: pa.Table) -> str:
    """Return the name of a part with these images, without an ending."""
    named = hashlib.blake2b(digest_size=12)
    for name in _KEY:
        named.update("\n".join(rows[name].to_pylist()).encode())
    return f"part-{named.hexdigest()}-{rows.num_rows}"


def features_array(values: npt.NDArray[np.float16]) -> pa.Array:
    """Return fixed-size lists of float16[B, F]."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, type=feature_schema(values.shape[1]).field("features").type)


@dataclass(frozen=True)
class FeatureIndex:
    """Contents of a cache: the version of each row, the place of its numbers, and the failures."""

    parts: Sequence[str]
    rows: pa.Table
    failures: pa.Table

    def find(self, sources: pa.Array, versions: pa.Array) -> Positions:
        """Return the row of each image in this version, -1 for none."""
        return _find(self.rows, sources, versions)

    def failures_of(self, sources: pa.Array, versions: pa.Array, *, are_final: bool) -> pa.Table:
        """Return reason and detail of each image in this version, null where it has not failed.

        are_final: leave out failures that a retry may resolve.
        """
        rows = self.failures.select([*_KEY, "reason", "detail"])
        if are_final:
            transient = pa.array([str(reason) for reason in TRANSIENT_REASONS])
            rows = rows.filter(pc.invert(pc.is_in(rows["reason"], transient)))
        places = _find(rows, sources, versions)
        return rows.select(["reason", "detail"]).take(pa.array(places, mask=places < 0))

    def digests(self, sources: Iterable[str]) -> dict[str, tuple[int, str]]:
        """Return the place and digest of the last row of each of these images that has a digest."""
        wanted = pc.and_(
            pc.is_in(self.rows["source"], pa.array(sources, pa.string())), pc.is_valid(self.rows["digest"])
        )
        places = np.flatnonzero(wanted.to_numpy())
        found = self.rows.take(pa.array(places))
        pairs = zip(places.tolist(), found["digest"].to_pylist(), strict=True)
        return dict(zip(found["source"].to_pylist(), pairs, strict=True))


def _find(rows: pa.Table, sources: pa.Array, versions: pa.Array) -> Positions:
    known, asked = (_joined(*pair) for pair in ((rows["source"], rows["version"]), (sources, versions)))
    places: Positions = pc.fill_null(pc.index_in(asked, value_set=_whole(known)), -1).to_numpy().astype(np.int64)
    return places


def _joined(sources: Any, versions: Any) -> Any:
    long = pa.large_string()  # a column of ten million URIs is longer than 2 GiB
    return pc.binary_join_element_wise(sources.cast(long), versions.cast(long), pa.scalar("\n", long))


def _whole(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
