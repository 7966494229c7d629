"""What a fit refuses before anything is started, and what it plans: models, first weights, steps."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from captioner.command_line import parse
from captioner.config import FitConfig
from captioner.errors import BundleError, ConfigError, InputError, ShapeError
from captioner.model.bundle import load, load_vision
from captioner.training.fit.fit_plan import open_output, plan_fit
from captioner.training.fit.fit_report import dry_run_summary, save_llava
from captioner.training.fit.initial_bundle import save_initial_bundle
from tests.bundles import save_tiny_bundle
from tests.labelled_scenes import pack_tar, write_labels
from tests.unit.model import tiny_models


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return str(write_labels(tmp_path_factory.mktemp("labels"), {"train": 9, "validation": 3}))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return str(tiny_models.save_clip(folder / "clip")), str(tiny_models.save_llama(folder / "llama"))


ON_PATCHES = ["--image-features", "patches", "--projector", "mlp"]
MORE = ([], ["--image-features", "patches"])


def plan_of(*arguments):
    config = parse(FitConfig, list(arguments))
    output = open_output(config)
    return plan_fit(config, output, output.run_folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.csv", "out"], "--model is missing; expected a bundle, or --clip and --llama"),
        (["x.csv"], "OUTPUT_BUNDLE is missing"),
        (["x.csv", "out", "--clip", "c"], "--clip without --llama"),
        (
            ["x.csv", "out", "--clip", "c", "--llama", "l", "--model", "m"],
            "--model is m; expected either a model, or --clip",
        ),
        (["--batch-size", "4", "--gradient-accumulation-steps", "5"], "--batch-size is 4; expected at least its 5"),
        (["--learning-rate", "0"], "--learning-rate is 0"),
        (["--max-steps", "0"], "--max-steps is 0"),
        (["--keep-best-by", "cider", "--num-scored-images", "0"], "--num-scored-images is 0; expected more than 0"),
        (["--num-measured-images", "9", "--num-scored-images", "10"], "--num-scored-images is 10; expected at most"),
        (["--seed", "-1"], "--seed is -1; expected 0 or more"),
        (["--lora-rank", "-1"], "--lora-rank is -1; expected 0 or more"),
        (["--lora-modules", "q_proj"], "--lora-modules is ('q_proj',); expected none without --lora-rank"),
        (["--lora-alpha", "2"], "--lora-alpha is 2.0; expected none without --lora-rank"),
        (["--lora-rank", "2", "--lora-alpha", "0"], "--lora-alpha is 0.0; expected more than 0"),
        (["--lora-rank", "2", "--lora-learning-rate", "0"], "--lora-learning-rate is 0.0; expected more than 0"),
        (
            ["x.csv", "o", "--clip", "c", "--llama", "l", "--initial-projector", "model"],
            "--initial-projector is model; expected random with --clip and --llama",
        ),
        (["--image-tokens", "0"], "--image-tokens is 0; expected at least 1"),
        (["--min-crop-area", "0"], "--min-crop-area is 0.0; expected more than 0, at most 1"),
        (["--min-crop-area", "0.5"], "--min-crop-area is 0.5; expected 1: kept features are those of whole images"),
        (["--projector", "query", "--image-tokens", "8"], "--image-features is pooled; expected patches, which --proj"),
        (
            ["--projector", "query", "--image-features", "patches"],
            "--image-tokens is None; expected a number with --pro",
        ),
        (["--image-features", "patches", "--image-tokens", "65"], "--image-tokens is 65; expected a square with"),
        (["--workers", "3:1"], "--workers is 3:1"),
        (["--device", "cuda:1"], "--device is cuda:1; expected auto or cpu"),
        (["demo", "s3://bucket/out", "--tensorboard"], "--tensorboard is given with s3://bucket/out"),
    ],
)
def test_a_flag_that_cannot_be_met_is_refused_by_name(arguments, message):
    with pytest.raises(ConfigError) as raised:
        parse(FitConfig, arguments)
    assert message in str(raised.value)


def test_without_arguments_the_demo_is_fitted():
    config = parse(FitConfig, [])
    assert (config.labels.labels_path, config.target.output, config.model.model) == ("demo", "demo-refit", None)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_any_tower_and_language_model_of_the_tables_are_tied_together(labels, tmp_path, kind):
    tower = str(tiny_models.save_siglip(tmp_path / "tower"))
    language = str(tiny_models.save_language(tmp_path / "language", kind))
    names = ["--vision-tower", tower, "--language-model", language]
    plan = plan_of(labels, str(tmp_path / "out"), *names)
    assert (plan.start.clip, plan.start.llama) == (tower, language)
    assert plan.start.template == "<|begin_of_text|>{image}"
    save_initial_bundle(parse(FitConfig, [labels, str(tmp_path / "out"), *names]), str(tmp_path / "bundle"))
    model = load(str(tmp_path / "bundle"), device="cpu")
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert model.encode(pixels).shape == (2, 1, 64)
    assert torch.equal(load_vision(tower, device="cpu").pooled(pixels), model.features(pixels))


def test_a_siglip_without_its_head_has_no_pooled_state_to_fit_to(labels, parts, tmp_path):
    tower = str(tiny_models.save_siglip(tmp_path / "tower", vision_use_head=False))
    with pytest.raises(BundleError, match=r"reads the pooled state, which the SigLIP in \S+ lacks: its head is not"):
        plan_of(labels, str(tmp_path / "out"), "--clip", tower, "--llama", parts[1])


def test_clip_and_llama_are_tied_together_without_any_bundle(labels, parts, tmp_path):
    plan = plan_of(labels, str(tmp_path / "out"), "--clip", parts[0], "--llama", parts[1], "--image-tokens", "3")
    assert (plan.start.clip, plan.start.llama) == parts
    assert (plan.start.projector.kind, plan.start.num_image_tokens) == ("linear", 3)
    assert plan.start.template == "<|begin_of_text|>{image}"
    assert plan.labels.counts()["train"] == (9, 18)
    assert len(plan.features.missing) == 12


def test_a_bundle_gives_clip_llama_and_template_but_not_its_projector(labels, tmp_path):
    bundle = save_tiny_bundle(tmp_path / "bundle")
    plan = plan_of(labels, str(tmp_path / "out"), "--model", bundle, "--projector", "mlp")
    assert plan.start.clip == f"{bundle}/clip"
    assert plan.start.projector.kind == "pooled_mlp"


def test_one_caption_an_image_makes_an_epoch_shorter_and_another_fit(labels, parts, tmp_path):
    models = [labels, str(tmp_path / "out"), "--clip", parts[0], "--llama", parts[1], "--batch-size", "3"]
    every, one = plan_of(*models), plan_of(*models, "--captions-per-epoch", "one")
    assert (every.num_steps, one.num_steps) == (6, 3)
    assert "captions_per_epoch" not in every.identity["training"]
    assert one.identity["training"]["captions_per_epoch"] == "one"
    assert [line for line in one.lines() if line.endswith("3 examples, one caption an image and epoch")]


def test_the_first_weights_follow_from_the_seed(labels, parts, tmp_path):
    def first(name, *flags):
        config = parse(FitConfig, [labels, "out", "--clip", parts[0], "--llama", parts[1], *flags])
        torch.rand(3)
        save_initial_bundle(config, str(tmp_path / name))
        return load_file(tmp_path / name / "projector.safetensors")["weight"]

    assert torch.equal(first("a"), first("b"))
    assert not torch.equal(first("a"), first("c", "--seed", "1"))


def test_a_caption_longer_than_the_llama_reads_is_refused(labels, parts, tmp_path):
    flags = ["--clip", parts[0], "--llama", parts[1], "--max-caption-tokens", "511"]
    with pytest.raises(ConfigError, match="expected at most 510"):
        plan_of(labels, str(tmp_path / "out"), *flags)
    assert not (tmp_path / "out").exists()


def test_a_template_that_the_tokenizer_does_not_know_is_refused(labels, parts, tmp_path):
    flags = ["--clip", parts[0], "--llama", parts[1], "--template", "<|nobody|>{image}"]
    with pytest.raises(BundleError, match="nobody"):
        plan_of(labels, str(tmp_path / "out"), *flags)


def test_a_llama_where_a_clip_should_be_is_refused(labels, parts, tmp_path):
    with pytest.raises((BundleError, ShapeError)):
        plan_of(labels, str(tmp_path / "out"), "--clip", parts[1], "--llama", parts[0])


def test_labels_that_are_not_there_are_named(parts, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        plan_of(str(tmp_path / "nowhere.jsonl"), str(tmp_path / "o"), "--clip", parts[0], "--llama", parts[1])


def test_other_labels_into_the_same_bundle_are_refused(labels, parts, tmp_path):
    flags = [str(tmp_path / "out"), "--clip", parts[0], "--llama", parts[1]]
    plan = plan_of(labels, *flags)
    plan.output.claim(plan.identity)
    other = tmp_path / "other"
    other.mkdir()
    changed = write_labels(other, {"train": 10, "validation": 3})
    with pytest.raises(Exception, match=r"labels: .* there, .* now"):
        plan_of(str(changed), *flags)


def test_what_changes_no_weight_may_change_in_a_rerun(labels, parts, tmp_path):
    flags = [labels, str(tmp_path / "out"), "--clip", parts[0], "--llama", parts[1]]
    plan = plan_of(*flags)
    plan.output.claim(plan.identity)
    again = plan_of(*flags, "--workers", "1:2", "--checkpoint-every", "7", "--log-every", "3", "--max-failures", "0")
    assert again.identity == plan.identity


def test_the_lines_of_a_plan_name_what_will_be_done(labels, parts, tmp_path):
    plan = plan_of(labels, str(tmp_path / "out"), "--clip", parts[0], "--llama", parts[1], "--batch-size", "6")
    text = "\n".join(plan.lines())
    assert "train 9 images 18 captions" in text
    assert "steps     3 of 6 examples" in text
    assert json.dumps(plan.identity)


RUNGS = [
    ([], "linear 48 -> 1 x 64", "features  12 of 12 images to compute"),
    (["--projector", "mlp"], "mlp 48 -> 16 x 64", "each a token: 16 (mlp)"),
    ([], "patch_linear 48 -> 16 x 64", "each a token: 16 (patch_linear)"),
    (["--image-tokens", "16"], "patch_linear 48 -> 16 x 64", "each a token: 16 (patch_linear)"),
    (["--image-tokens", "4"], "average_linear 48 -> 4 x 64", "averaged to 4 tokens (average_linear)"),
    (["--projector", "query", "--image-tokens", "3"], "query 48 -> 3 x 64", "read by 3 learned queries, each a token"),
    (["--projector", "mlp", "--image-tokens", "1"], "average_mlp 48 -> 1 x 64", "averaged to 1 tokens (average_mlp)"),
]


@pytest.mark.parametrize(("flags", "projector", "images"), RUNGS)
def test_the_plan_says_the_rung_and_that_pixels_are_streamed(labels, parts, tmp_path, flags, projector, images):
    on_patches = ["--image-features", "patches"] if "features" not in images else []
    plan = plan_of(labels, str(tmp_path / "out"), "--clip", parts[0], "--llama", parts[1], *on_patches, *flags)
    text = "\n".join(plan.lines())
    assert f"projector {projector}" in text
    assert images in text
    assert ("pixels    12 of 12 images to check; streamed into each step, never kept" in text) == bool(on_patches)


def test_the_plan_says_what_a_recipe_is_and_what_was_set_otherwise(labels, parts, tmp_path):
    flags = ["--clip", parts[0], "--llama", parts[1], "--recipe", "patches", "--epochs", "3"]
    plan = plan_of(labels, str(tmp_path / "out"), *flags)
    text = "\n".join(plan.lines())
    assert "recipe    patches: 136.3 CIDEr on COCO by a frozen LLaMA-7B" in text
    assert "DePALM (arXiv:2403.13499)" in text
    assert "--image-features patches, --min-crop-area 0.5" in text
    assert "but --epochs 3 in place of 8" in text
    assert "of 256 examples, one caption an image and epoch, crops of 0.5 or more of it" in text


def test_a_tower_without_a_cls_state_gives_all_its_states(labels, parts, tmp_path):
    siglip = str(tiny_models.save_siglip(tmp_path / "siglip"))
    flags = ["--clip", siglip, "--llama", parts[1], "--image-features", "patches", "--image-tokens", "4"]
    projector = plan_of(labels, str(tmp_path / "out"), *flags).start.projector
    assert (projector.kind, projector.vision_feature_select_strategy) == ("average_linear", "full")


def test_more_image_tokens_than_patches_are_refused(labels, parts, tmp_path):
    flags = ["--clip", parts[0], "--llama", parts[1], "--image-features", "patches", "--image-tokens", "25"]
    with pytest.raises(ConfigError, match=r"--image-tokens is 25; the CLIP in .* gives 16 patches .* at most 16"):
        plan_of(labels, str(tmp_path / "out"), *flags)


def test_the_plan_says_what_is_copied_of_images_inside_files(labels, parts, tmp_path):
    tar = pack_tar(Path(labels), tmp_path / "labels.tar")
    flags = [str(tar), str(tmp_path / "out"), "--clip", parts[0], "--llama", parts[1]]
    for more, expected in ([], 0), (["--image-features", "patches"], tar.stat().st_size):
        plan = plan_of(*flags, *more)
        copied = [line for line in plan.lines() if line.startswith("images ")]
        assert dry_run_summary(plan)["bytes_to_copy"] == expected
        assert len(copied) == bool(expected)
    assert re.fullmatch(rf"images    copied from inside their files to {tmp_path}/out/_run/\S+: at most 1 MB", *copied)


@pytest.mark.parametrize("rung", [[], ["--image-features", "patches"], [*ON_PATCHES, "--image-tokens", "4"]])
def test_a_rung_that_llava_does_not_know_is_refused_before_anything_is_written(labels, parts, tmp_path, rung):
    models = ["--clip", parts[0], "--llama", parts[1], "--save-as", "llava"]
    with pytest.raises(ConfigError, match=r"expected --image-features patches --projector mlp without --image-tokens"):
        plan_of(labels, str(tmp_path / "out"), *models, *rung)
    assert not (tmp_path / "out").exists()


def test_a_bundle_is_saved_as_llava_once(labels, parts, tmp_path):
    models = ["--clip", parts[0], "--llama", parts[1], "--template", "<|begin_of_text|>{image}\n"]
    plan = plan_of(labels, str(tmp_path / "out"), *models, *ON_PATCHES, "--save-as", "llava")
    assert f"llava     {tmp_path}/out/llava" in list(plan.lines())
    save_initial_bundle(plan.config, plan.output.url, plan.model_options)
    save_llava(plan)
    config = tmp_path / "out" / "llava" / "config.json"
    written = config.stat().st_mtime_ns
    save_llava(plan)
    assert config.stat().st_mtime_ns == written
    found = load(str(config.parent), device="cpu", prompt="<|begin_of_text|>{image}\n")
    own = load(plan.output.url, device="cpu")
    assert all(torch.equal(weight, own.projector.state_dict()[n]) for n, weight in found.projector.state_dict().items())


def test_what_is_known_of_checked_images_depends_on_no_tower(labels, parts, tmp_path):
    other = str(tiny_models.save_clip(tmp_path / "other", seed=5))
    flags = [labels, str(tmp_path / "out"), "--llama", parts[1], "--clip"]
    pooled, patches = ([plan_of(*flags, clip, *more).features.cache.url for clip in (parts[0], other)] for more in MORE)
    assert pooled[0] != pooled[1]
    assert patches[0] == patches[1] != pooled[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora-rank", "2", "--lora-modules", "q_proj,query"], r"--lora-modules names query; .* are q_proj, k_proj,"),
        (["--lora-rank", "40"], r"--lora-rank is 40; the narrowest of the maps .* is 32 wide: expected at most 32"),
        (["--lora-rank", "2", "--learning-rate", "0"], "--learning-rate is 0; expected more than 0 for a projector of"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused_before_anything_is_written(labels, parts, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(labels, str(tmp_path / "out"), "--clip", parts[0], "--llama", parts[1], *flags)
    assert not (tmp_path / "out").exists()


def test_lora_begins_with_the_projector_of_the_model_and_says_so(labels, tmp_path):
    bundle = save_tiny_bundle(tmp_path / "bundle", num_image_tokens=3)
    flags = [labels, str(tmp_path / "out"), "--model", bundle, "--lora-rank", "2", "--lora-modules", "q_proj,v_proj"]
    plan = plan_of(*flags)
    text = "\n".join(plan.lines())
    assert "projector linear 48 -> 3 x 64 (9,408 parameters, fitted, from its weights in --model)" in text
    assert "adapter   LoRA of rank 2, alpha 4 on q_proj, v_proj (896 parameters, fitted)" in text
    assert plan.config.training.image_tokens == 3
    assert "projector linear 48 -> 3 x 64 (9,408 parameters, frozen)" in "\n".join(
        plan_of(*flags, "--learning-rate", "0").lines()
    )
    start = save_initial_bundle(plan.config, str(tmp_path / "start"))
    own, begun = (load_file(f"{folder}/projector.safetensors") for folder in (bundle, tmp_path / "start"))
    assert all(torch.equal(weight, begun[name]) for name, weight in own.items())
    assert start.fingerprint == plan.start.fingerprint
    fresh = load_file(tmp_path / "start" / "adapter" / "adapter_model.safetensors")
    assert {bool(weight.any()) for name, weight in fresh.items() if "lora_B" in name} == {False}
    assert {bool(weight.any()) for name, weight in fresh.items() if "lora_A" in name} == {True}


def test_other_first_weights_are_another_fit(labels, tmp_path):
    bundle = save_tiny_bundle(tmp_path / "bundle")
    flags = [labels, str(tmp_path / "out"), "--model", bundle]
    random, begun = plan_of(*flags), plan_of(*flags, "--initial-projector", "model")
    assert "lora_rank" not in random.identity["training"]
    assert "start" not in random.identity
    weights = load_file(f"{bundle}/projector.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, f"{bundle}/projector.safetensors")
    again = plan_of(*flags, "--initial-projector", "model")
    assert again.identity["start"] != begun.identity["start"], "another projector in the same bundle"


def test_a_rung_beside_the_projector_of_the_model_is_refused_unless_it_is_its_own(labels, tmp_path):
    bundle = save_tiny_bundle(tmp_path / "bundle")
    flags = [labels, str(tmp_path / "out"), "--model", bundle, "--lora-rank", "2"]
    message = (
        r"--projector mlp is given, but the projector of \S+, which goes on learning, is of kind linear with 1 image"
    )
    with pytest.raises(ConfigError, match=message):
        plan_of(*flags, "--projector", "mlp")
    assert plan_of(*flags, "--projector", "mlp", "--initial-projector", "random").start.projector.kind == "pooled_mlp"


@pytest.mark.parametrize("flags", [["--early-stop", "3"], ["--keep-best-by", "cider"]])
def test_a_choice_between_weights_is_refused_where_nothing_judges_them(labels, parts, tmp_path, flags):
    alone = tmp_path / "alone"
    alone.mkdir()
    path = str(write_labels(alone, {"train": 9}))
    models = ["--clip", parts[0], "--llama", parts[1], "--validation-share", "0"]
    with pytest.raises(ConfigError, match=f"{' '.join(flags)} needs a validation split; .* --validation-share"):
        plan_of(path, str(tmp_path / "out"), *models, *flags)
    assert plan_of(path, str(tmp_path / "out"), *models)


def test_features_of_a_gpu_and_of_a_cpu_are_two_caches(labels, parts, tmp_path):
    plan = plan_of(labels, str(tmp_path / "out"), "--clip", parts[0], "--llama", parts[1])
    on_cpu, on_gpu = (plan.for_workers(has_gpus=has_gpus).features for has_gpus in (False, True))
    assert (on_cpu.model.dtype, on_gpu.model.dtype) == ("float32", "bfloat16")
    assert on_cpu.cache.url != on_gpu.cache.url
    assert plan.for_workers(has_gpus=False).features.cache.url == on_cpu.cache.url
    named = plan_of(labels, str(tmp_path / "out"), "--clip", parts[0], "--llama", parts[1], "--dtype", "float32")
    assert named.for_workers(has_gpus=True).features.cache.url == on_cpu.cache.url


@pytest.mark.slow
def test_credentials_by_flag_reach_labels_model_features_and_output(s3, labels, parts, tmp_path):
    bundle, options = save_tiny_bundle(tmp_path / "bundle"), json.dumps(s3.storage_options)
    for path in Path(bundle).rglob("*"):
        if path.is_file():
            s3.put(f"bundle/{path.relative_to(bundle)}", path.read_bytes())
    for path in Path(labels).parent.iterdir():
        s3.put(f"labels/{path.name}", path.read_bytes())
    model, remote = ["--model", f"{s3.url}/bundle"], f"{s3.url}/labels/labels.jsonl"
    for source, output, features in (
        (remote, f"{s3.url}/out", []),
        (remote, str(tmp_path / "out"), ["--features", f"{s3.url}/features"]),
        (labels, str(tmp_path / "other"), ["--features", f"{s3.url}/features"]),
        (labels, f"{s3.url}/more", ["--features", str(tmp_path / "features")]),
    ):
        plan = plan_of(source, output, *model, *features, "--storage-options", options)
        save_initial_bundle(plan.config, plan.output.initial_bundle_url, plan.model_options)
        plan.features.cache.claim()
        assert len(plan.features.missing) == 12
        initial, given = plan.output.initial_bundle_url, plan.model_options or None
        assert load(initial, device="cpu", storage_options=given, allow_remote_parts=True)
        assert load_vision(plan.start.clip, device="cpu", storage_options=dict(plan.features.clip_options) or None)


def test_a_model_has_storage_options_of_its_own(labels, tmp_path, s3):
    bundle, options = save_tiny_bundle(tmp_path / "bundle"), json.dumps(s3.storage_options)
    for path in Path(bundle).rglob("*"):
        if path.is_file():
            s3.put(f"bundle/{path.relative_to(bundle)}", path.read_bytes())
    flags = ["--model", f"{s3.url}/bundle", "--model-storage-options", options]
    plan = plan_of(labels, str(tmp_path / "out"), *flags)
    assert plan.model_options == plan.features.clip_options == s3.storage_options
    assert load_vision(plan.start.clip, device="cpu", storage_options=dict(plan.features.clip_options))
    with pytest.raises(
        ConfigError, match=r"--model-storage-options is given for s3://.*, which memory://out will name"
    ):
        plan_of(labels, "memory://out", *flags)
