"""A further output column is one entry: it is computed, written and summarized, here one from outside the package."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.caption_columns import CAPTION_COLUMNS, Caption, CaptionColumn
from captioner.captioning.caption_worker import CaptionWorker
from captioner.captioning.decode_worker import DecodeWorker
from captioner.config import CaptionJobConfig, DecodingConfig, ModelConfig, QueryConfig
from captioner.model.bundle import describe
from captioner.query import query
from captioner.schema import captions_schema, source_schema
from captioner.tables import Stamp
from tests.caption_tables import begin_table, write_images
from tests.sample_images import encoded


@pytest.fixture
def num_letters() -> Iterator[CaptionColumn]:
    column = CaptionColumn(
        name="num_letters", type=pa.int32(), compute=lambda caption: len(caption.caption), mean_name="mean_letters"
    )
    CAPTION_COLUMNS.append(column)
    yield column
    CAPTION_COLUMNS.remove(column)


def captioned_rows(bundle: str, decoding: DecodingConfig) -> pa.Table:
    config = CaptionJobConfig(output="out", model=ModelConfig(model=bundle), decoding=decoding)
    rows = [{"key": key, "image_id": str(key), "attempt": 1, "data": encoded(seed=key)} for key in range(3)]
    rows.append({"key": 3, "image_id": "3", "attempt": 1, "data": b""})
    worker = CaptionWorker(config)
    decoded = DecodeWorker(config, describe(bundle).preprocessing)(pa.Table.from_pylist(rows, source_schema()))
    captioned = worker(decoded)
    worker.captioner.close()
    return captioned


@pytest.mark.usefixtures("num_letters")
def test_a_column_is_added_by_one_entry_and_is_computed_written_and_summarized(bundle: str, tmp_path: Path) -> None:
    captioned = captioned_rows(bundle, DecodingConfig(max_new_tokens=6, do_sample=True, num_captions=2))
    letters = [None if caption is None else len(caption) for caption in captioned["caption"].to_pylist()]
    assert captioned["num_letters"].to_pylist() == letters
    assert letters[3] is None
    for candidate in captioned["candidates"][0].as_py():
        assert candidate["num_letters"] == len(candidate["caption"])

    table, _ = begin_table(str(tmp_path / "out"), str(write_images(tmp_path / "images", 4)))
    table.write(captioned, Stamp("run-1", table.digest))
    [part] = (tmp_path / "out" / "captions").iterdir()
    assert pq.read_schema(part).remove_metadata() == captions_schema()
    assert pq.read_table(part)["num_letters"].to_pylist() == letters[:3]
    summary = query(QueryConfig(table=str(tmp_path / "out")))
    assert summary["mean_letters"] == pytest.approx(sum(filter(None, letters)) / 3, abs=1e-6)


def test_the_columns_of_a_caption_on_disk_stay_what_they_are() -> None:
    caption = pa.struct(
        [
            pa.field("caption", pa.string(), nullable=False),
            pa.field("num_tokens", pa.int32(), nullable=False),
            pa.field("finish_reason", pa.string(), nullable=False),
            pa.field("mean_logprob", pa.float32(), nullable=False),
            pa.field("min_logprob", pa.float32(), nullable=False),
            pa.field("clip_score", pa.float32()),
            pa.field("is_repetitive", pa.bool_(), nullable=False),
        ]
    )
    schema = captions_schema()
    assert [schema.field(field.name) for field in caption] == list(caption)
    assert schema.field("candidates").type.value_type == caption


def test_a_column_is_an_attribute_of_the_caption_unless_it_says_how_it_is_computed() -> None:
    caption = Caption(caption="a dog dog dog", num_tokens=4, finish_reason="stop", mean_logprob=-1.0, min_logprob=-2.0)
    row = {column.name: column.value(caption) for column in CAPTION_COLUMNS}
    assert row["num_tokens"] == 4
    assert row["clip_score"] is None
    assert row["is_repetitive"]
