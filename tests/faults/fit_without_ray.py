"""The same fit in this process, to which one on Ray is compared bit by bit."""

from contextlib import closing
from pathlib import Path

import numpy as np

from captioner.command_line import parse
from captioner.config import FitConfig
from captioner.images import Decoder, Preprocessing
from captioner.training.features.caption_tokens import tokenize_examples
from captioner.training.features.examples import FeatureSet, gather, sampled_rows
from captioner.training.fit.batches import PixelStream
from captioner.training.fit.fit_output import FitOutput
from captioner.training.fit.fit_plan import FitPlan, llama_of, open_output, plan_fit
from captioner.training.fit.fit_worker import FitTask, run_fit_worker
from captioner.training.fit.initial_bundle import save_initial_bundle
from tests.unit.training.fitting_models import stream_of

__all__ = ["fitted_without_ray"]


def fitted_without_ray(arguments: list[str], features_folder: Path) -> Path:
    """Return the output, beside the features, of a fit whose images are all in the features folder.

    arguments: LABELS, OUTPUT_BUNDLE of the fit on Ray, and its flags. Pixels are decoded in this process."""
    config = parse(FitConfig, [*arguments, "--features", str(features_folder)])
    plan = plan_fit(config, open_output(config), str(features_folder.parent / "facts"))
    assert not len(plan.features.missing), "every image is there"
    projector = plan.start.projector
    features = gather(plan.features, 0 if projector.reads_patches else projector.num_features)
    output = FitOutput(str(features_folder.parent / "alone"))
    save_initial_bundle(config, output.initial_bundle_url)
    tokens = tokenize_examples(features, llama_of(plan), plan.start.template, config.training, output)
    pixels = _pixels(plan, features) if projector.reads_patches else {}
    run_fit_worker(FitTask(output, features, tokens, config.training, "auto", "cpu", 1, pixels), "cpu", lambda _: None)
    return Path(output.url)


def _pixels(plan: FitPlan, features: FeatureSet) -> dict[str, PixelStream]:
    config = plan.config
    shown = {split: features.label_rows_of(split) for split in ("train", "validation")}
    num_measured = config.training.num_measured_images
    shown["validation"] = shown["validation"][sampled_rows(len(shown["validation"]), num_measured)]
    uris = plan.labels.table["uri"].to_pylist()
    with closing(Decoder(Preprocessing.from_config(plan.start.preprocessing), config.image)) as decoder:
        decoded = {
            split: decoder.decode_batch([Path(uris[row].removeprefix("file://")).read_bytes() for row in rows])
            for split, rows in shown.items()
        }
    return {split: stream_of(np.stack([image.pixels for image in images])) for split, images in decoded.items()}
