"""The fit on a real Ray: from images and captions to a bundle that captions, and to nothing where it must not."""

import json
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from ray import cloudpickle

from captioner.captioning.resources import Cluster
from captioner.cluster.caption_pipeline import caption_images
from captioner.cluster.fit_stream import train
from captioner.cluster.projector_training import fit_projector
from captioner.cluster.session import joined_cluster
from captioner.cluster.training_group import training_group
from captioner.command_line import run
from captioner.config import (
    CaptionJobConfig,
    FitConfig,
    FitModelConfig,
    FitResourceConfig,
    FitTargetConfig,
    LabelsConfig,
    ModelConfig,
    TrainingConfig,
)
from captioner.demo import scenes
from captioner.errors import JobError
from captioner.model.bundle import describe
from captioner.training.features.caption_tokens import tokenize_examples
from captioner.training.features.examples import gather
from captioner.training.fit.fit_output import FitOutput
from captioner.training.fit.fit_plan import open_output, plan_fit
from captioner.training.fit.fit_state import FitState
from captioner.training.fit.fit_worker import FitTask, run_fit_worker
from captioner.training.fit.worker_group import WorkerGroup
from tests.labelled_scenes import write_labels
from tests.tensorboard_events import scalars
from tests.unit.model import tiny_models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own sockets, when a driver leaves its cluster
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray Data and Ray Train copy their deprecated settings
    pytest.mark.filterwarnings("ignore:The (min|max)imum number of concurrent"),  # one slice for two workers
]

