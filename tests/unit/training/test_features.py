"""The feature cache: the captioner's own numbers, computed once, and what makes which of them be computed again."""

import json
import os
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from captioner.captioning.decode_worker import DecodeWorker
from captioner.captioning.resources import Cluster
from captioner.cluster.feature_pipeline import compute_features
from captioner.config import ImageConfig, LabelsConfig, ModelConfig, ResourceConfig
from captioner.errors import InputError, JobError
from captioner.images import Decoded, Decoder, Preprocessing
from captioner.model.bundle import BundleDescription, describe, load
from captioner.training.features.examples import FeatureSet, gather
from captioner.training.features.feature_plan import VERSION_COLUMNS, FeaturePlan, plan_features
from captioner.training.features.feature_worker import FeatureWorker
from captioner.training.labels.labels import read_labels
from tests.bundles import save_tiny_bundle
from tests.sample_images import BROKEN, encoded
from tests.unit.model import tiny_models

IMAGE = ImageConfig(max_image_pixels=50_000)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def model(bundle: str) -> BundleDescription:
    return describe(bundle)


@pytest.fixture(autouse=True)
def local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTIONER_CACHE", str(tmp_path / "local"))


def plan(
    labels_path: object, run_folder: Path, model: BundleDescription, image: ImageConfig = IMAGE, **options: Any
) -> FeaturePlan:
    folders = {name: options.pop(name) for name in ("features_folder",) if name in options}
    config = LabelsConfig(labels_path=str(labels_path), **{"max_failed_share": 0.5, **options})
    labels = read_labels(config, str(run_folder))
    return plan_features(labels, model, ModelConfig(), image, run_folder=str(run_folder), **folders)


def compute(planned: FeaturePlan, model: BundleDescription, num_slices: int | None = None) -> list[str]:
    """Do what the stream does, here, slice by slice; return the names of the images that were decoded."""
    decode = DecodeWorker(planned.job, model.preprocessing, VERSION_COLUMNS)
    encode = FeatureWorker(model.clip, ModelConfig())
    names: list[str] = []
    for piece in planned.slices()[:num_slices]:
        for table in planned.reader.read(piece):
            names += table["image_id"].to_pylist()
            planned.cache.write(encode(decode(table)))
    return names


def run(
    labels_path: object, run_folder: Path, model: BundleDescription, image: ImageConfig = IMAGE, **options: Any
) -> tuple[list[str], FeatureSet]:
    planned = plan(labels_path, run_folder, model, image, **options)
    names = compute(planned, model) if len(planned.missing) else []
    return names, gather(planned, tiny_models.CLIP_WIDTH)


def folder_of(folder: Path, images: Mapping[str, bytes]) -> Path:
    """Write images and a captions.jsonl that puts all of them into train, and one more into validation."""
    folder.mkdir(exist_ok=True)
    rows = [{"image": name, "caption": f"an image {name}", "split": "train"} for name in images]
    rows[-1]["split"] = "validation"
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for name, data in images.items():
        (folder / name).write_bytes(data)
    return folder


def sample_images(count: int = 5) -> dict[str, bytes]:
    return {f"{number}.jpg": encoded(seed=number) for number in range(count)}


def touch(path: Path, data: bytes) -> None:
    """Write another content, at a time that differs by far more than the clock of any file system."""
    path.write_bytes(data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10_000_000_000))


def expected(bundle: str, images: Sequence[bytes]) -> np.ndarray:
    """What the caption job's model sees in these images: its own decode, its own `features`, batches of eight."""
    loaded = load(bundle)
    found = []
    with Decoder(Preprocessing.from_config(loaded.preprocessing), IMAGE) as decoder:
        for data in images:
            decoded = decoder.decode(data)
            assert isinstance(decoded, Decoded)
            found.append(torch.from_numpy(decoded.pixels.copy()))
    padded = torch.stack([*found, *[torch.zeros_like(found[0])] * (8 - len(found))])
    return loaded.features(padded)[: len(found)].half().numpy()


