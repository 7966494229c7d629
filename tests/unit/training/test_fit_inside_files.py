"""A fit on patches of images inside tars and Parquet files: their bytes are kept, its weights are those of files."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from captioner.config import ImageConfig, LabelsConfig, ModelConfig
from captioner.model.bundle import describe
from captioner.schema import Reject
from captioner.training.features.examples import gather
from captioner.training.features.feature_plan import plan_features
from captioner.training.features.kept_images import KeptImages
from captioner.training.labels.labels import read_labels
from tests.bundles import save_tiny_bundle
from tests.faults.fit_without_ray import check_images, fitted_without_ray
from tests.labelled_scenes import pack_parquet, pack_tar, write_labels
from tests.unit.model import tiny_models

NUM_IMAGES = {"train": 24, "validation": 6}
KINDS = {"labels.tar": pack_tar, "labels.tar.gz": pack_tar, "labels.parquet": pack_parquet}


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """Images in files, one of them broken, and in each kind of file that holds images."""
    folder = tmp_path_factory.mktemp("labels")
    rows = write_labels(folder, NUM_IMAGES)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with rows.open("a") as lines:
        lines.write(json.dumps({"image": "broken.png", "captions": ["nothing"], "split": "train"}) + "\n")
    for name, pack in KINDS.items():
        pack(rows, folder / name)
    return rows


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return str(tiny_models.save_clip(folder / "clip")), str(tiny_models.save_llama(folder / "llama"))


def fitted(labels, parts, folder):
    models = ["--clip", parts[0], "--llama", parts[1], "--max-failed-share", "0.1"]
    rung = ["--image-features", "patches", "--projector", "query", "--image-tokens", "2"]
    steps = ["--batch-size", "8", "--max-steps", "6", "--num-scored-images", "2", "--max-caption-tokens", "8"]
    arguments = [str(labels), str(folder / "bundle"), *models, *rung, *steps]
    output = fitted_without_ray(arguments, folder / "features")
    return torch.load(output / "_run" / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def of_files(labels, parts, tmp_path_factory):
    return fitted(labels, parts, tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("name", KINDS)
def test_a_fit_on_patches_of_images_inside_a_file_has_the_weights_of_one_on_their_files(
    labels, parts, of_files, tmp_path, name
):
    found = fitted(labels.parent / name, parts, tmp_path)
    assert found["weights"].keys() == of_files["weights"].keys()
    assert all(torch.equal(weight, of_files["weights"][name]) for name, weight in found["weights"].items())
    assert found["best"]["captions"] == of_files["best"]["captions"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return describe(save_tiny_bundle(tmp_path_factory.mktemp("bundle")))


def plan_of(path, model, folder):
    found = read_labels(LabelsConfig(labels_path=str(path), max_failed_share=0.1), str(folder))
    kept = {"run_folder": str(folder), "keeps_features": False}
    return plan_features(found, model, ModelConfig(), ImageConfig(), **kept)


def checked(path, model, folder):
    """The names of the images that were read, and all that is known afterwards."""
    plan = plan_of(path, model, folder)
    return check_images(plan, model.preprocessing) if len(plan.missing) else [], gather(plan, 0), plan.labels


@pytest.mark.parametrize("name", KINDS)
def test_the_bytes_of_each_image_inside_a_file_are_kept_and_one_that_is_broken_is_left_out(
    labels, model, tmp_path, name
):
    names, features, table = checked(labels.parent / name, model, tmp_path)
    assert len(names) == sum(NUM_IMAGES.values()) + 1
    assert features.failed == {"corrupt": 1}
    rows = [json.loads(line) for line in labels.read_text().splitlines()]
    for split, count in NUM_IMAGES.items():
        images = [row["image"] for row in rows if row["split"] == split][:count]
        found = features.cache.kept_images.fetch(features.images_of(split, table)["uri"].to_pylist())
        assert found == [(labels.parent / image).read_bytes() for image in images]
    assert checked(labels.parent / name, model, tmp_path)[0] == []


def test_a_file_that_is_rewritten_costs_the_images_that_differ_and_bytes_that_are_lost_are_kept_again(
    labels, model, tmp_path
):
    rows = [json.loads(line) for line in labels.read_text().splitlines()][:9]
    copy = tmp_path / "copy.jsonl"
    for row in rows:
        (tmp_path / row["image"]).write_bytes((labels.parent / row["image"]).read_bytes())
    copy.write_text("\n".join(json.dumps(row) for row in rows))
    tar, run_folder = tmp_path / "labels.tar", tmp_path / "run"
    pack_tar(copy, tar)
    checked(tar, model, run_folder)
    (tmp_path / rows[4]["image"]).write_bytes((tmp_path / rows[5]["image"]).read_bytes())
    pack_tar(copy, tar)
    os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 10_000_000_000))
    names, after, table = checked(tar, model, run_folder)
    assert names == [f"labels.tar/{rows[4]['image']}"]
    kept = after.cache.kept_images
    addresses = after.images_of("train", table)["uri"].to_pylist()
    assert kept.fetch(addresses) == [(tmp_path / row["image"]).read_bytes() for row in rows]

    lost = Path(kept.url.removeprefix("file://")) / addresses[4].partition("#")[0]
    lost.unlink()
    [reject] = kept.fetch(addresses[4:5])
    assert isinstance(reject, Reject)
    assert (reject.reason, lost.name in reject.detail) == ("missing", True)
    assert checked(tar, model, run_folder)[0] == names


def test_kept_images_are_cut_into_parts_and_read_by_ranges(tmp_path, monkeypatch):
    monkeypatch.setattr("captioner.training.features.kept_images._PART_BYTES", 10)
    kept = KeptImages(str(tmp_path / "images"), {})
    images = [b"one", b"three", b"eleven bytes", b"", b"last"]
    addresses = kept.write("part-x", pa.chunked_array([images], pa.large_binary())).to_pylist()
    assert [address.partition("#")[0] for address in addresses] == [
        f"part-x-{number}.bin" for number in (0, 0, 1, 2, 2)
    ]
    assert kept.names() == ["part-x-0.bin", "part-x-1.bin", "part-x-2.bin"]
    assert kept.fetch(addresses[::-1]) == images[::-1]
