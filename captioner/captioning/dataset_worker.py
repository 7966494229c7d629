"""Captions beside the rows of any table: the worker behind `captioner.caption`. A plain class, tested without Ray.

Rows in = rows out, in order, with their own columns as they were and those of `caption_fields` after them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from captioner.caption_columns import CAPTION_COLUMNS, Caption
from captioner.config import DecodingConfig, ImageConfig, InputConfig, ModelConfig, ScoringConfig
from captioner.errors import InputError
from captioner.inputs import Fetcher
from captioner.schema import Reject

__all__ = ["DatasetCaptioner", "DatasetOptions", "caption_fields", "check_columns"]

_HERE = "/"  # URIs of a table in memory are this user's own, as those of a local list


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """What is captioned, and by what."""

    column: str
    id_column: str | None = None
    model: ModelConfig
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)


def caption_fields() -> list[pa.Field]:
    """Return the columns that a table gets: those of a caption, null where there is none, and why there is none."""
    columns = [pa.field(column.name, column.type) for column in CAPTION_COLUMNS]
    return [*columns, pa.field("reason", pa.string()), pa.field("detail", pa.string())]


def check_columns(names: Sequence[str], options: DatasetOptions) -> None:
    """Raise InputError for a table without the columns that are asked for, or with one that it is to get."""
    for column in (options.column, options.id_column):
        if column is not None and column not in names:
            raise InputError(f"the dataset has no column {column}; expected one of {', '.join(names)}")
    if taken := sorted({one.name for one in caption_fields()} & set(names)):
        raise InputError(
            f"the dataset has {', '.join(taken)} already, as captions would be named; expected other names, as"
            " dataset.rename_columns gives them"
        )


class DatasetCaptioner:
    """Captions the images in one column of tables."""

    def __init__(self, options: DatasetOptions) -> None:
        from captioner.captioning.captioner import Captioner  # here, not above: it brings torch

        self._options = options
        self._captioner = Captioner.from_bundle(
            options.model,
            options.decoding,
            image=options.image,
            scoring=options.scoring,
            storage_options=options.model.model_storage_options,
        )
        self._fetcher = Fetcher(_HERE, InputConfig(storage_options=dict(options.storage_options)), options.image)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return the rows with their captions. Raises InputError for a column that holds no images."""
        check_columns(rows.column_names, self._options)
        images = self._images(_values(rows.column(self._options.column)))
        readable = [place for place, image in enumerate(images) if not isinstance(image, Reject)]
        ids = self._ids(rows, images)
        captions = self._captioner.caption([images[place] for place in readable], ids and [ids[p] for p in readable])
        outcomes: dict[int, Caption | Reject] = dict(zip(readable, captions, strict=True))
        found: list[Caption | Reject] = [outcomes.get(place, image) for place, image in enumerate(images)]
        for one in caption_fields():
            rows = rows.append_column(one, pa.array([_value(outcome, one.name) for outcome in found], one.type))
        return rows

    def _images(self, values: Sequence[Any]) -> list[Any]:
        """Return an image or a reject of each value: URIs are fetched, a null is an image that is empty.

        Raises InputError for a value that is none of these."""
        for value in values:
            if not (value is None or isinstance(value, str | bytes | np.ndarray)):
                raise InputError(
                    f"the column {self._options.column} has a {type(value).__name__}; expected images: texts that name "
                    "them, bytes, structs of either, or tensors"
                )
        uris = {place: str(value) for place, value in enumerate(values) if isinstance(value, str)}
        fetched = dict(zip(uris, self._fetcher.fetch(list(uris.values())), strict=True))
        return [fetched.get(place, b"" if value is None else value) for place, value in enumerate(values)]

    def _ids(self, rows: pa.Table, images: Sequence[Any]) -> list[str] | None:
        """Return what draws of sampled captions depend on: the ids, else the images themselves. None without draws."""
        if not self._options.decoding.is_drawn:
            return None
        if self._options.id_column is not None:
            return [str(value) for value in rows.column(self._options.id_column).to_pylist()]
        return [_digest(image) for image in images]


_COLUMNS = {column.name: column for column in CAPTION_COLUMNS}


def _value(outcome: Caption | Reject, name: str) -> Any:
    if isinstance(outcome, Reject):
        return str(getattr(outcome, name)) if name in ("reason", "detail") else None
    return _COLUMNS[name].value(outcome) if name in _COLUMNS else None


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Return the images of a column: texts, bytes, those of Hugging Face's structs, or arrays of Ray's tensors."""
    if isinstance(column.type, pa.BaseExtensionType):
        return [value for chunk in column.chunks for value in chunk.to_numpy(zero_copy_only=False)]
    return [_of_struct(value) if isinstance(value, dict) else value for value in column.to_pylist()]


def _of_struct(value: Mapping[str, Any]) -> Any:
    return value.get("bytes") if value.get("bytes") is not None else value.get("path")


def _digest(image: Any) -> str:
    if isinstance(image, Reject):
        return ""
    data = np.ascontiguousarray(image).data if isinstance(image, np.ndarray) else image
    return hashlib.blake2b(data, digest_size=16).hexdigest()