def test_features_are_those_that_the_captioner_sees(tmp_path: Path, bundle: str, model: BundleDescription) -> None:
    images = sample_images()
    _, features = run(folder_of(tmp_path / "images", images), tmp_path / "run", model)
    train, validation = features.load("train"), features.load("validation")
    assert np.array_equal(
        np.concatenate([train.features, validation.features]), expected(bundle, list(images.values()))
    )
    assert train.image_ids == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert (validation.captions, len(validation)) == ([["an image 4.jpg"]], 1)
    assert (features.num_features, train.features.dtype) == (tiny_models.CLIP_WIDTH, np.float16)
    assert features.counts == {"train": (4, 4), "validation": (1, 1), "test": (0, 0)}
    assert features.load("test").features.shape == (0, tiny_models.CLIP_WIDTH)


def test_examples_are_mapped_from_one_file_a_machine_and_read_only(tmp_path: Path, model: BundleDescription) -> None:
    _, features = run(folder_of(tmp_path / "images", sample_images()), tmp_path / "run", model)
    first, second = features.load("train").features, features.load("train").features
    assert isinstance(first, np.memmap)
    assert isinstance(second, np.memmap)
    assert (first.filename, first.flags.writeable) == (second.filename, False)
    assert len(list((tmp_path / "local" / "features").glob("*.npy"))) == 1


def test_the_parts_are_parquet_of_half_floats(tmp_path: Path, model: BundleDescription) -> None:
    run(folder_of(tmp_path / "images", sample_images()), tmp_path / "run", model)
    [part] = (tmp_path / "run" / "features").glob("*/features/part-*.parquet")
    table = pq.read_table(part)
    assert table.column_names == ["image_id", "source", "version", "digest", "features"]
    assert table.schema.field("features").type.value_type == pa.float16()


def test_a_rerun_computes_nothing_and_a_touched_image_is_computed_alone(
    tmp_path: Path, bundle: str, model: BundleDescription
) -> None:
    images = folder_of(tmp_path / "images", sample_images())
    names, _ = run(images, tmp_path / "run", model)
    assert sorted(names) == sorted(sample_images())
    names, again = run(images, tmp_path / "run", model)
    assert (names, again.num_computed, again.num_reused) == ([], 0, 5)
    touch(images / "2.jpg", encoded(seed=99))
    names, touched = run(images, tmp_path / "run", model)
    assert (names, touched.num_computed, touched.num_reused) == (["2.jpg"], 1, 4)
    assert np.array_equal(touched.load("train").features[2:3], expected(bundle, [encoded(seed=99)]))
    assert np.array_equal(touched.load("train").features[:2], again.load("train").features[:2])
    assert run(images, tmp_path / "run", model)[0] == []


def write_parquet(path: Path, images: Mapping[str, bytes]) -> None:
    splits = ["train"] * (len(images) - 1) + ["val"]
    columns = {"image_id": list(images), "image": list(images.values()), "caption": list(images), "split": splits}
    pq.write_table(pa.table(columns), path)


def write_tar(path: Path, images: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in images.items():
            split = "val" if name == list(images)[-1] else "train"
            text = json.dumps({"caption": f"an image {name}", "split": split}).encode()
            for member, content in ((name, data), (name.replace(".jpg", ".json"), text)):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, BytesIO(content))


@pytest.mark.parametrize(
    ("name", "write", "fourth"),
    [("labels.parquet", write_parquet, "labels.parquet#3"), ("labels.tar", write_tar, "labels.tar/3.jpg")],
)
def test_a_file_of_images_that_is_rewritten_costs_the_images_that_differ(
    name: str, write: Any, fourth: str, tmp_path: Path, bundle: str, model: BundleDescription
) -> None:
    path, images = tmp_path / name, sample_images(6)
    write(path, images)
    names, before = run(path, tmp_path / "run", model)
    assert len(names) == 6
    assert np.array_equal(before.load("train").features, expected(bundle, list(images.values())[:-1]))
    images["3.jpg"] = encoded(seed=99)
    write(path, images)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10_000_000_000))
    names, after = run(path, tmp_path / "run", model)
    assert names == [fourth]
    assert (after.num_computed, after.num_reused) == (1, 5)
    assert np.array_equal(after.load("train").features, expected(bundle, list(images.values())[:-1]))
    assert run(path, tmp_path / "run", model)[0] == []