NUM_IMAGES = {"train": 48, "validation": 12}
TRAINING = ["--batch-size", "16", "--max-steps", "12", "--eval-every", "4", "--log-every", "1"]
SMALL = ["--num-scored-images", "6", "--max-caption-tokens", "12", "--learning-rate", "0.01"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """CLIP and LLaMA as one finds them, in folders, without a bundle."""
    folder = tmp_path_factory.mktemp("parts")
    return tiny_models.save_clip(folder / "clip"), tiny_models.save_llama(folder / "llama")


@pytest.fixture(scope="module")
def command(parts, tmp_path_factory):
    labels = write_labels(tmp_path_factory.mktemp("labels"), NUM_IMAGES)
    output = tmp_path_factory.mktemp("fit") / "bundle"
    models = ["--clip", str(parts[0]), "--llama", str(parts[1]), "--template", "<|begin_of_text|>Look: {image}"]
    return [
        str(labels),
        str(output),
        *models,
        *TRAINING,
        *SMALL,
        "--workers",
        "2",
        "--image-tokens",
        "2",
        "--tensorboard",
    ]


@pytest.fixture(scope="module")
def fitted(command, ray_address):
    """The output folder and the summary of a fit of two workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_address)
        patch.setattr(sys, "stdout", out := StringIO())
        assert run(FitConfig, fit_projector, command) == 0
    return Path(command[1]), json.loads(out.getvalue().splitlines()[-1])


def rows(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "_run" / "metrics.jsonl").read_text().splitlines()]


def test_the_summary_says_what_was_fitted(fitted):
    output, summary = fitted
    assert summary["images"] == {**NUM_IMAGES, "test": 0}
    assert (summary["steps"], summary["left_out"], summary["output"]) == (12, {}, str(output))
    assert {"val_loss", "cider_d", "bleu_4"} <= set(summary)


def test_the_bundle_records_data_settings_figures_and_what_it_was_fitted_to(fitted, parts):
    output, summary = fitted
    bundle = describe(str(output))
    told = bundle.provenance
    assert told["data"]["splits"]["train"] == {"num_images": 48, "num_captions": 96}
    assert len(told["data"]["fingerprint"]) == 32
    assert told["config"]["training"]["learning_rate"] == 0.01
    assert told["metrics"]["val_loss"] == summary["val_loss"]
    fitted_to = json.loads((output / "bundle.json").read_text())["fitted_to"]
    assert fitted_to == {"clip": bundle.clip_fingerprint, "llama": bundle.llama_fingerprint}
    assert (bundle.template, bundle.num_image_tokens) == ("<|begin_of_text|>Look: {image}", 2)


def test_every_step_is_a_row_and_the_loss_falls(fitted):
    found = rows(fitted[0])
    assert [row["step"] for row in found] == list(range(1, 13))
    assert found[-1]["loss"] < found[0]["loss"]
    assert [row["step"] for row in found if "val_loss" in row] == [4, 8, 12]


def test_tensorboard_gets_every_figure_of_every_row(fitted):
    found = scalars(fitted[0] / "_run" / "tensorboard")
    assert found == {int(row["step"]): pytest.approx(row, rel=1e-6) for row in rows(fitted[0])}


def test_the_run_folder_shows_curves_and_images_beside_their_captions(fitted):
    output, _ = fitted
    assert "<svg" in (output / "_run" / "curves.svg").read_text()
    page = (output / "_run" / "validation.html").read_text()
    shown = [scene for scene in scenes.examples("validation", NUM_IMAGES["validation"]) if scene.image_id in page]
    assert len(shown) == 6
    assert all(scene.captions[0] in page for scene in shown)
    assert page.count('"image": {') + page.count('"image":{') == 6


def test_two_workers_and_one_give_the_same_losses(fitted, command, tmp_path):
    """The one without Ray: the same data, cached features and settings, in this process."""
    output, _ = fitted
    config = TrainingConfig(**describe(str(output)).provenance["config"]["training"])
    features = features_of(command)
    alone = FitOutput(str(tmp_path / "alone"))
    copy_start(output, alone)
    plan = plan_of(command)
    tokens = tokenize_examples(features, plan.language, plan.start.template, config, alone)
    state = run_fit_worker(FitTask(alone, features, tokens, config, "auto", "cpu", 1), "cpu", lambda _row: None)
    for row, expected in zip(state.history, rows(output), strict=True):
        for name in (
            "loss",
            "grad_norm",
            "learning_rate",
            *(["val_loss", "cider_d"] if "val_loss" in expected else []),
        ):
            assert row[name] == pytest.approx(expected[name], rel=1e-4), (row["step"], name)


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import what is here


class OnceBroken(FitOutput):
    """An output that one of two workers cannot read the first time."""

    def read(self, name):
        broken = Path(f"{self.url}-broken")
        if name == "checkpoint.pt" and WorkerGroup.of_torch().rank == 1 and not broken.exists():
            broken.touch()
            raise JobError("this worker alone cannot read it")
        return super().read(name)


class Broken(FitOutput):
    """An output that no worker can read."""

    def read(self, name):
        with Path(f"{self.url}-calls").open("a") as calls:
            calls.write(f"{name}\n")
        raise JobError("nobody can read it")


def trained(command, features, output):
    """Train on Ray with another output than the command's, of the same first weights."""
    copy_start(Path(command[1]), output)
    training = TrainingConfig(**describe(command[1]).provenance["config"]["training"])
    config = FitConfig(
        labels=LabelsConfig(labels_path=command[0]),
        target=FitTargetConfig(output=command[1]),
        model=models_of(command),
        training=training,
        resources=FitResourceConfig(workers="2"),
    )
    run_folder = FitOutput(command[1]).run_folder
    plan = replace(plan_fit(config, open_output(config), run_folder), output=output)
    with joined_cluster() as cluster:
        train(plan, features, training_group(plan.config.resources, cluster))


@pytest.mark.usefixtures("fitted", "on_ray")
def test_an_error_of_one_worker_alone_is_tried_again_and_leaves_no_trace(command, tmp_path):
    output = OnceBroken(str(tmp_path / "once"))
    trained(command, features_of(command), output)
    assert Path(f"{output.url}-broken").exists(), "the injector did nothing"
    assert FitState.read(FitOutput(output.url).read("checkpoint.pt")).step == 12


@pytest.mark.usefixtures("fitted", "on_ray")
def test_an_error_that_all_workers_meet_ends_the_fit_at_once(command, tmp_path):
    output = Broken(str(tmp_path / "broken"))
    with pytest.raises(JobError, match="nobody can read it"):
        trained(command, features_of(command), output)
    assert Path(f"{output.url}-calls").read_text().split() == ["checkpoint.pt"] * 2


@pytest.mark.parametrize(("workers", "asked"), [("1:2", (1, 2)), ("2", 2)])
def test_a_range_of_workers_is_one_for_ray_train_too(workers, asked):
    found = training_group(FitResourceConfig(workers=workers), Cluster(cpus=2, gpus=0)).scaling()
    assert (found.num_workers, found.resources_per_worker) == (asked, {"CPU": 1.0})
    assert found.elasticity_enabled == (workers == "1:2")


def models_of(command):
    return FitModelConfig(clip=command[3], llama=command[5], template=command[7])


def plan_of(command):
    config = FitConfig(
        labels=LabelsConfig(labels_path=command[0]),
        target=FitTargetConfig(output=command[1]),
        model=models_of(command),
        training=TrainingConfig(**describe(command[1]).provenance["config"]["training"]),
    )
    output = open_output(config)
    return plan_fit(config, output, output.run_folder)


def features_of(command):
    plan = plan_of(command)
    assert len(plan.features.missing) == 0, "features were computed once and are found again"
    return gather(plan.features, plan.start.projector.num_features)


def copy_start(output, alone):
    for file in (output / "_run" / "start").iterdir():
        alone.write(f"start/{file.name}", file.read_bytes())


def test_the_caption_job_takes_the_bundle_of_a_fit(fitted, command, on_ray, tmp_path):
    images = str(Path(command[0]).parent / "*.png")
    config = CaptionJobConfig(
        input_path=images, output=str(tmp_path / "captions"), model=ModelConfig(model=str(fitted[0]))
    )
    summary = caption_images(config)
    assert summary["failed"] == 0
    assert summary["captioned"] > 10
    assert len(pd.read_parquet(tmp_path / "captions" / "captions")) == summary["captioned"]


def test_the_same_command_again_has_nothing_to_do(fitted, command, capsys):
    assert run(FitConfig, fit_projector, command) == 0
    captured = capsys.readouterr()
    assert "nothing was left to do" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["fingerprint"] == fitted[1]["fingerprint"]


def test_another_fit_into_the_same_bundle_is_refused(fitted, command, capsys):
    assert run(FitConfig, fit_projector, [*command, "--seed", "5"]) == 2
    assert "training.seed: 0 there, 5 now" in capsys.readouterr().err
    assert describe(command[1]).fingerprint == fitted[1]["fingerprint"]


def test_a_bundle_captions_with_no_other_llama(fitted, tmp_path, capsys):
    content = json.loads((fitted[0] / "bundle.json").read_text())
    other = tiny_models.save_llama(tmp_path / "other", seed=9)
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    (swapped / "bundle.json").write_text(json.dumps({**content, "llama": str(other)}))
    (swapped / "projector.safetensors").write_bytes((fitted[0] / "projector.safetensors").read_bytes())
    arguments = [str(tmp_path), str(tmp_path / "captions"), "--model", str(swapped)]
    assert run(CaptionJobConfig, caption_images, arguments) == 2
    assert "was fitted to another LLaMA" in capsys.readouterr().err


def test_a_bundle_that_no_fit_wrote_is_not_overwritten(fitted, command, capsys):
    _, start = fitted[0], fitted[0] / "_run" / "start"
    assert run(FitConfig, fit_projector, [command[0], str(start), *command[2:]]) == 2
    assert "no fit has written it" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_leaves_nothing(command, tmp_path, capsys):
    assert run(FitConfig, fit_projector, [command[0], str(tmp_path / "new"), *command[2:], "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "linear 48 -> 2 x 64" in captured.err
    summary = json.loads(captured.out.splitlines()[-1])
    assert (summary["steps"], summary["features_missing"]) == (12, 60)
    assert summary["prices"].keys() == {"this fit", "linear-1", "patches"}
    assert not (tmp_path / "new").exists()


def test_the_checkpoint_holds_the_end(fitted):
    state = FitState.read((fitted[0] / "_run" / "checkpoint.pt").read_bytes())
    assert state.step == 12
    assert state.best is not None
    assert state.best.step in (4, 8, 12)
