import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from captioner.errors import BundleError, ConfigError, ShapeError
from captioner.model.bundle import describe, load, save_bundle
from captioner.model.projector import ProjectorConfig, build_projector
from captioner.model.projectors.linear import LinearProjector
from tests.unit.model.tiny_models import (
    CLIP_WIDTH,
    IMAGE_SIZE,
    LLAMA_WIDTH,
    clip_config,
    edit_json,
    llama3_tokenizer,
    llama_config,
    preprocessor_config,
    save_clip,
    save_llama,
    save_llava,
    write_json,
)

LLAMA_3_1_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
LINEAR = ProjectorConfig(kind="linear", num_features=CLIP_WIDTH, width=LLAMA_WIDTH, num_image_tokens=2)
MLP = replace(LINEAR, kind="mlp", num_image_tokens=16)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    save_clip(folder / "clip")
    save_llama(folder / "llama")
    torch.manual_seed(3)
    save_bundle(folder, build_projector(LINEAR), LINEAR, clip="clip", llama="llama", provenance={"data": "made up"})
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def test_the_fingerprint_of_the_embedded_bundle_stays():
    assert describe("demo").fingerprint == "973db9fc79ce458230781cf72d7fd8cc3fb78ddd50765634d80759c69be45321", (
        "tables that exist record it, and would not be continued"
    )


def test_a_description_has_the_facts_of_the_model(bundle: Path):
    told = describe(str(bundle))
    assert (told.kind, told.image_size, told.num_image_tokens, told.num_prompt_tokens) == ("bundle", IMAGE_SIZE, 2, 1)
    assert told.preprocessing == preprocessor_config()
    assert told.eos_token_ids == (257,)
    assert (told.context_length, told.vocab_size) == (512, 272)
    assert not told.has_text_tower, "its towers are both there, but no tokenizer for the one of text"
    llama3_tokenizer(num_special=2).save_pretrained(bundle / "clip")
    assert describe(str(bundle)).has_text_tower
    assert told.provenance == {"data": "made up"}
    assert told.projector_parameters == 2 * LLAMA_WIDTH * (CLIP_WIDTH + 1)
    model = load(str(bundle), device="cpu")
    assert told.clip_parameters == sum(p.numel() for p in model.vision_tower.parameters())
    assert told.llama_parameters == sum(p.numel() for p in model.llama.parameters())
    assert told.fingerprint == model.fingerprint
    assert "projector=linear:48->2x64" in told.summary


def test_a_description_reads_no_weights(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("safetensors.safe_open", lambda *_, **__: pytest.fail("weights were loaded"))
    describe(str(bundle))


def test_a_saved_projector_is_loaded_unchanged(bundle: Path):
    torch.manual_seed(9)
    projector = LinearProjector(LINEAR)
    save_bundle(bundle, projector, LINEAR, clip="clip", llama="llama")
    loaded = load(str(bundle), device="cpu").projector
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in projector.state_dict().items())


def test_a_bundle_can_name_models_elsewhere(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(original)
    told = save_bundle(tmp_path / "b", build_projector(LINEAR), LINEAR, clip="./clip", llama=str(original / "llama"))
    monkeypatch.chdir(tmp_path)
    assert describe(str(tmp_path / "b")) == told
    assert json.loads((tmp_path / "b/bundle.json").read_text())["clip"] == str(original / "clip")


def test_a_bundle_that_contains_its_models_can_be_moved(original: Path, tmp_path: Path):
    clip, llama = str(original / "clip"), str(original / "llama")
    told = save_bundle(tmp_path / "b", build_projector(LINEAR), LINEAR, clip=clip, llama=llama, carries_models=True)
    moved = shutil.move(tmp_path / "b", tmp_path / "moved")
    assert (json.loads((moved / "bundle.json").read_text())["clip"], (moved / "clip").is_dir()) == ("clip", True)
    assert load(str(moved), device="cpu").fingerprint == told.fingerprint


def test_configs_as_published_describe_the_same_model(bundle: Path):
    """rope_theta and rope_scaling apart, torch_dtype, and CLIP's vision_config_dict."""
    config = llama_config(rope_scaling=LLAMA_3_1_ROPE | {"rope_theta": 500000.0})
    save_llama(bundle / "llama", config)
    forget_fit(bundle)
    before = describe(str(bundle)).fingerprint
    path = bundle / "llama/config.json"
    raw = json.loads(path.read_text())
    del raw["rope_parameters"], raw["dtype"]
    write_json(path, raw | {"rope_theta": 500000.0, "rope_scaling": LLAMA_3_1_ROPE, "torch_dtype": "float32"})
    vision = json.loads((bundle / "clip/config.json").read_text())["vision_config"]
    extra = {"chunk_size_feed_forward": 0, "top_k": 50, "temperature": 1.0, "torch_dtype": None, "is_decoder": False}
    edit_json(
        bundle / "clip/config.json", vision_config=vision | extra, vision_config_dict=vision, text_config_dict=None
    )
    assert describe(str(bundle)).fingerprint == before


def test_an_mlp_bundle_captions_from_patches(original: Path, tmp_path: Path):
    save_bundle(tmp_path, build_projector(MLP), MLP, clip=str(original / "clip"), llama=str(original / "llama"))
    model = load(str(tmp_path), device="cpu")
    assert model.encode(torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)).shape == (2, 16, LLAMA_WIDTH)