def test_another_tower_or_way_of_decoding_is_another_cache_and_a_limit_is_not(
    tmp_path: Path, model: BundleDescription
) -> None:
    images = folder_of(tmp_path / "images", sample_images())
    first = plan(images, tmp_path / "run", model)
    compute(first, model)
    others = [
        plan(images, tmp_path / "run", replace(model, clip_fingerprint="another")),
        plan(images, tmp_path / "run", replace(model, preprocessing={**model.preprocessing, "resample": 2})),
        plan(images, tmp_path / "run", model, replace(IMAGE, fast_decode=True)),
    ]
    assert len({planned.cache.url for planned in (first, *others)}) == 4
    assert [len(planned.missing) for planned in others] == [5, 5, 5]
    same = plan(images, tmp_path / "run", replace(model, llama_fingerprint="another"), replace(IMAGE, fetch_retries=1))
    assert (same.cache.url, len(same.missing)) == (first.cache.url, 0)


def test_images_that_fail_are_counted_and_not_tried_again_until_a_limit_moves(
    tmp_path: Path, model: BundleDescription
) -> None:
    broken = {f"broken-{reason}.jpg": data for reason, data in BROKEN.items()}
    images = folder_of(tmp_path / "images", broken | sample_images(8))
    (images / "0.jpg").unlink()
    names, features = run(images, tmp_path / "run", model)
    assert len(names) == 11  # what is missing is known without a read
    assert features.failed == {"missing": 1} | dict.fromkeys(BROKEN, 1)
    assert features.counts["train"].num_images == 6
    names, again = run(images, tmp_path / "run", model)
    assert (names, again.failed) == ([], features.failed)
    names, wider = run(images, tmp_path / "run", model, replace(IMAGE, max_image_pixels=1_000_000))
    assert sorted(names) == sorted(broken)
    assert "too_many_pixels" not in wider.failed


def test_too_many_missing_images_are_an_error_before_anything_is_computed(
    tmp_path: Path, model: BundleDescription
) -> None:
    images = folder_of(tmp_path / "images", sample_images())
    for name in ("0.jpg", "1.jpg", "2.jpg"):
        (images / name).unlink()
    with pytest.raises(
        InputError, match=r"3 of 5 images of .* \(3 missing\), more than --max-failed-share 0.5; one of"
    ):
        plan(images, tmp_path / "run", model)
    with pytest.raises(InputError, match=r"2 of 2 images of .* cannot be used \(2 fetch_failed\).*wrong"):
        plan(folder_of(tmp_path / "few", sample_images(2)), tmp_path / "run", model, image_root=str(tmp_path / "wrong"))
    assert not (tmp_path / "run" / "features").exists()


def test_too_many_broken_images_are_an_error_that_keeps_what_was_computed(
    tmp_path: Path, model: BundleDescription
) -> None:
    images = folder_of(tmp_path / "images", {"x.jpg": b"no image", **sample_images(2)})
    with pytest.raises(InputError, match=r"1 of 3 images .* \(1 not_an_image\).*one of them: not_an_image: "):
        run(images, tmp_path / "run", model, max_failed_share=0.1)
    names, features = run(images, tmp_path / "run", model)
    assert (names, features.failed) == ([], {"not_an_image": 1})


def test_an_interrupted_extraction_goes_on_from_its_parts(tmp_path: Path, model: BundleDescription) -> None:
    images = folder_of(tmp_path / "images", sample_images(300))
    compute(plan(images, tmp_path / "run", model), model, num_slices=1)
    rest = plan(images, tmp_path / "run", model)
    assert len(rest.missing) == 300 - 256
    with pytest.raises(JobError, match=r"44 images of .* changed while they were read; run it again"):
        gather(rest, tiny_models.CLIP_WIDTH)
    compute(rest, model)
    assert gather(rest, tiny_models.CLIP_WIDTH).num_reused == 256


