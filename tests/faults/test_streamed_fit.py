"""A fit on patches for real: killed while Ray Data streams pixels into it, continued, and its bundle captions."""

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from captioner.command_line import parse
from captioner.config import FitConfig
from captioner.images import Decoder, Preprocessing
from captioner.model.bundle import describe
from captioner.training.features.caption_tokens import tokenize_examples
from captioner.training.features.examples import gather, sampled_rows
from captioner.training.fit.fit_output import FitOutput
from captioner.training.fit.fit_plan import llama_of, open_output, plan_fit
from captioner.training.fit.fit_worker import FitTask, run_fit_worker
from captioner.training.fit.initial_bundle import save_initial_bundle
from tests.faults.running_job import wait_for_nobody
from tests.faults.test_fit_interruptions import ROOT, Fit, environment, weights
from tests.labelled_scenes import write_labels
from tests.unit.model import tiny_models
from tests.unit.training.fitting_models import stream_of

pytestmark = pytest.mark.slow

NUM_STEPS = 200


def test_a_fit_on_patches_that_is_killed_ends_with_the_bits_of_one_without_ray_and_its_bundle_captions(tmp_path):
    labels = str(write_labels(tmp_path, {"train": 48, "validation": 12}))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with Path(labels).open("a") as lines:
        lines.write(json.dumps({"image": "broken.png", "captions": ["nothing"], "split": "train"}) + "\n")
    parts = tiny_models.save_clip(tmp_path / "clip"), tiny_models.save_llama(tmp_path / "llama")
    models = ["--clip", str(parts[0]), "--llama", str(parts[1]), "--max-failed-share", "0.1"]
    rung = ["--image-features", "patches", "--projector", "mlp", "--image-tokens", "4"]
    steps = ["--batch-size", "8", "--max-steps", str(NUM_STEPS), "--eval-every", "50", "--checkpoint-every", "10"]
    few = ["--num-scored-images", "4", "--max-caption-tokens", "8"]
    script = [sys.executable, "-W", "ignore", str(ROOT / "jobs" / "fit_projector.py")]
    command = [*script, labels, *models, *rung, *steps, *few]

    fit = Fit(command, tmp_path / "bundle", tmp_path / "features")
    fit.wait_for_step(60)
    os.kill(fit.process.pid, signal.SIGKILL)
    fit.process.wait()
    assert 60 <= fit.step < NUM_STEPS, "the injector came too late"
    wait_for_nobody(fit.mark)
    Fit(command, fit.output, tmp_path / "features").end()
    assert len([line for line in fit.log.read_text().splitlines() if "fit worker=0 of=1" in line]) == 2

    assert describe(str(fit.output)).provenance["data"]["left_out"] == {"corrupt": 1}
    kept = list((tmp_path / "features").rglob("features/*.parquet"))
    assert kept
    assert sum(path.stat().st_size for path in kept) < 61 * 3 * 32 * 32, "neither pixels nor patches are kept"
    alone = fitted_without_ray([labels, str(fit.output), *models, *rung, *steps, *few], tmp_path)
    expected, found = weights(alone), weights(fit.output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    caption = [sys.executable, "-W", "ignore", str(ROOT / "jobs" / "caption.py"), str(tmp_path / "scene-*")]
    done = subprocess.run(
        [*caption, str(tmp_path / "captions"), "--model", str(fit.output), "--max-new-tokens", "6"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["captioned"], summary["failed"]) == (60, 0)


def fitted_without_ray(arguments: list[str], folder: Path) -> Path:
    """Return the output of the same fit in this process, on pixels that it has decoded by itself."""
    config = parse(FitConfig, [*arguments, "--features", str(folder / "features")])
    plan = plan_fit(config, open_output(config), str(folder / "facts"))
    assert not len(plan.features.missing), "every image has been checked"
    features = gather(plan.features, 0)
    output = FitOutput(str(folder / "alone"))
    save_initial_bundle(config, output.initial_bundle_url)
    shown = {split: features.label_rows_of(split) for split in ("train", "validation")}
    shown["validation"] = shown["validation"][sampled_rows(12, config.training.num_measured_images)]
    uris = plan.labels.table["uri"].to_pylist()
    with closing(Decoder(Preprocessing.from_config(plan.start.preprocessing), config.image)) as decoder:
        decoded = {
            split: decoder.decode_batch([Path(uris[row].removeprefix("file://")).read_bytes() for row in rows])
            for split, rows in shown.items()
        }
    pixels = {split: stream_of(np.stack([image.pixels for image in images])) for split, images in decoded.items()}
    tokens = tokenize_examples(features, llama_of(plan), plan.start.template, config.training, output)
    task = FitTask(output, features, tokens, config.training, "auto", "cpu", 1, pixels)
    run_fit_worker(task, "cpu", lambda _row: None)
    return Path(output.url)