def change_template(folder: Path) -> None:
    edit_json(folder / "bundle.json", template="<|begin_of_text|>a {image}")


def change_projector(folder: Path) -> None:
    tensors = load_file(folder / "projector.safetensors")
    tensors["bias"][3] += 1e-6
    save_file(tensors, folder / "projector.safetensors")


def change_clip(folder: Path) -> None:
    save_clip(folder / "clip", seed=77)
    forget_fit(folder)


def change_llama(folder: Path) -> None:
    save_llama(folder / "llama", seed=77)
    forget_fit(folder)


def change_rope(folder: Path) -> None:
    edit_json(folder / "llama/config.json", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    forget_fit(folder)


def change_tokenizer(folder: Path) -> None:
    llama3_tokenizer(num_special=15).save_pretrained(folder / "llama")
    forget_fit(folder)


def change_end_token(folder: Path) -> None:
    write_json(folder / "llama/generation_config.json", {"eos_token_id": [257, 265]})


def change_pixels(folder: Path) -> None:
    edit_json(folder / "clip/preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])


def forget_fit(folder: Path) -> None:
    edit_json(folder / "bundle.json", fitted_to={})


@pytest.mark.parametrize(
    "change",
    [
        change_template,
        change_projector,
        change_clip,
        change_llama,
        change_rope,
        change_tokenizer,
        change_end_token,
        change_pixels,
    ],
)
def test_every_input_that_affects_a_caption_changes_the_fingerprint(bundle: Path, change: Callable[[Path], None]):
    before = describe(str(bundle)).fingerprint
    change(bundle)
    assert describe(str(bundle)).fingerprint != before


def test_inputs_that_affect_no_caption_keep_the_fingerprint(bundle: Path, tmp_path: Path):
    before = describe(str(bundle)).fingerprint
    edit_json(bundle / "bundle.json", provenance={"note": "edited"})
    edit_json(bundle / "clip/preprocessor_config.json", processor_class="CLIPProcessor")
    edit_json(bundle / "llama/config.json", transformers_version="5.0.0")
    moved = shutil.move(bundle, tmp_path / "elsewhere")
    assert describe(str(moved)).fingerprint == before


def test_a_tower_is_the_same_with_and_without_a_text_tower(bundle: Path):
    from transformers import CLIPVisionModel

    llama3_tokenizer(num_special=2).save_pretrained(bundle / "clip")
    before = describe(str(bundle))
    assert before.has_text_tower
    CLIPVisionModel.from_pretrained(bundle / "clip").save_pretrained(bundle / "vision")
    write_json(bundle / "vision/preprocessor_config.json", preprocessor_config())
    edit_json(bundle / "bundle.json", clip="vision")
    after = describe(str(bundle))
    assert after.fingerprint == before.fingerprint
    assert not after.has_text_tower


BREAKS: dict[str, tuple[Callable[[Path], object], type[BundleError], str]] = {
    "a projector for another CLIP": (
        lambda b: save_clip(b / "clip", clip_config(hidden_size=40)),
        ShapeError,
        r"reads image features of width 48, the CLIP in \S*clip gives width 40",
    ),
    "a projector for another width of LLaMA": (
        lambda b: save_llama(b / "llama", llama_config(hidden_size=96, head_dim=16)),
        ShapeError,
        r"gives embeddings of width 64, the LLaMA in \S*llama reads width 96",
    ),
    "a projector fitted to another CLIP of the same width": (
        lambda b: save_clip(b / "clip", seed=77),
        BundleError,
        r"was fitted to another CLIP: bundle.json records fingerprint \w{12}, \S*clip has \w{12}; use the CLIP",
    ),
    "a projector fitted to another LLaMA of the same width": (
        lambda b: save_llama(b / "llama", seed=77),
        BundleError,
        r"was fitted to another LLaMA: bundle.json records fingerprint \w{12}, \S*llama has \w{12}",
    ),
    "a projector file of another shape": (
        lambda b: save_file({"weight": torch.zeros(64, 48), "bias": torch.zeros(64)}, b / "projector.safetensors"),
        ShapeError,
        r"do not fit LinearProjector: bias is \[64\], its config says \[128\]",
    ),
    "no projector file": (
        lambda b: (b / "projector.safetensors").unlink(),
        BundleError,
        r"has no file projector.safetensors",
    ),
    "an unknown projector": (
        lambda b: edit_json(b / "bundle.json", projector={"kind": "qformer", "num_features": 48, "width": 64}),
        BundleError,
        r"unknown projector kind 'qformer'; expected one of average_linear, average_mlp, linear, mlp, patch_linear",
    ),
    "a projector setting that is not known": (
        lambda b: edit_json(b / "bundle.json", projector={"kind": "linear", "depth": 3}),
        BundleError,
        r"the projector in \S*bundle.json is not understood: .*depth",
    ),
    "an MLP with the wrong number of image tokens": (
        lambda b: edit_json(b / "bundle.json", projector={"kind": "mlp", "num_features": 48, "width": 64}),
        ShapeError,
        r"says 1 image tokens, the CLIP in \S*clip gives 16 patch states",
    ),
    "a layer that CLIP does not have": (
        lambda b: edit_json(
            b / "bundle.json",
            projector={
                "kind": "mlp",
                "num_features": 48,
                "width": 64,
                "num_image_tokens": 16,
                "vision_feature_layer": -9,
            },
        ),
        BundleError,
        r"vision_feature_layer is -9, but the CLIP in \S*clip has 3 layers; expected -4 to 3",
    ),
    "no tokenizer": (
        lambda b: (b / "llama/tokenizer.json").unlink(),
        BundleError,
        r"llama has no tokenizer: expected tokenizer.json",
    ),
    "a tokenizer larger than the embedding": (
        lambda b: llama3_tokenizer(extra=("[PAD]",)).save_pretrained(b / "llama"),
        ShapeError,
        r"has token ids up to 272, its LLaMA embeds 272 tokens; expected ids below that",
    ),
    "a language model of another kind": (
        lambda b: edit_json(b / "llama/config.json", model_type="gpt2"),
        BundleError,
        r"has model_type 'gpt2'; supported are llama, mistral, qwen2, and fine-tunes",
    ),
    "a vision model of another kind": (
        lambda b: edit_json(b / "clip/config.json", model_type="dinov2"),
        BundleError,
        r"has model_type 'dinov2'; supported are clip, siglip and their vision towers alone: clip_vision_model, siglip",
    ),
    "preprocessing for another size": (
        lambda b: write_json(b / "clip/preprocessor_config.json", preprocessor_config(24)),
        ShapeError,
        r"makes images of 24x24 pixels, its CLIP reads 32x32",
    ),
    "a config that does not describe the weights": (
        lambda b: edit_json(b / "llama/config.json", intermediate_size=128),
        ShapeError,
        r"is \[64, 96\], its config says \[64, 128\]|is \[96, 64\], its config says \[128, 64\]",
    ),
    "a config with more layers than the weights": (
        lambda b: edit_json(b / "llama/config.json", num_hidden_layers=3),
        BundleError,
        r"missing model.layers.2.input_layernorm.weight, .* and 6 more",
    ),
    "a config that transformers refuses": (
        lambda b: edit_json(b / "llama/config.json", num_attention_heads=5),
        BundleError,
        r"llama/config.json is not a valid LlamaConfig",
    ),
    "a quantized model": (
        lambda b: edit_json(b / "llama/config.json", quantization_config={"quant_method": "gptq"}),
        BundleError,
        r"is a quantized checkpoint; expected the original weights",
    ),
    "no end token": (
        lambda b: (
            edit_json(b / "llama/config.json", eos_token_id=None),
            (b / "llama/generation_config.json").unlink(),
            edit_json(b / "llama/tokenizer_config.json", eos_token=None),
        ),
        BundleError,
        r"names no end token; expected eos_token_id",
    ),
    "a template without an image": (
        lambda b: edit_json(b / "bundle.json", template="<|begin_of_text|>"),
        BundleError,
        r"has 0 \{image\}; expected exactly one",
    ),
    "a prompt longer than the context": (
        lambda b: edit_json(b / "bundle.json", template="a b c d " * 150 + "{image}"),
        BundleError,
        r"take \d+ tokens, the LLaMA in \S*llama reads 512; expected a shorter prompt",
    ),
    "a later format": (
        lambda b: edit_json(b / "bundle.json", version=3),
        BundleError,
        r"bundle.json has version 3; this release reads versions 1 to 2: update captioner",
    ),
    "another format": (
        lambda b: write_json(b / "bundle.json", {"name": "a package of JavaScript"}),
        BundleError,
        r"bundle.json has format None; expected 'captioner-bundle'",
    ),
    "a bundle.json that is cut": (
        lambda b: (b / "bundle.json").write_text('{"format": "capt'),
        BundleError,
        r"bundle.json is not JSON",
    ),
    "a bundle.json that names no LLaMA": (
        lambda b: edit_json(b / "bundle.json", llama=None),
        BundleError,
        r"bundle.json has llama = None; expected a str",
    ),
    "a part that is not there": (
        lambda b: edit_json(b / "bundle.json", clip="clip-of-old"),
        BundleError,
        r"no model at 'clip-of-old' \(looked in: \S*bundle, ",
    ),
    "a part without a config": (
        lambda b: (b / "clip/config.json").unlink(),
        BundleError,
        r"clip has no file config.json",
    ),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_parts_that_do_not_fit_are_named_before_anything_is_loaded(bundle: Path, broken: str):
    break_it, error, message = BREAKS[broken]
    break_it(bundle)
    with pytest.raises(error, match=message):
        describe(str(bundle))


def test_loading_refuses_what_a_description_refuses(bundle: Path):
    save_llama(bundle / "llama", seed=77)
    with pytest.raises(BundleError, match="was fitted to another LLaMA"):
        load(str(bundle), device="cpu")


def test_saving_parts_that_do_not_fit_leaves_no_bundle(original: Path, tmp_path: Path):
    config = replace(LINEAR, width=32)
    clip, llama = str(original / "clip"), str(original / "llama")
    save_bundle(tmp_path, build_projector(LINEAR), LINEAR, clip=clip, llama=llama)
    with pytest.raises(ShapeError, match=r"gives embeddings of width 32, the LLaMA in \S* reads width 64"):
        save_bundle(tmp_path, build_projector(config), config, clip=clip, llama=llama)
    assert not (tmp_path / "bundle.json").exists()


def test_a_clip_without_preprocessing_gets_that_of_clip_and_a_warning(bundle: Path, caplog: pytest.LogCaptureFixture):
    (bundle / "clip/preprocessor_config.json").unlink()
    with caplog.at_level(logging.WARNING):
        told = describe(str(bundle))
    assert "event=preprocessing_assumed" in caplog.text
    assert told.preprocessing["crop_size"] == {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def test_preprocessing_is_found_where_newer_processors_save_it(bundle: Path):
    (bundle / "clip/preprocessor_config.json").unlink()
    write_json(bundle / "clip/processor_config.json", {"image_processor": preprocessor_config() | {"resample": 2}})
    assert describe(str(bundle)).preprocessing["resample"] == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"no model at '\S*model' \(looked in: .*\); expected `demo`, a folder, a URL"),
        (lambda path: path.mkdir(), r"is an empty folder; expected a bundle \(bundle.json\)"),
        (lambda path: path.write_text("weights"), r"is a file; expected the folder that holds the model"),
        (
            lambda path: (path.mkdir(), (path / "notes.txt").touch()),
            r"has no bundle.json; expected a bundle, or a LLaVA",
        ),
        (
            lambda path: save_llama(path),
            r"is a llama model; expected a bundle or a checkpoint of LlavaForCond.* fit one",
        ),
    ],
)
def test_a_location_without_a_model_is_refused_by_its_content(
    tmp_path: Path, make: Callable[[Path], object], message: str
):
    make(tmp_path / "model")
    with pytest.raises(BundleError, match=message):
        describe(str(tmp_path / "model"))


def test_a_llava_takes_a_question_or_a_whole_prompt(tmp_path: Path):
    folder = str(save_llava(tmp_path / "llava"))
    assert "\nDescribe the image in one sentence.<|eot_id|>" in describe(folder).template
    assert "{image}\nHow many dogs?<|eot_id|>" in describe(folder, prompt="How many dogs?").template
    assert describe(folder, prompt="{image} is").template == "{image} is"
    assert describe(folder, prompt="<image> is").template == "{image} is", "as model cards write it"
    assert describe(folder, prompt="How?").fingerprint != describe(folder).fingerprint


def test_a_bundle_takes_no_other_prompt_than_its_own(bundle: Path):
    with pytest.raises(
        ConfigError, match=r"--prompt is 'Why\?', but .* is a bundle, whose projector was fitted with its own"
    ):
        describe(str(bundle), prompt="Why?")


def test_a_llava_over_another_language_model_is_refused(tmp_path: Path):
    folder = save_llava(tmp_path / "llava")
    edit_json(folder / "config.json", text_config={"model_type": "gpt2"})
    with pytest.raises(
        BundleError,
        match=r"is over clip_vision_model and gpt2; supported are the towers clip_vision_model, siglip_vision_model "
        r"and the language models llama, mistral, qwen2",
    ):
        describe(str(folder))


def test_a_llava_with_an_unknown_tokenizer_asks_for_the_whole_prompt(tmp_path: Path):
    reserved = tuple(f"<|more_{number}|>" for number in range(13))
    folder = save_llava(tmp_path / "llava", tokenizer=llama3_tokenizer(num_special=4, extra=reserved))
    with pytest.raises(
        BundleError,
        match=r"has no chat template and is not one of LLaMA, which has <\|start_header_id\|> or <s>, .* as "
        r"--prompt 'USER: \{image\}",
    ):
        describe(str(folder))
    assert describe(str(folder), prompt="USER: {image} ASSISTANT:").num_image_tokens == 16


@pytest.mark.parametrize("device", ["cuda:93", "tpu!", "mps", "meta"])
def test_a_device_that_is_not_there_is_refused(bundle: Path, device: str):
    with pytest.raises(ConfigError, match=rf"--device is {device}"):
        load(str(bundle), device=device)


def test_nothing_is_printed_or_warned_of_while_a_model_is_loaded(bundle: Path, tmp_path: Path):
    save_llava(tmp_path / "llava")
    code = (
        "import sys; from captioner.model.bundle import describe, load\n"
        "for name in sys.argv[1:]: describe(name); load(name, device='cpu')"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(bundle), str(tmp_path / "llava")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "file", ["bundle.json", "clip/config.json", "clip/preprocessor_config.json", "llama/config.json"]
)
@pytest.mark.parametrize("change", ["deep", "list", "null", "number", "text"])
def test_a_json_file_of_any_content_is_refused_or_read_and_never_a_traceback(bundle: Path, file: str, change: str):
    values = {"list": [], "null": None, "number": 1e400, "text": "\x1b"}
    path = bundle / file
    if change == "deep":
        path.write_text("[" * 100_000)
        with pytest.raises(BundleError, match="is not JSON: it is nested too deep"):
            describe(str(bundle))
        return
    content = json.loads(path.read_text())
    for name in content:
        path.write_text(json.dumps({**content, name: values[change]}))
        with contextlib.suppress(BundleError):
            describe(str(bundle))
