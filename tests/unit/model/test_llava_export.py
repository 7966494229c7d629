"""A bundle saved as LLaVA is what transformers' own classes load, and gives the tokens of the bundle."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaConfig

from captioner.errors import ConfigError
from captioner.model.bundle import load, save_as_llava, save_bundle
from captioner.model.folder import Folder
from captioner.model.language.table import LANGUAGE_MODELS, read_language
from captioner.model.layouts.llava_export import check_llava
from captioner.model.projector import ProjectorConfig, build_projector
from tests.unit.model import tiny_models
from tests.unit.model.test_model_oracle import pixels
from tests.unit.model.test_published_captioners import engine_tokens, expected_tokens

TEMPLATE = "<|begin_of_text|>Look:\n{image}\nIt shows"
MLP = ProjectorConfig(
    kind="mlp", num_features=tiny_models.CLIP_WIDTH, width=tiny_models.LLAMA_WIDTH, num_image_tokens=16
)


def saved(folder: Path, *, tower: str = "clip", language: str | None = None) -> tuple[Path, Path]:
    """A bundle, and the same as LLaVA."""
    strategy = "default" if tower == "clip" else "full"
    tiny_models.save_clip(folder / "clip") if tower == "clip" else tiny_models.save_siglip(folder / "clip")
    if language == "tied":
        tiny_models.save_llama(folder / "llama", tiny_models.llama_config(tie_word_embeddings=True))
    elif language:
        tiny_models.save_language(folder / "llama", language)
    else:
        tiny_models.save_llama(folder / "llama")
    config = ProjectorConfig(**{**vars(MLP), "vision_feature_select_strategy": strategy})
    torch.manual_seed(5)
    save_bundle(folder, build_projector(config), config, clip="clip", llama="llama", template=TEMPLATE)
    save_as_llava(str(folder), str(folder / "llava"))
    return folder, folder / "llava"


@pytest.mark.parametrize(
    ("tower", "language"),
    [("clip", None), ("siglip", None), ("clip", "tied"), *(("clip", kind) for kind in LANGUAGE_MODELS)],
)
def test_transformers_loads_it_and_writes_the_tokens_of_the_bundle(
    tmp_path: Path, tower: str, language: str | None
) -> None:
    bundle, llava = saved(tmp_path, tower=tower, language=language)
    model = load(str(bundle), device="cpu")
    images = pixels(3)
    tokens = engine_tokens(model, images)
    written = expected_tokens(llava, model, images)
    assert tokens == [[token for token in row if token not in model.eos_token_ids] for row in written]
    again = load(str(llava), device="cpu", prompt=TEMPLATE)
    assert engine_tokens(again, images) == tokens


def test_its_processor_writes_the_prompt_of_the_bundle_around_as_many_tokens_as_patches(tmp_path: Path) -> None:
    bundle, llava = saved(tmp_path)
    model = load(str(bundle), device="cpu")
    processor = AutoProcessor.from_pretrained(llava)
    prompt = processor.apply_chat_template([{"role": "user", "content": "whatever"}])
    assert prompt == TEMPLATE.replace("{image}", "<image>")
    image = LlavaConfig.from_pretrained(llava).image_token_index
    ids = processor.tokenizer(prompt, add_special_tokens=False).input_ids
    assert ids == [*model.template.prefix_ids, image, *model.template.suffix_ids]


def test_an_image_token_that_the_model_has_no_row_for_gets_one_that_wins_no_draw(tmp_path: Path) -> None:
    _, llava = saved(tmp_path)
    config = json.loads((llava / "config.json").read_text())
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (272, 320)


@pytest.mark.parametrize("kind", ["linear", "patch_linear", "average_mlp"])
def test_a_projector_that_llava_does_not_know_is_refused(tmp_path: Path, kind: str) -> None:
    llama = read_language(Folder.local(tiny_models.save_llama(tmp_path)), template=TEMPLATE)
    config = ProjectorConfig(**{**vars(MLP), "kind": kind})
    with pytest.raises(ConfigError, match=f"--save-as llava is given for a projector of kind {kind} over a clip"):
        check_llava(config, "clip_vision_model", llama, TEMPLATE)
    check_llava(MLP, "clip_vision_model", llama, TEMPLATE)
