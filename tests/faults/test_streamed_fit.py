"""A fit on patches for real: killed while Ray Data streams pixels into it, continued; and one that loses a node."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from captioner.model.bundle import describe
from tests.faults.fit_without_ray import fitted_without_ray
from tests.faults.running_job import is_gone, kill, parent, wait_for_nobody
from tests.faults.test_fit_interruptions import ROOT, Fit, checkpoints_wait, environment, weights
from tests.labelled_scenes import pack_tar, write_labels
from tests.unit.model import tiny_models

pytestmark = pytest.mark.slow

NUM_STEPS = 200


def test_a_fit_on_patches_of_a_tar_that_is_killed_ends_with_the_bits_of_one_of_files_and_its_bundle_captions(tmp_path):
    labels = write_labels(tmp_path, {"train": 48, "validation": 12})
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with labels.open("a") as lines:
        lines.write(json.dumps({"image": "broken.png", "captions": ["nothing"], "split": "train"}) + "\n")
    tar = pack_tar(labels, tmp_path / "labels.tar")
    parts = tiny_models.save_clip(tmp_path / "clip"), tiny_models.save_llama(tmp_path / "llama")
    models = ["--clip", str(parts[0]), "--llama", str(parts[1]), "--max-failed-share", "0.1"]
    lora = ["--lora-rank", "2", "--lora-modules", "q_proj,down_proj"]
    rung = ["--image-features", "patches", "--projector", "mlp", "--image-tokens", "4", *lora]
    steps = ["--batch-size", "8", "--max-steps", str(NUM_STEPS), "--eval-every", "50", "--checkpoint-every", "10"]
    few = ["--num-scored-images", "4", "--max-caption-tokens", "8"]
    script = [sys.executable, "-W", "ignore", str(ROOT / "jobs" / "fit_projector.py")]
    command = [*script, str(tar), *models, *rung, *steps, *few]

    fit = Fit(command, tmp_path / "bundle", tmp_path / "features", held_from=100)
    fit.wait_for_step(60)
    assert fit.pid_of_worker(0), "its start is in the log"
    os.kill(fit.process.pid, signal.SIGKILL)
    fit.process.wait()
    assert 60 <= fit.step < NUM_STEPS, "the injector came too late"
    wait_for_nobody(fit.mark)
    Fit(command, fit.output, tmp_path / "features").end()
    assert len([line for line in fit.log.read_text().splitlines() if "fit worker=0 of=1" in line]) == 2

    assert describe(str(fit.output)).provenance["data"]["left_out"] == {"corrupt": 1}
    kept = list((tmp_path / "features").rglob("*.bin"))
    num_bytes = sum(path.stat().st_size for path in tmp_path.glob("scene-*"))
    assert sum(path.stat().st_size for path in kept) == num_bytes, "each image is kept as it was, and once"
    files = [str(labels), str(tmp_path / "files"), *models, *rung, *steps, *few]
    alone = fitted_without_ray(files, tmp_path / "features")
    expected, found = weights(alone), weights(fit.output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {"linear_1.weight", "model.layers.1.mlp.down_proj.lora_B.weight"} < found.keys()

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


def test_a_fit_on_patches_that_loses_a_node_goes_on_with_the_worker_and_the_decoder_of_the_other(
    tmp_path, monkeypatch, request
):
    for name, value in checkpoints_wait(tmp_path / "site", held_from=20).items():
        monkeypatch.setenv(name, value)  # of the cluster, whose processes take the steps
    cluster = request.getfixturevalue("cluster")
    labels = str(write_labels(tmp_path, {"train": 48, "validation": 12}))
    parts = tiny_models.save_clip(tmp_path / "clip"), tiny_models.save_llama(tmp_path / "llama")
    models = ["--clip", str(parts[0]), "--llama", str(parts[1]), "--image-features", "patches", "--image-tokens", "4"]
    steps = [
        "--batch-size",
        "8",
        "--max-steps",
        "80",
        "--eval-every",
        "40",
        "--checkpoint-every",
        "10",
        "--log-every",
        "10",
    ]
    flags = [*models, *steps, "--num-scored-images", "4", "--max-caption-tokens", "8"]
    script = [sys.executable, "-W", "ignore", str(ROOT / "jobs" / "fit_projector.py")]
    joined = {"RAY_ADDRESS": cluster[0], "RAY_AUTH_MODE": "disabled"}
    sooner = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3"}  # for which Ray Train waits for a node that is gone
    features = tmp_path / "features"

    fit = Fit([*script, labels, *flags], tmp_path / "bundle", features, workers="1:2", **joined, **sooner)
    fit.wait_for_step(10)
    worker = fit.pid_of_worker(1)
    assert kill(parent(worker)), "the node was gone before it was killed"
    killed_at = fit.step
    fit.wait_for("the end of its worker", lambda: is_gone(worker))  # which outlives its raylet for a while
    (tmp_path / "site/held").unlink()
    fit.wait_for("a group of one", lambda: "fit worker=0 of=1" in fit.log.read_text())
    saved = (fit.output / "_run" / "checkpoint.pt").read_bytes()
    fit.end()
    assert killed_at < 80, "the injector came too late"

    arguments = [labels, str(fit.output), *flags]
    continued = fitted_without_ray(arguments, features, saved)
    expected, found = weights(continued), weights(fit.output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    alone = fitted_without_ray(arguments, features)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (fit.output / "_run", alone / "_run")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3), "two workers, and then one, as one"
