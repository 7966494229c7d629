"""What a stream of pixels asks Ray Data for, and how its rows become batches again. Without Ray."""

import numpy as np
import pyarrow as pa
import pytest

from captioner.captioning.resources import Cluster
from captioner.cluster import pixel_stream
from captioner.cluster.training_group import training_group
from captioner.config import FitResourceConfig
from captioner.errors import JobError
from captioner.schema import source_schema

IMAGES = pa.table({"image_id": [f"{n}.png" for n in range(600)], "uri": [f"/images/{n}.png" for n in range(600)]})


def test_a_block_holds_the_images_in_the_order_of_the_steps_with_their_places_as_keys():
    rows = np.random.default_rng(0).permutation(600)
    blocks = [pixel_stream._source_rows(IMAGES, rows, start) for start in (0, 256, 512)]
    assert [block.num_rows for block in blocks] == [256, 256, 88]
    assert all(block.schema == source_schema() for block in blocks)
    whole = pa.concat_tables(blocks)
    assert whole["key"].to_pylist() == list(range(600))
    assert whole["uri"].to_pylist() == [f"/images/{n}.png" for n in rows]


def test_rows_become_batches_of_the_sizes_that_were_asked_for():
    tables = iter([pa.table({"key": list(part)}) for part in (range(5), range(5, 6), range(6, 17))])
    found = [table["key"].to_pylist() for table in pixel_stream._cut(tables, [2, 6, 1, 8])]
    assert found == [[0, 1], [2, 3, 4, 5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16]]


def test_a_long_fit_is_several_runs_of_ray_data_without_a_batch_lost(monkeypatch):
    monkeypatch.setattr(pixel_stream, "_SEGMENT_ROWS", 10)
    batches = [np.arange(start, start + 4) for start in range(0, 32, 4)]
    segments = list(pixel_stream._segments(batches))
    assert [len(segment) for segment in segments] == [3, 3, 2]
    assert np.concatenate([batch for segment in segments for batch in segment]).tolist() == list(range(32))


def test_an_image_that_cannot_be_read_any_more_ends_the_step_with_its_name():
    rows = pa.table({"image_id": ["a", "b"], "reason": [None, "missing"], "detail": [None, "no such file"]})
    with pytest.raises(JobError, match=r"^b could be decoded before the fit .* \(missing: no such file\); restore it"):
        pixel_stream._check_read(rows)
    pixel_stream._check_read(rows.slice(0, 1))


@pytest.mark.parametrize(
    ("cpus", "gpus", "flags", "expected"),
    [
        (2, 0, {}, (1, 1.0, 1, 0.9)),
        (2, 0, {"workers": "2"}, (2, 0.5, 1, 0.5)),
        (16, 0, {}, (1, 12.0, 4, 0.9)),
        (16, 1, {}, (1, 1.0, 16, 0.9)),
        (64, 8, {}, (8, 1.0, 7, 0.9)),
        (16, 0, {"cpu_workers": "6"}, (1, 10.0, 6, 0.9)),
    ],
)
def test_decode_workers_have_cpus_beside_each_worker_that_fits(cpus, gpus, flags, expected):
    group = training_group(FitResourceConfig(**flags), Cluster(cpus=cpus, gpus=gpus), streams_pixels=True)
    assert (group.most, group.cpus, group.decoders, group.decoder_cpus) == pytest.approx(expected)
    assert group.most * (group.cpus + group.decoders * group.decoder_cpus) <= cpus + 1e-6


def test_a_worker_reserves_its_decode_workers_so_that_a_node_that_is_left_takes_no_more_than_it_can_feed():
    nodes = Cluster(cpus=4, gpus=0, node_cpus=(2, 2))
    group = training_group(FitResourceConfig(workers="1:2"), nodes, streams_pixels=True)
    assert group.scaling().resources_per_worker == {"CPU": 1.9}
    one = training_group(FitResourceConfig(workers="1"), nodes, streams_pixels=True)
    assert (one.cpus, one.reserved_cpus) == (1.0, 1.9), "no worker spans two nodes"
    assert training_group(FitResourceConfig(workers="1"), nodes).reserved_cpus == 2
    card = training_group(FitResourceConfig(), Cluster(cpus=16, gpus=1), streams_pixels=True)
    assert card.scaling().resources_per_worker == {"CPU": 1.0, "GPU": 1.0}, "decode workers may be on other nodes"
