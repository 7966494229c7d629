"""A fit that begins with a published LLaVA: its projector goes on learning, and what comes out captions."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from captioner.command_line import parse
from captioner.config import FitConfig
from captioner.errors import BundleError, ConfigError
from captioner.model.bundle import describe, load
from captioner.training.fit.fit_loop import fit_projector
from captioner.training.fit.fit_plan import open_output, plan_fit
from captioner.training.fit.fit_report import save_fitted_bundle, save_llava
from captioner.training.fit.initial_bundle import save_initial_bundle
from tests.labelled_scenes import write_labels
from tests.unit.model import tiny_models
from tests.unit.model.original_llava import save_original
from tests.unit.model.test_model_oracle import pixels
from tests.unit.model.test_published_captioners import engine_tokens, expected_tokens
from tests.unit.model.tiled_llavas import save_llava_next, save_onevision
from tests.unit.training import fitting_models as toys

LORA = ["--lora-rank", "2", "--lora-modules", "q_proj,v_proj", "--lora-learning-rate", "0.02"]
STEPS = ["--batch-size", "8", "--max-steps", "4", "--num-scored-images", "0", "--learning-rate", "0.01"]


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return str(write_labels(tmp_path_factory.mktemp("labels"), {"train": 9, "validation": 3}))


def published(folder: Path, layout: str) -> Path:
    """A checkpoint of a layout that captions one square an image."""
    if layout == "siglip":
        return tiny_models.save_llava(
            folder, vision=tiny_models.siglip_config(vision_use_head=False), vision_feature_select_strategy="full"
        )
    converted = tiny_models.save_llava(folder if layout == "llava" else folder / "converted")
    if layout == "llava":
        return folder
    tower = folder / "tower" if layout == "original, tower apart" else None
    aspect = "pad" if layout == "original" else "square"
    return save_original(converted, folder / "original", tower=tower, image_aspect_ratio=aspect)


def plan_of(*arguments: str):
    config = parse(FitConfig, list(arguments))
    output = open_output(config)
    return plan_fit(config, output, output.run_folder)


def fitted(plan):
    """The plan's bundle after a few steps on random pixels, as the workers of a fit make it."""
    plan.output.claim(plan.identity)
    save_initial_bundle(plan.config, plan.output.initial_bundle_url, plan.model_options)
    training = plan.config.training
    model = load(plan.output.initial_bundle_url, device="cpu", merges_adapter=training.lora_rank == 0)
    images = toys.pixels(toys.NUM_TRAIN, seed=3)
    state = fit_projector(model, toys.train_split(model), None, training, pixels=toys.stream_of(images))
    counts = SimpleNamespace(fingerprint="none", counts=plan.labels.counts(), failed={})
    save_fitted_bundle(plan, counts, state)
    return plan.output.url, state


