"""The same fit in this process, to which one on Ray is compared bit by bit."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from captioner.captioning.decode_worker import DecodeWorker
from captioner.command_line import parse
from captioner.config import FitConfig
from captioner.images import Decoder, Preprocessing
from captioner.schema import Reject
from captioner.storage.urls import local_path
from captioner.training.features.caption_tokens import tokenize_examples
from captioner.training.features.examples import FeatureSet, gather, sampled_rows
from captioner.training.features.feature_plan import FeaturePlan
from captioner.training.features.kept_images import KeptImages
from captioner.training.fit.batches import PixelStream
from captioner.training.fit.fit_output import FitOutput
from captioner.training.fit.fit_plan import FitPlan, open_output, plan_fit
from captioner.training.fit.fit_worker import FitTask, run_fit_worker
from captioner.training.fit.initial_bundle import save_initial_bundle
from tests.unit.training.fitting_models import stream_of

__all__ = ["check_images", "fitted_without_ray"]


def fitted_without_ray(arguments: list[str], features_folder: Path, saved: bytes | None = None) -> Path:
    """Return the output, beside the features, of a fit whose features are all in the features folder.

    arguments: LABELS, OUTPUT_BUNDLE of the fit on Ray, and its flags. saved: a checkpoint to go on from. Images are
    decoded in this process."""
    config = parse(FitConfig, [*arguments, "--features", str(features_folder)])
    plan = plan_fit(config, open_output(config), str(features_folder.parent / "facts"))
    projector = plan.start.projector
    if projector.reads_patches:
        check_images(plan.features, plan.start.preprocessing)
    else:
        assert not len(plan.features.missing), "every image is there"
    features = gather(plan.features, 0 if projector.reads_patches else projector.num_features)
    output = FitOutput(str(features_folder.parent / ("continued" if saved else "alone")))
    if saved:
        output.write("checkpoint.pt", saved)
    save_initial_bundle(config, output.initial_bundle_url)
    tokens = tokenize_examples(features, plan.language, plan.start.template, config.training, output)
    pixels = _pixels(plan, features) if projector.reads_patches else {}
    run_fit_worker(FitTask(output, features, tokens, config.training, "auto", "cpu", 1, pixels), "cpu", lambda _: None)
    return Path(output.url)


def check_images(plan: FeaturePlan, preprocessing: Mapping[str, Any]) -> list[str]:
    """Do what the stream does with images of which no features are kept; return the names of those that were read."""
    decode = DecodeWorker(plan.job, preprocessing, plan.kept_columns, keeps_pixels=False)
    with plan.computing():
        tables = [table for piece in plan.slices() for table in plan.reader.read(piece)]
        for table in tables:
            plan.cache.write(decode(table))
    return [name for table in tables for name in table["image_id"].to_pylist()]


def _pixels(plan: FitPlan, features: FeatureSet) -> dict[str, PixelStream]:
    config = plan.config
    shown = {split: features.images_of(split, plan.labels) for split in ("train", "validation")}
    num_measured = config.training.num_measured_images
    shown["validation"] = shown["validation"].take(sampled_rows(shown["validation"].num_rows, num_measured))
    kept = features.cache.kept_images
    with closing(Decoder(Preprocessing.from_config(plan.start.preprocessing), config.image)) as decoder:
        decoded = {split: decoder.decode_batch(_read(rows["uri"].to_pylist(), kept)) for split, rows in shown.items()}
    return {split: stream_of(np.stack([image.pixels for image in images])) for split, images in decoded.items()}


def _read(uris: list[str], kept: KeptImages | None) -> list[bytes | Reject]:
    return kept.fetch(uris) if kept else [Path(local_path(uri)).read_bytes() for uri in uris]
