"""A whole fit without Ray: one worker, and the bundle, page and summary that result."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from captioner.captioning.captioner import Captioner
from captioner.command_line import parse
from captioner.config import FitConfig
from captioner.errors import BundleError, ConfigError
from captioner.gallery.fit_page import write_fit_page
from captioner.model.bundle import describe, load
from captioner.training.features.caption_tokens import tokenize_examples
from captioner.training.features.examples import Examples
from captioner.training.fit.batches import TokenizedSplit
from captioner.training.fit.fit_plan import open_output, plan_fit
from captioner.training.fit.fit_report import closing_lines, save_fitted_bundle, summarize
from captioner.training.fit.fit_state import FitState, best_of
from captioner.training.fit.fit_worker import FitTask, run_fit_worker
from captioner.training.fit.initial_bundle import save_initial_bundle
from captioner.training.fit.progress import FitProgress
from captioner.training.fit.projector import ProjectorFit, end_token_id
from captioner.training.fit.run_folder import RunFolderWriter
from captioner.training.fit.validation import Validation
from captioner.training.fit.worker_group import WorkerGroup
from tests.labelled_scenes import write_labels
from tests.tensorboard_events import scalars
from tests.unit.model import tiny_models

NUM_IMAGES = {"train": 24, "validation": 6}


class RandomFeatures:
    """What `FeatureSet` is to a worker, with random numbers: no image is decoded here."""

    def __init__(self, labels):
        self.labels, self.counts, self.failed = labels, labels.counts(), {}
        self.fingerprint = "fingerprint of random features"

    def features_of(self, split):
        return self.load(split).features

    def validation_sample(self, training):
        return self.load("validation").sample(training.num_measured_images)

    def load(self, split):
        rows = self.labels.split(split)
        shape = (rows.num_rows, tiny_models.CLIP_WIDTH)
        values = np.random.default_rng(len(split)).normal(size=shape).astype(np.float16)
        return Examples(rows["image_id"].to_pylist(), values, rows["captions"].to_pylist())


class Fit:
    """A fit that has ended, and its rows."""

    def __init__(self, folder: Path, *flags: str, model: str | None = None) -> None:
        """model: a bundle to begin with, whose rung it has, in place of a CLIP and a LLaMA."""
        self.labels = write_labels(folder, NUM_IMAGES)
        self.parts = [str(tiny_models.save_clip(folder / "clip")), str(tiny_models.save_llama(folder / "llama"))]
        self.output = folder / "bundle"
        training = ["--batch-size", "8", "--max-steps", "9", "--eval-every", "3", "--log-every", "1"]
        few = ["--num-scored-images", "4", "--max-caption-tokens", "8", "--learning-rate", "0.01"]
        two = ["--template", "<|begin_of_text|>Look: {image}", "--image-tokens", "2"]
        models = ["--model", model] if model else ["--clip", self.parts[0], "--llama", self.parts[1], *two]
        config = parse(FitConfig, [str(self.labels), str(self.output), *models, *training, *few, *flags])
        output = open_output(config)
        self.plan = plan_fit(config, output, output.run_folder)
        output.claim(self.plan.identity)
        save_initial_bundle(config, output.initial_bundle_url)
        self.features = RandomFeatures(self.plan.labels)
        self.rows = []
        tokens = tokenize_examples(self.features, self.plan.language, self.plan.start.template, config.training, output)
        task = FitTask(output, self.features, tokens, config.training, "auto", "auto", 1)
        self.lines = []
        self.state = run_fit_worker(task, "cpu", self.rows.append, self.lines.append)
        write_fit_page(self.plan, self.features, best_of(self.state))
        save_fitted_bundle(self.plan, self.features, self.state)


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    return Fit(tmp_path_factory.mktemp("fit"))


def test_every_row_is_passed_on_and_written(fit):
    kept = [json.loads(line) for line in (fit.output / "_run" / "metrics.jsonl").read_text().splitlines()]
    assert kept == fit.rows == fit.state.history
    assert [row["step"] for row in kept] == list(range(1, 10))
    assert [row["step"] for row in kept if "cider_d" in row] == [3, 6, 9]


class Folder:
    """The run folder of a fit: names in the order of writes, and contents."""

    name = "fit"

    def __init__(self):
        self.written, self.files = [], {}

    def write(self, name, data):
        self.written.append(name)
        self.files[name] = data


def folder_after(rows, seconds):
    """The run folder after these rows, which come so many seconds apart."""
    now = iter(np.arange(1, 99) * seconds)
    folder, passed_on, state = Folder(), [], FitState()
    writer = RunFolderWriter(folder, passed_on.append, clock=lambda: next(now))
    for row in rows:
        state.history.append(row)
        writer.write_row(state)
    assert passed_on == rows
    return folder


def test_metrics_are_written_at_every_row_but_no_more_often_than_a_store_likes():
    rows = [{"step": 1.0, "loss": 3.0}, {"step": 2.0, "loss": 2.0}]
    assert folder_after(rows, seconds=0.1).written == ["metrics.jsonl"]
    folder = folder_after(rows, seconds=60)
    assert folder.written == ["metrics.jsonl", "metrics.jsonl"]
    assert [json.loads(line) for line in folder.files["metrics.jsonl"].splitlines()] == rows


def test_all_writes_of_the_metrics_of_a_long_fit_are_a_few_times_the_last_one():
    folder, state = Folder(), FitState()
    sizes: list[int] = []
    folder.write = lambda name, data: sizes.append(len(data))
    now = iter(np.arange(1, 9999) * 60.0)
    writer = RunFolderWriter(folder, lambda row: None, clock=lambda: next(now))
    for step in range(3000):
        state.history.append({"step": float(step)})
        writer.write_row(state)
    assert sum(sizes) < 25 * sizes[-1]
    assert len(sizes) > 100


def test_the_curves_are_written_after_each_evaluation():
    rows = [{"step": 1.0, "loss": 3.0}, {"step": 2.0, "loss": 2.0, "val_loss": 2.5}]
    assert folder_after(rows, seconds=0.1).written == ["metrics.jsonl", "curves.svg"]


def test_a_checkpoint_draws_the_curves_unless_they_have_all_its_rows():
    folder, state = Folder(), FitState()
    state.to_bytes = lambda fit: b"state"
    writer = RunFolderWriter(folder, lambda row: None, clock=lambda: 0.0)
    for row in ({"step": 1.0, "loss": 3.0}, {"step": 2.0, "loss": 2.0, "val_loss": 2.5}):
        state.history.append(row)
        writer.write_row(state)
        writer.write_checkpoint(state, None)
    first = ["metrics.jsonl", "metrics.jsonl", "curves.svg", "checkpoint.pt"]
    assert folder.written == [*first, "curves.svg", "metrics.jsonl", "checkpoint.pt"]


def test_validation_images_are_a_random_sample_that_stays_the_same():
    examples = Examples([str(n) for n in range(50)], np.arange(50)[:, None], [[str(n)] for n in range(50)])
    few, all_of_them = examples.sample(9), examples.sample(100)
    assert few.image_ids == examples.sample(9).image_ids != [str(n) for n in range(9)]
    assert [[str(value)] for [value] in few.features] == few.captions
    assert sorted(all_of_them.image_ids) == sorted(examples.image_ids)


def loss_of(examples, model, fit):
    end = end_token_id(model.tokenizer, model.template.text, model.eos_token_ids)
    settings = {"end_token_id": end, "max_tokens": fit.config.max_caption_tokens}
    tokenized = TokenizedSplit.tokenize(examples.features, examples.captions, model.tokenizer, **settings)
    return Validation(tokenized, []).measure(fit).figures["val_loss"]


def test_the_loss_is_that_of_so_many_validation_images(tmp_path):
    few = Fit(tmp_path, "--num-measured-images", "4")
    page = (few.output / "_run" / "validation.html").read_text()
    images = few.plan.labels.split("validation")["image_id"].to_pylist()
    assert sum(image in page for image in images) == 4
    [last] = [row["val_loss"] for row in few.rows if row["step"] == 9]
    model = load(str(few.output), device="cpu")
    fit = ProjectorFit(model, few.plan.config.training, num_steps=9, group=WorkerGroup())
    losses = [loss_of(few.features.load("validation").sample(most), model, fit) for most in (4, 99)]
    if few.state.best.step == 9:
        assert losses[0] == pytest.approx(last, rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_the_checkpoint_holds_the_end(fit):
    state = FitState.read((fit.output / "_run" / "checkpoint.pt").read_bytes())
    assert (state.step, state.best.step) == (9, fit.state.best.step)


def test_the_bundle_holds_the_best_weights(fit):
    weights = load(str(fit.output), device="cpu").projector.state_dict()
    assert all(torch.equal(weights[name], best) for name, best in fit.state.best.weights.items())


def test_the_bundle_records_data_settings_figures_and_what_it_was_fitted_to(fit):
    bundle = describe(str(fit.output))
    provenance = bundle.provenance
    assert provenance["data"]["splits"]["train"] == {"num_images": 24, "num_captions": 48}
    assert provenance["data"]["fingerprint"] == fit.plan.labels.fingerprint
    assert provenance["data"]["examples"] == fit.features.fingerprint
    assert provenance["config"]["training"]["learning_rate"] == 0.01
    kept = {"split_seed", "validation_share", "test_share", "limit", "image_root", "caption_column", "max_failed_share"}
    assert kept <= set(provenance["config"]["labels"])
    assert "storage_options" not in provenance["config"]["labels"]
    assert provenance["config"]["image"]["max_image_pixels"] == fit.plan.config.image.max_image_pixels
    assert set(provenance["metrics"]) == {"val_loss", "bleu_4", "rouge_l", "cider_d"}
    fitted_to = json.loads((fit.output / "bundle.json").read_text())["fitted_to"]
    assert fitted_to == {"clip": bundle.clip_fingerprint, "llama": bundle.llama_fingerprint}
    assert (bundle.template, bundle.num_image_tokens) == ("<|begin_of_text|>Look: {image}", 2)


def test_the_bundle_captions_images(fit):
    captioner = Captioner.from_bundle(str(fit.output))
    images = sorted(fit.labels.parent.glob("*.png"))[:2]
    assert all(caption.num_tokens for caption in captioner.caption(images))
    captioner.model.llama.zero_grad()
    captioner.close()


def test_the_bundle_is_refused_with_another_llama(fit, tmp_path):
    content = json.loads((fit.output / "bundle.json").read_text())
    other = tiny_models.save_llama(tmp_path / "other", seed=9)
    (tmp_path / "bundle.json").write_text(json.dumps({**content, "llama": str(other)}))
    (tmp_path / "projector.safetensors").write_bytes((fit.output / "projector.safetensors").read_bytes())
    with pytest.raises(BundleError, match="was fitted to another LLaMA"):
        describe(str(tmp_path))


def test_the_page_shows_validation_images_beside_both_captions(fit):
    page = (fit.output / "_run" / "validation.html").read_text()
    rows = fit.plan.labels.split("validation").to_pylist()
    assert sum(row["image_id"] in page and row["captions"][0] in page for row in rows) == 4
    assert "Words of a caption that no reference has are marked" in page
    assert '["added","' in page.replace(", ", ","), "nine steps are too few for words that references have"
    assert page.count("data:image/webp") + page.count("UklGR") >= 4  # how a WebP begins in base64


def test_the_plot_is_beside_it(fit):
    assert "CIDEr-D" in (fit.output / "_run" / "curves.svg").read_text()


def test_the_closing_lines_give_the_next_commands(fit):
    summary = {**summarize(fit.plan), "seconds": 3.0}
    assert (summary["steps"], summary["best_step"]) == (9, fit.state.best.step)
    text = "\n".join(closing_lines(fit.plan, summary))
    assert f"captioner caption IMAGES CAPTIONS --model {fit.output}" in text
    assert "nothing was left" not in text
    assert "nothing was left to do" in "\n".join(closing_lines(fit.plan, summarize(fit.plan)))


def test_a_fit_that_has_ended_says_when_its_images_have_changed_since(tmp_path):
    ended = Fit(tmp_path, "--num-scored-images", "0", "--max-steps", "1")
    assert "images have changed" not in "\n".join(closing_lines(ended.plan, summarize(ended.plan)))
    image = next(tmp_path.glob("*.png"))
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 10_000_000_000))
    again = plan_fit(ended.plan.config, ended.plan.output, ended.plan.output.run_folder)
    assert "images have changed since" in "\n".join(closing_lines(again, summarize(again)))


def test_a_bundle_that_carries_its_models_can_move(tmp_path):
    carried = Fit(tmp_path, "--carry-models", "--num-scored-images", "0", "--max-steps", "1")
    moved = tmp_path / "moved"
    carried.output.rename(moved)
    for part in carried.parts:
        Path(part).rename(f"{part}-gone")
    assert describe(str(moved)).fingerprint


def test_an_adapter_is_saved_and_goes_on_learning_or_stays_as_it_was(tmp_path):
    lora = ["--lora-rank", "2", "--lora-modules", "q_proj,down_proj", "--lora-learning-rate", "0.02"]
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder in folders:
        folder.mkdir()
    first = Fit(folders[0], *lora)
    maps = [f"{name}.lora_{matrix}.weight" for name in ("self_attn.q_proj", "mlp.down_proj") for matrix in "AB"]
    assert first.lines == [f"fit gradients=weight,bias,{','.join(f'model.layers.*.{name}' for name in maps)}"]
    told = describe(str(first.output))
    assert (told.adapter.rank, told.adapter.modules) == (2, ("q_proj", "down_proj"))
    own = load_file(first.output / "adapter" / "adapter_model.safetensors")
    learnt = {f"base_model.model.{name}": weight for name, weight in first.state.best.weights.items()}
    assert all(torch.equal(weight, learnt[name]) for name, weight in own.items())
    assert all(weight.any() for weight in own.values())
    captioner = Captioner.from_bundle(str(first.output))
    assert all(caption.num_tokens for caption in captioner.caption(sorted(first.labels.parent.glob("*.png"))[:2]))
    captioner.close()

    second = Fit(folders[1], *lora, model=str(first.output))
    before, after = (last_loss(fit) for fit in (first, second))
    assert after < before
    third = Fit(folders[2], "--initial-projector", "model", model=str(first.output))
    kept = load_file(third.output / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(weight, own[name]) for name, weight in kept.items())
    assert "adapter   LoRA of rank 2" in "\n".join(third.plan.lines())
    assert not torch.equal(third.state.best.weights["weight"], first.state.best.weights["weight"])
    with pytest.raises(ConfigError, match="has an adapter already, of rank 2, alpha 4 and the maps q_proj, down_proj"):
        Fit(tmp_path, "--lora-rank", "3", model=str(first.output))


def last_loss(fit):
    return fit.rows[-1]["loss"]


def test_tensorboard_has_each_figure_of_each_row(tmp_path):
    rows = [{"step": 1.0, "loss": 3.0}, {"step": 2.0, "loss": 2.0, "val_loss": 2.5}]
    with FitProgress(2, str(tmp_path / "events")) as progress:
        for row in rows:
            progress.show(row)
    assert scalars(tmp_path / "events") == {int(row["step"]): row for row in rows}