def test_runs_that_point_to_one_folder_share_its_features(tmp_path: Path, model: BundleDescription) -> None:
    images, shared = folder_of(tmp_path / "images", sample_images()), str(tmp_path / "shared")
    names, _ = run(images, tmp_path / "one", model, features_folder=shared)
    assert len(names) == 5
    (tmp_path / "some.csv").write_text("image,caption\n1.jpg,one\n2.jpg,two\n4.jpg,four\n")
    some = tmp_path / "some.csv"
    options = {"image_root": str(images), "test_share": 0, "validation_share": 0, "features_folder": shared}
    names, features = run(some, tmp_path / "two", model, **options)
    assert (names, features.num_reused) == ([], 3)
    assert features.load("train").image_ids == ["1.jpg", "2.jpg", "4.jpg"]


def test_a_remote_list_leads_to_no_local_file(tmp_path: Path, model: BundleDescription) -> None:
    secret = folder_of(tmp_path / "images", sample_images(1)) / "0.jpg"
    rows = [{"image": str(secret), "caption": "x", "split": "train"}]
    fsspec.filesystem("memory").pipe_file("/labels/rows.jsonl", json.dumps(rows[0]).encode())
    all_train = {"validation_share": 0.0}  # else the name of the folder decides the split of its one image
    with pytest.raises(InputError, match=r"\(1 unsafe_uri\).*file URIs are not followed in a remote list"):
        plan("memory://labels/rows.jsonl", tmp_path / "run", model, **all_train)
    found = plan("memory://labels/rows.jsonl", tmp_path / "run", model, allow_local_uris=True, **all_train)
    assert len(found.missing) == 1


def test_a_damaged_part_is_an_error_that_names_it(tmp_path: Path, model: BundleDescription) -> None:
    images = folder_of(tmp_path / "images", sample_images())
    run(images, tmp_path / "run", model)
    [part] = (tmp_path / "run" / "features").glob("*/features/part-*.parquet")
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(
        JobError, match=r"part-.*parquet cannot be read: .*; remove it, and its images are computed again"
    ):
        plan(images, tmp_path / "run", model)


def test_local_files_that_no_fit_has_opened_for_a_month_are_removed(tmp_path: Path, model: BundleDescription) -> None:
    folder = tmp_path / "local" / "features"
    folder.mkdir(parents=True)
    for name, days in (("old.npy", 31), ("young.npy", 29), ("old.txt", 31)):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, times=(0, time.time() - days * 86_400))
    _, features = run(folder_of(tmp_path / "images", sample_images()), tmp_path / "run", model)
    opened = features.load("train").features.filename
    os.utime(opened, times=(0, 0))
    features.load("train")
    assert {path.name for path in folder.iterdir() if path.suffix != ".lock"} == {
        "young.npy",
        "old.txt",
        Path(opened).name,
    }
    assert Path(opened).stat().st_mtime > time.time() - 3600


def test_what_names_the_examples_follows_their_images_captions_and_versions(
    tmp_path: Path, model: BundleDescription
) -> None:
    images = folder_of(tmp_path / "images", sample_images())
    first, again = (run(images, tmp_path / "run", model)[1].fingerprint for _ in range(2))
    assert first == again
    touch(images / "2.jpg", encoded(seed=99))
    touched = run(images, tmp_path / "run", model)[1].fingerprint
    (images / "captions.jsonl").write_text((images / "captions.jsonl").read_text().replace("an image 0", "a photo"))
    assert len({first, touched, run(images, tmp_path / "run", model)[1].fingerprint}) == 3


def test_a_job_that_fails_leaves_no_list_of_uris_behind(
    tmp_path: Path, model: BundleDescription, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(folder_of(tmp_path / "images", sample_images()), tmp_path / "run", model)

    def fail(failing: FeaturePlan, *_: Any) -> None:
        failing.slices()
        assert list((tmp_path / "run" / "listing").iterdir())
        raise JobError("the cluster is gone")

    monkeypatch.setattr("captioner.cluster.feature_pipeline._compute", fail)
    with pytest.raises(JobError, match="the cluster is gone"):
        compute_features(planned, model, ResourceConfig(), Cluster(cpus=2, gpus=0))
    assert not list((tmp_path / "run" / "listing").iterdir())
