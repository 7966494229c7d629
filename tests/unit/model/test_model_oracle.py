"""Ours = transformers' with the same weights, fp32 on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel, CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration

from captioner.config import DecodingConfig
from captioner.errors import ShapeError
from captioner.model.bundle import describe, load, save_bundle
from captioner.model.caption_model import CaptionModel
from captioner.model.folder import Folder
from captioner.model.loading import load_clip
from captioner.model.projector import ProjectorConfig, build_projector
from captioner.schema import FinishReason
from tests.unit.model.tiny_models import (
    CLIP_WIDTH,
    IMAGE_SIZE,
    LLAMA_WIDTH,
    llama3_tokenizer,
    llama_config,
    save_clip,
    save_llama,
    save_llava,
)

INSTRUCT = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{image}\nWhat is this?<|eot_id|>"
LLAMA_3_2_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8,
}


def pixels(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=generator)


def normalised(images: Tensor) -> Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def save_linear_bundle(folder: Path, template: str = "<|begin_of_text|>{image}", **llama: Any) -> Path:
    save_clip(folder / "clip")
    save_llama(folder / "llama", **llama)
    torch.manual_seed(3)
    config = ProjectorConfig(kind="linear", num_features=CLIP_WIDTH, width=LLAMA_WIDTH, num_image_tokens=2)
    save_bundle(folder, build_projector(config), config, clip="clip", llama="llama", template=template)
    return folder


def greedy(model: CaptionModel, images: Tensor, length: int = 12) -> list[list[int]]:
    return [g.token_ids for g in model.generate(model.encode(images), DecodingConfig(max_new_tokens=length))]


def greedy_of_transformers(folder: Path, embeds: Tensor, length: int = 12) -> list[list[int]]:
    llama = LlamaForCausalLM.from_pretrained(folder)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    out = llama.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=0
    )
    return out.tolist()


VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "sharded": {"max_shard_size": "50KB"},
    "tied embeddings": {"config": llama_config(tie_word_embeddings=True)},
    "rope scaling of 3.1 and 3.2": {"config": llama_config(rope_scaling=LLAMA_3_2_ROPE | {"rope_theta": 500000.0})},
    "an instruct tokenizer": {"tokenizer": llama3_tokenizer(eos="<|eot_id|>")},
    "a padded vocabulary": {"config": llama_config(vocab_size=320)},
    "a head size of its own": {"config": llama_config(head_dim=24)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_of_a_bundle_are_those_of_transformers(tmp_path: Path, variant: str):
    folder = save_linear_bundle(tmp_path, **VARIANTS[variant])
    model = load(str(folder), device="cpu")
    reference = LlamaForCausalLM.from_pretrained(folder / "llama")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, model.llama.state_dict()[name]), name
    start = reference.get_input_embeddings()(torch.tensor([[256]])).expand(3, -1, -1)
    embeds = torch.cat([start, model.encode(pixels())], dim=1)
    expected = greedy_of_transformers(folder / "llama", embeds)
    assert [ids[: len(ours)] for ids, ours in zip(expected, greedy(model, pixels()), strict=True)] == greedy(
        model, pixels()
    )
    assert len({tuple(ids) for ids in expected}) > 1, "the images make a difference"


def test_the_pooled_features_are_the_normalised_cls_state(tmp_path: Path):
    folder = save_linear_bundle(tmp_path)
    model = load(str(folder), device="cpu")
    reference = CLIPVisionModel.from_pretrained(folder / "clip")
    expected = reference(normalised(pixels())).pooler_output
    torch.testing.assert_close(model.features(pixels()), expected, rtol=1e-5, atol=1e-6)


def test_both_towers_can_be_loaded_for_clipscore(tmp_path: Path):
    llama3_tokenizer(num_words=256, num_special=2).save_pretrained(save_clip(tmp_path))
    clip, tokenizer = load_clip(Folder.local(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    reference = CLIPModel.from_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("a dog", add_special_tokens=False).input_ids]) % 98
    torch.testing.assert_close(
        clip.get_text_features(ids).pooler_output, reference.get_text_features(ids).pooler_output.detach()
    )
    assert not any(parameter.requires_grad for parameter in clip.parameters())


def llava_tokens(
    folder: Path, images: Tensor, prompt_before: list[int], prompt_after: list[int], length: int
) -> list[list[int]]:
    """What transformers' own class writes for this prompt around the image."""
    reference = LlavaForConditionalGeneration.from_pretrained(folder)
    full = reference.config.vision_feature_select_strategy == "full"
    ids = torch.tensor([[*prompt_before, *[272] * (17 if full else 16), *prompt_after]]).expand(len(images), -1)
    out = reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=normalised(images),
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=273,
    )
    return out[:, ids.shape[1] :].tolist()


