"""Feature extraction on a real Ray: the captioner's numbers, each image once, what fails counted; and on real S3."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from captioner.captioning.decode_worker import DecodeWorker
from captioner.cluster.feature_pipeline import compute_features
from captioner.cluster.session import joined_cluster
from captioner.config import ImageConfig, LabelsConfig, ModelConfig, ResourceConfig
from captioner.model.bundle import describe
from captioner.training.features.examples import FeatureSet, gather
from captioner.training.features.feature_plan import VERSION_COLUMNS, FeaturePlan, plan_features
from captioner.training.features.feature_worker import FeatureWorker
from captioner.training.labels.labels import read_labels
from tests.conftest import Bucket
from tests.sample_images import BROKEN, encoded
from tests.unit.model import tiny_models

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own sockets, when a driver leaves its cluster
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray Data copies its own deprecated settings
]
NUM_IMAGES = 40
IMAGE = ImageConfig(max_image_pixels=50_000)


@pytest.fixture(autouse=True)
def local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTIONER_CACHE", str(tmp_path / "local"))


def images() -> dict[str, bytes]:
    broken = {f"broken-{reason}.jpg": data for reason, data in BROKEN.items()}
    return {f"{number:03}.jpg": encoded(seed=number) for number in range(NUM_IMAGES)} | broken


def captions(names: Mapping[str, bytes]) -> bytes:
    rows = [
        {"image": name, "caption": f"an image {name}", "split": "val" if "7" in name else "train"} for name in names
    ]
    return "\n".join(json.dumps(row) for row in rows).encode()


def plan(labels_path: str, run_folder: str, bundle: str, options: dict[str, object] | None = None) -> FeaturePlan:
    config = LabelsConfig(labels_path=labels_path, max_failed_share=0.3, storage_options=options or {})
    labels = read_labels(config, run_folder, options)
    described = describe(bundle)
    return plan_features(labels, described, ModelConfig(), IMAGE, run_folder=run_folder, output_options=options)


def compute_here(planned: FeaturePlan, bundle: str) -> list[str]:
    """Do what the stream does, in this process; return the names of the images that were decoded."""
    model = describe(bundle)
    decode, encode = (
        DecodeWorker(planned.job, model.preprocessing, VERSION_COLUMNS),
        FeatureWorker(model.clip, ModelConfig()),
    )
    tables = [table for piece in planned.slices() for table in planned.reader.read(piece)]
    for table in tables:
        planned.cache.write(encode(decode(table)))
    return [name for table in tables for name in table["image_id"].to_pylist()]


def compute_on_ray(planned: FeaturePlan, bundle: str) -> FeatureSet:
    with joined_cluster() as cluster:
        return compute_features(planned, describe(bundle), ResourceConfig(), cluster)


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray")
def test_a_job_computes_each_image_once_as_one_process_would(tmp_path: Path, bundle: str) -> None:
    for name, data in images().items():
        (tmp_path / name).write_bytes(data)
    labels = tmp_path / "captions.jsonl"
    labels.write_bytes(captions(images()))
    features = compute_on_ray(plan(str(labels), str(tmp_path / "run"), bundle), bundle)
    assert (features.num_computed, features.num_reused) == (NUM_IMAGES, 0)
    assert features.failed == dict.fromkeys(BROKEN, 1)
    assert not list((tmp_path / "run" / "listing").iterdir())

    here = plan(str(labels), str(tmp_path / "here"), bundle)
    compute_here(here, bundle)
    alone = gather(here, tiny_models.CLIP_WIDTH)
    for split in ("train", "validation"):
        assert features.load(split).image_ids == alone.load(split).image_ids
        assert np.array_equal(features.load(split).features, alone.load(split).features)

    again = plan(str(labels), str(tmp_path / "run"), bundle)
    assert len(again.missing) == 0
    assert compute_on_ray(again, bundle).num_reused == NUM_IMAGES


def test_labels_images_and_features_on_s3_know_what_was_touched(s3: Bucket, bundle: str) -> None:
    for name, data in images().items():
        s3.put(f"data/{name}", data)
    labels = s3.put("data/captions.jsonl", captions(images()))
    run_folder = f"{s3.url}/fits/one"
    assert len(compute_here(plan(labels, run_folder, bundle, s3.storage_options), bundle)) == len(images())
    again = plan(labels, run_folder, bundle, s3.storage_options)
    assert len(again.missing) == 0
    before = gather(again, tiny_models.CLIP_WIDTH).load("train")
    s3.put("data/003.jpg", encoded(seed=99))
    touched = plan(labels, run_folder, bundle, s3.storage_options)
    assert compute_here(touched, bundle) == ["003.jpg"]
    after = gather(touched, tiny_models.CLIP_WIDTH).load("train")
    differs = (before.features != after.features).any(axis=1)
    assert [name for name, other in zip(after.image_ids, differs, strict=True) if other] == ["003.jpg"]
