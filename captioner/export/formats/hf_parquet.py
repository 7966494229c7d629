"""`hf`: Parquet that Hugging Face's datasets reads: `image` with the Image feature, `text`, and the columns.

The features stand in the footer, where datasets looks for them. With --no-images there is no `image`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.errors import ConfigError
from captioner.export.request import ExportFormat, Request, Shard
from captioner.export.samples import image_suffix, sample_name, samples

__all__ = ["HF"]

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_NAME, _TEXT = "_image_id", "_text"  # beside the exported columns, whatever those are called
_GROUP_BYTES = 64 << 20
_GROUP_ROWS = 10_000
_DTYPES = {"float": "float32", "double": "float64", "halffloat": "float16"}


def _columns(request: Request) -> Mapping[str, str]:
    others = _others(request)
    if maps := [name for name in others if "MAP(" in request.kinds.get(name, "")]:
        raise ConfigError(
            f"column {maps[0]} is a {request.kinds[maps[0]]}, and datasets has no maps; expected --columns without it,"
            " or --format hf-folder"
        )
    return {_NAME: "image_id", _TEXT: request.text, **others}


def _others(request: Request) -> dict[str, str]:
    """Return the exported columns beside image and text."""
    return {name: sql for name, sql in request.selected().items() if name not in ("image", "text")}


def _write(shard: Shard) -> None:
    shard.publish(HF.file_of(shard.number), lambda file: _write_groups(shard, file))


def _write_groups(shard: Shard, file: IO[bytes]) -> None:
    schema = _schema(shard.schema(), list(_others(shard.request)), has_images=shard.request.config.images)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for group in _groups(shard):
            writer.write_table(pa.Table.from_pylist(group, schema))


def _groups(shard: Shard) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each row group, as few as hold 64 MB of images."""
    group: list[dict[str, Any]] = []
    size_bytes = 0
    for row, image in samples(shard):
        path = sample_name(row["key"]) + image_suffix(row[_NAME], image)
        group.append({**row, "text": row[_TEXT], "image": {"bytes": image, "path": path}})
        size_bytes += len(image)
        if size_bytes >= _GROUP_BYTES or len(group) == _GROUP_ROWS:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group


def _schema(found: pa.Schema, names: Sequence[str], *, has_images: bool) -> pa.Schema:
    """Return the schema of the file, with datasets' features in its metadata."""
    others = [found.field(name) for name in names]
    image = [pa.field("image", _IMAGE)] if has_images else []
    fields = [*image, pa.field("text", pa.string()), *others]
    features = {field.name: _feature(field.type) for field in fields}
    features |= {"image": {"_type": "Image"}} if has_images else {}
    return pa.schema(fields, {b"huggingface": json.dumps({"info": {"features": features}}).encode()})


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """Return what datasets calls an Arrow type."""
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_date(kind):
        return {"dtype": f"date{kind.bit_width}", "_type": "Value"}
    return {"dtype": _DTYPES.get(str(kind), str(kind)), "_type": "Value"}


HF = ExportFormat(
    name="hf",
    help="Parquet for datasets.load_dataset, with the Image feature; with --no-images texts alone",
    columns=_columns,
    write=_write,
    file="data/train-{:05d}.parquet",
    has_columns=True,
    has_several=True,
    reads_images=True,
    goes_to_hub=True,
)
