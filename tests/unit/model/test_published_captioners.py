"""Published captioners give the tokens of transformers' own classes: fp32 on a CPU, tiny random weights."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, MistralForCausalLM, SiglipImageProcessor, SiglipVisionModel

from captioner.captioning.captioner import Captioner
from captioner.config import DecodingConfig, ImageConfig
from captioner.decoding import Engine, Request
from captioner.decoding.cuda import FusedLlama, operations_for
from captioner.errors import BundleError, ConfigError
from captioner.images import Decoded, Decoder, Preprocessing
from captioner.model.bundle import describe, load
from captioner.model.caption_model import CaptionModel
from captioner.model.language.table import LANGUAGE_MODELS, language_config
from captioner.model.module import shapes_of
from captioner.model.towers.siglip import SiglipConfig, siglip_shapes
from tests.unit.model import tiny_models
from tests.unit.model.test_model_oracle import greedy, pixels
from tests.unit.model.tiny_models import IMAGE_SIZE, clip_config, save_llava, siglip_config

TOWERS = {"clip": lambda: clip_config().vision_config, "siglip": siglip_config}
LENGTH = 12


def expected_tokens(folder: Path, model: CaptionModel, images: Tensor) -> list[list[int]]:
    """What transformers' own class writes for the model's prompt around each image, up to an end token."""
    reference = LlavaForConditionalGeneration.from_pretrained(folder)
    image = [reference.config.image_token_index] * model.num_image_tokens
    ids = torch.tensor([[*model.template.prefix_ids, *image, *model.template.suffix_ids]]).expand(len(images), -1)
    out = reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=model.vision.normalised(images),
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=list(model.eos_token_ids),
        pad_token_id=model.eos_token_ids[0],
    )
    rows = out[:, ids.shape[1] :].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in model.eos_token_ids), LENGTH) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def engine_tokens(model: CaptionModel, images: Tensor, **options: Any) -> list[list[int]]:
    embeds = model.request_embeddings(model.encode(images))
    engine = Engine(
        model.llama,
        decodings=[DecodingConfig(max_new_tokens=LENGTH)],
        eos_token_ids=model.eos_token_ids,
        shared_prefix=model.prompt_embeddings(),
        max_prefix_len=embeds.shape[1],
        slots=4,
        **options,
    )
    found = {
        one.id: list(one.hypotheses[0].token_ids)
        for one in engine.generate([Request(id=str(i), prefix=row, seed=i) for i, row in enumerate(embeds)])
    }
    return [found[str(index)] for index in range(len(images))]


@pytest.mark.parametrize("language", LANGUAGE_MODELS)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_a_llava_over_any_tower_and_language_model_gives_the_tokens_of_transformers(
    tmp_path: Path, tower: str, language: str, strategy: str
) -> None:
    folder = save_llava(
        tmp_path,
        vision=TOWERS[tower](),
        language=tiny_models.language_config(language),
        vision_feature_select_strategy=strategy,
    )
    model = load(str(folder), device="cpu", prompt="<|begin_of_text|>USER: {image}\nDescribe. ASSISTANT:")
    images = pixels(6)
    expected = expected_tokens(folder, model, images)
    assert greedy(model, images, LENGTH) == expected
    words = [[token for token in ids if token not in model.eos_token_ids] for ids in expected]
    assert engine_tokens(model, images) == words
    fused = FusedLlama(model.llama, operations_for(model.device))
    assert engine_tokens(model, images, layers=fused) == words, "products joined, as on a CUDA device"
    assert len({tuple(ids) for ids in expected}) > 1, "the images make a difference"


@pytest.mark.parametrize("layer", [-1, -2, 1, 0])
def test_the_states_of_siglip_are_those_of_the_layer_before_its_last_norm(tmp_path: Path, layer: int) -> None:
    folder = save_llava(
        tmp_path, vision=siglip_config(), vision_feature_layer=layer, vision_feature_select_strategy="full"
    )
    model = load(str(folder), device="cpu")
    tower = LlavaForConditionalGeneration.from_pretrained(folder).model.vision_tower
    expected = tower(model.vision.normalised(pixels()), output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(model.features(pixels()), expected, rtol=1e-5, atol=1e-6)
    assert model.num_image_tokens == (IMAGE_SIZE // 8) ** 2, "no CLS"


def test_siglip_without_its_head_is_read_for_its_patches(tmp_path: Path) -> None:
    folder = save_llava(tmp_path, vision=siglip_config(vision_use_head=False), vision_feature_select_strategy="full")
    model = load(str(folder), device="cpu")
    assert greedy(model, pixels(), LENGTH) == expected_tokens(folder, model, pixels())


def test_the_tensors_of_siglip_are_those_of_the_module() -> None:
    raw = siglip_config().to_dict()
    assert siglip_shapes(SiglipConfig.read(raw, where="")) == shapes_of(SiglipVisionModel(siglip_config()))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_language_config_is_read_as_transformers_reads_it(kind: str) -> None:
    family = LANGUAGE_MODELS[kind]
    config_class, model_class = family.classes()
    for raw in ({}, tiny_models.language_config(kind).to_dict()):
        theirs = config_class.from_dict(raw)
        ours = language_config({"model_type": kind, **raw}, "here")[1]
        for name in set(ours.own_values()) - {"rope_parameters", "attention_bias", "mlp_bias", "head_dim"}:
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.rope_parameters == theirs.rope_parameters
    module = model_class(tiny_models.language_config(kind))
    assert family.shapes(ours) == shapes_of(module)


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    prompt = "{image}"
    windowed = save_llava(tmp_path / "w", language=tiny_models.language_config("mistral", sliding_window=40))
    model = load(str(windowed), device="cpu", prompt=prompt)
    assert describe(str(windowed), prompt=prompt).context_length == model.context_length == 40
    assert greedy(model, pixels(), LENGTH) == expected_tokens(windowed, model, pixels()), "inside it nothing changes"
    assert model.llama.config.max_position_embeddings == 512, "transformers' config says what it said"
    with pytest.raises(ConfigError, match="the model's context holds 40"):
        Captioner(model, DecodingConfig(max_new_tokens=30), slots="1")
    narrow = save_llava(tmp_path / "n", language=tiny_models.language_config("mistral", sliding_window=16))
    with pytest.raises(BundleError, match=r"take 16 tokens, the Mistral in \S+ reads 16; expected a shorter prompt"):
        describe(str(narrow), prompt=prompt)
    free = save_llava(tmp_path / "f", language=tiny_models.language_config("mistral", sliding_window=None))
    assert describe(str(free), prompt=prompt).context_length == 512
    assert isinstance(model.llama, MistralForCausalLM)


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "a tower": (
        {"model_type": "llava", "vision_config": {"model_type": "pixtral"}},
        r"is over pixtral and llama; supported are the towers clip_vision_model, siglip_vision_model and the language",
    ),
    "SigLIP 2 of any resolution": (
        {"model_type": "llava", "vision_config": {"model_type": "siglip2_vision_model"}},
        r"is over siglip2_vision_model and llama; supported are the towers clip_vision_model, siglip_vision_model",
    ),
    "several layers": (
        {"model_type": "llava", "vision_feature_layer": [-2, -5]},
        r"reads the hidden states \[-2, -5\]; expected one layer",
    ),
    "another class": (
        {"model_type": "blip-2"},
        r"is a blip-2 model; expected a bundle or a checkpoint of LlavaForConditionalGeneration, .* or .* over "
        r"clip_vision_model, siglip_vision_model and llama, mistral, qwen2",
    ),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_is_not_supported_is_refused_before_weights_are_fetched(kind: str) -> None:
    config, message = UNSUPPORTED[kind]
    store = fsspec.filesystem("memory")
    store.pipe_file("/captioner/config.json", json.dumps(config).encode())
    with pytest.raises(BundleError, match=message):  # there are no weights to fetch
        load("memory://captioner", device="cpu")


def test_siglip_is_given_the_pixels_of_its_own_processor(tmp_path: Path) -> None:
    """As JoyCaption: SigLIP's processor as saved, all patches of one layer, a system prompt."""
    folder = save_llava(tmp_path, vision=siglip_config(vision_use_head=False), vision_feature_select_strategy="full")
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    SiglipImageProcessor(size=size).save_pretrained(folder)
    model = load(str(folder), device="cpu", system_prompt="You are a helpful image captioner.")
    assert model.template.text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are")
    wide = Image.effect_mandelbrot((640, 64), (-2, -1, 1, 1), 50).convert("RGB")
    theirs = SiglipImageProcessor(size=size)(wide, return_tensors="pt").pixel_values
    decoder = Decoder(Preprocessing.from_config(model.preprocessing), ImageConfig())
    ours = decoder.decode_image(wide)
    decoder.close()
    assert isinstance(ours, Decoded)
    found = model.vision.normalised(torch.from_numpy(ours.pixels)[None])
    torch.testing.assert_close(found, theirs, rtol=0, atol=2.1 / 127.5)
    assert greedy(model, torch.from_numpy(ours.pixels)[None], LENGTH)