def old_layout(folder: Path) -> None:
    """Rewrites the names as transformers 4.40 saved them, `vision_tower.vision_model` and all."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in load_file(file).items()}
    renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(renamed, file, metadata={"format": "pt"})


def new_layout(folder: Path) -> None:
    """Rewrites the names as transformers 4.52 saved them, `model.` first."""
    from safetensors.torch import load_file, save_file

    def rename(name: str) -> str:
        name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model", "language_model")
        return name if name.startswith("lm_head") else f"model.{name}"

    file = folder / "model.safetensors"
    save_file({rename(name): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})


LLAVA_SETTINGS: list[dict[str, Any]] = [
    {},
    {"vision_feature_layer": 2},
    {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    {"multimodal_projector_bias": False, "text": {"tie_word_embeddings": True}},
    {"tie_word_embeddings": True},
]


@pytest.mark.parametrize("layout", [lambda folder: None, old_layout, new_layout], ids=["current", "old", "new"])
@pytest.mark.parametrize("settings", LLAVA_SETTINGS, ids=str)
def test_a_llava_checkpoint_gives_the_tokens_of_transformers(tmp_path: Path, layout: Any, settings: dict[str, Any]):
    folder = save_llava(tmp_path / "llava", **settings)
    layout(folder)
    model = load(str(folder), device="cpu")
    before, after = list(model.template.prefix_ids), list(model.template.suffix_ids)
    expected = llava_tokens(folder, pixels(), before, after, length=12)
    ours = greedy(model, pixels())
    assert [ids[: len(o)] for ids, o in zip(expected, ours, strict=True)] == ours
    assert len({tuple(ids) for ids in ours}) > 1, "the images make a difference"


def test_the_prompt_of_a_llava_is_tokenised_as_its_processor_does(tmp_path: Path):
    folder = save_llava(tmp_path / "llava")
    model = load(str(folder), device="cpu")
    text = "<|start_header_id|>user<|end_header_id|>\n\n<image>\nDescribe the image in one sentence.<|eot_id|>"
    text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    template = model.template
    assert model.tokenizer(text).input_ids == [*template.prefix_ids, 272, *template.suffix_ids]


def test_a_llava_caption_ends_at_the_end_of_its_turn(tmp_path: Path):
    """Published LLaVA-LLaMA-3 checkpoints name only <|end_of_text|> in generation_config.json."""
    assert describe(str(save_llava(tmp_path / "llava"))).eos_token_ids == (257, 265)


def test_the_mlp_reads_the_states_of_its_layer_and_later_layers_are_not_loaded(tmp_path: Path):
    folder = save_llava(tmp_path / "llava")
    model = load(str(folder), device="cpu")
    reference = LlavaForConditionalGeneration.from_pretrained(folder).model.vision_tower
    states = reference(normalised(pixels()), output_hidden_states=True).hidden_states
    assert len(model.vision_tower.encoder.layers) == len(states) - 2
    torch.testing.assert_close(model.features(pixels()), states[-2][:, 1:], rtol=1e-5, atol=1e-6)


def test_captions_do_not_depend_on_their_batch(tmp_path: Path):
    model = load(str(save_linear_bundle(tmp_path, template=INSTRUCT)), device="cpu")
    together = greedy(model, pixels())
    assert together == [greedy(model, pixels()[i : i + 1])[0] for i in range(3)]


def test_generation_settings_of_a_checkpoint_do_not_affect_decoding(tmp_path: Path):
    folder = save_linear_bundle(tmp_path)
    before = greedy(load(str(folder), device="cpu"), pixels())
    (folder / "llama/generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [257, 265], "repetition_penalty": 9.0}'
    )
    assert greedy(load(str(folder), device="cpu"), pixels()) == before


def test_a_caption_ends_with_its_end_token_or_at_its_length(tmp_path: Path):
    model = load(str(save_linear_bundle(tmp_path)), device="cpu")
    cut = model.generate(model.encode(pixels(1)), DecodingConfig(max_new_tokens=3))[0]
    assert (len(cut.token_ids), len(cut.logprobs), cut.finish_reason) == (3, 3, FinishReason.LENGTH)
    sampled = model.generate(
        model.encode(pixels(1)), DecodingConfig(do_sample=True, num_captions=60, max_new_tokens=12)
    )
    ended = [g for g in sampled if g.finish_reason is FinishReason.STOP]
    assert ended, "some of sixty drawn captions end"
    assert all(g.token_ids[-1] in model.eos_token_ids and len(g.logprobs) == len(g.token_ids) for g in ended)
    assert all(set(g.token_ids[:-1]).isdisjoint(model.eos_token_ids) for g in ended)


def test_text_has_no_special_tokens_and_no_surrounding_spaces(tmp_path: Path):
    model = load(str(save_linear_bundle(tmp_path)), device="cpu")
    ids = model.tokenizer(" a dog , running .", add_special_tokens=False).input_ids
    assert model.text([256, *ids, 257]) == "a dog , running ."


@pytest.mark.parametrize("bad", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)])
def test_pixels_of_another_shape_or_type_are_refused(tmp_path: Path, bad: Tensor):
    model = load(str(save_linear_bundle(tmp_path)), device="cpu")
    with pytest.raises(ShapeError, match=r"expected torch.uint8\[B, 3, 32, 32\]"):
        model.encode(bad)


def test_a_loaded_model_has_no_gradients(tmp_path: Path):
    model = load(str(save_linear_bundle(tmp_path)), device="cpu")
    modules = (model.vision_tower, model.projector, model.llama)
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert not any(module.training for module in modules)


def test_every_part_has_the_dtype_that_was_asked_for(tmp_path: Path):
    model = load(str(save_linear_bundle(tmp_path)), device="cpu", dtype="bfloat16")
    modules = (model.vision_tower, model.projector, model.llama)
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.bfloat16}
    assert model.llama.model.rotary_emb.inv_freq.dtype == torch.float32, "positions need their bits"
    assert model.encode(pixels()).dtype == torch.bfloat16
    assert load(str(tmp_path), device="cpu").dtype == torch.float32, "auto on a CPU"