LAYOUTS = ["llava", "siglip", "original", "original, tower apart"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lora", [[], LORA], ids=["alone", "with LoRA"])
def test_its_projector_goes_on_learning_and_the_bundle_over_it_captions(labels, tmp_path, layout, lora):
    checkpoint = published(tmp_path / "published", layout)
    plan = plan_of(labels, str(tmp_path / "out"), "--model", str(checkpoint), *lora, *STEPS)
    before = load(str(checkpoint), device="cpu")
    begun = plan.start.projector
    assert begun == before.projector_config
    text = "\n".join(plan.lines())
    assert f"model     {checkpoint}, a published checkpoint" in text
    assert "fitted, from its weights in --model" in text
    assert ("adapter   LoRA of rank 2" in text) == bool(lora)
    assert (plan.start.template, plan.start.fingerprint == before.fingerprint) == (before.template.text, not lora)
    assert plan.language.fingerprint() == describe(str(checkpoint)).llama_fingerprint

    url, state = fitted(plan)
    after = load(url, device="cpu")
    first = before.projector.state_dict()
    assert all(torch.equal(weight, state.best.weights[name]) for name, weight in after.projector.state_dict().items())
    assert not any(torch.equal(weight, first[name]) for name, weight in after.projector.state_dict().items())
    own, adapted = before.llama.state_dict(), after.llama.state_dict()
    changed = {name.split(".")[-2] for name, weight in adapted.items() if not torch.equal(weight, own[name])}
    assert changed == ({"q_proj", "v_proj"} if lora else set())
    assert after.template == before.template
    assert after.preprocessing == before.preprocessing
    assert engine_tokens(after, pixels(3)) != engine_tokens(before, pixels(3))
    told = describe(url)
    assert (told.kind, told.checkpoint.location, told.fingerprint) == ("bundle", str(checkpoint), after.fingerprint)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_it_is_saved_as_a_llava_of_transformers_with_merged_weights_and_equal_tokens(labels, tmp_path, layout):
    checkpoint = published(tmp_path / "published", layout)
    flags = ["--model", str(checkpoint), *LORA, *STEPS, "--save-as", "llava"]
    plan = plan_of(labels, str(tmp_path / "out"), *flags)
    url, _ = fitted(plan)
    save_llava(plan)
    model = load(url, device="cpu")
    tokens = engine_tokens(model, pixels(3))
    written = expected_tokens(Path(plan.output.llava_url), model, pixels(3))
    assert tokens == [[token for token in row if token not in model.eos_token_ids] for row in written]


def test_a_fit_goes_on_from_the_bundle_of_an_earlier_one(labels, tmp_path):
    checkpoint = published(tmp_path / "published", "llava")
    first, state = fitted(plan_of(labels, str(tmp_path / "out"), "--model", str(checkpoint), *LORA, *STEPS))
    plan = plan_of(labels, str(tmp_path / "more"), "--model", first, *LORA, *STEPS)
    assert plan.start.checkpoint.location == str(checkpoint)
    assert plan.start.fingerprint == describe(first).fingerprint
    save_initial_bundle(plan.config, str(tmp_path / "start"))
    begun = load_file(tmp_path / "start" / "projector.safetensors")
    assert all(torch.equal(weight, state.best.weights[name]) for name, weight in begun.items())


def test_a_template_of_ones_own_and_a_question_are_what_it_is_asked(labels, tmp_path):
    checkpoint = str(published(tmp_path / "published", "llava"))
    whole = "<|begin_of_text|>{image}\nSay:"
    plan = plan_of(labels, str(tmp_path / "a"), "--model", checkpoint, "--template", whole)
    assert plan.start.template == whole
    plan = plan_of(labels, str(tmp_path / "b"), "--model", checkpoint, "--template", "What is it?")
    assert "{image}\nWhat is it?<|eot_id|>" in plan.start.template


def test_a_checkpoint_without_a_tokenizer_takes_one(labels, tmp_path):
    checkpoint = published(tmp_path / "published", "llava")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / file).rename(tokenizer / file)
    with pytest.raises(BundleError, match=r"has no tokenizer: expected tokenizer.json, or .* by --tokenizer"):
        plan_of(labels, str(tmp_path / "out"), "--model", str(checkpoint), *STEPS)
    plan = plan_of(labels, str(tmp_path / "out"), "--model", str(checkpoint), "--tokenizer", str(tokenizer), *STEPS)
    url, _ = fitted(plan)
    assert json.loads((Path(url) / "bundle.json").read_text())["tokenizer"] == str(tokenizer)
    assert engine_tokens(load(url, device="cpu"), pixels(1))


def test_a_bundle_that_carries_its_checkpoint_can_move(labels, tmp_path):
    checkpoint = published(tmp_path / "published", "llava")
    flags = ["--model", str(checkpoint), *STEPS, "--carry-models"]
    url, _ = fitted(plan_of(labels, str(tmp_path / "out"), *flags))
    tokens = engine_tokens(load(url, device="cpu"), pixels(2))
    Path(url).rename(tmp_path / "moved")
    checkpoint.rename(tmp_path / "gone")
    assert engine_tokens(load(str(tmp_path / "moved"), device="cpu"), pixels(2)) == tokens


@pytest.mark.parametrize("save", [save_llava_next, save_onevision])
def test_a_checkpoint_that_cuts_images_into_tiles_is_refused(labels, tmp_path, save):
    checkpoint = save(tmp_path / "tiled")
    with pytest.raises(ConfigError, match=r"cuts an image into up to \d+ tiles, .* a fit reads one square an image"):
        plan_of(labels, str(tmp_path / "out"), "--model", str(checkpoint), "--template", "{image}Look")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--initial-projector", "random"], "--initial-projector is random, but .* published checkpoint"),
        (
            ["--projector", "query", "--image-features", "patches", "--image-tokens", "16"],
            r"--projector query, --image-features patches, .* is of kind mlp with 16 image tokens",
        ),
        (["--image-features", "patches", "--image-tokens", "4"], "is of kind mlp with 16 image tokens"),
    ],
)
def test_flags_of_a_new_projector_are_refused(labels, tmp_path, flags, message):
    checkpoint = str(published(tmp_path / "published", "llava"))
    with pytest.raises(ConfigError, match=message):
        plan_of(labels, str(tmp_path / "out"), "--model", checkpoint, *flags)
    assert plan_of(
        labels, str(tmp_path / "out"), "--model", checkpoint, "--projector", "mlp", "--image-features", "patches"
    )


def test_flags_of_checkpoints_are_refused_with_a_bundle(labels, tmp_path):
    bundle = toys.save_model(tmp_path / "bundle")
    for flag, value in (("--vision-tower", "x"), ("--tokenizer", "y")):
        with pytest.raises(ConfigError, match=f"{flag} is '{value}', but .* is a bundle"):
            plan_of(labels, str(tmp_path / "out"), "--model", bundle, flag, value)


def test_a_changed_checkpoint_is_refused_by_the_bundle_over_it(labels, tmp_path):
    checkpoint = published(tmp_path / "published", "llava")
    url, _ = fitted(plan_of(labels, str(tmp_path / "out"), "--model", str(checkpoint), *STEPS))
    tiny_models.save_llava(checkpoint, seed=8)
    with pytest.raises(BundleError, match="was fitted to another CLIP"):
        describe(url)
