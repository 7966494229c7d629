"""A bundle as transformers' LLaVA: a folder that `LlavaForConditionalGeneration` and what reads it load as it is.

    config.json model*.safetensors generation_config.json           tower, projector and language model
    tokenizer.json tokenizer_config.json chat_template.jinja        the tokenizer with `<image>`; the template's prompt
    preprocessor_config.json processor_config.json                  what `LlavaProcessor` does to an image

Knows the parts of a model and that layout; not where a bundle lies. `check_llava` brings no torch.
"""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from captioner.errors import ConfigError
from captioner.model.language.language import LanguageSource
from captioner.model.projector_config import ProjectorConfig
from captioner.model.template import IMAGE, Template
from captioner.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from captioner.model.parts import Parts
    from captioner.model.weights import Weights

__all__ = ["IMAGE_TOKEN", "check_llava", "save_llava"]

IMAGE_TOKEN = "<image>"
_ROWS = 64  # of which the number of embedded tokens is a multiple, as accelerators like it
_PROCESSORS = {"clip_vision_model": "CLIPImageProcessor", "siglip_vision_model": "SiglipImageProcessor"}


def check_llava(projector: ProjectorConfig, tower_type: str, language: LanguageSource, template: str) -> None:
    """Raise ConfigError unless a bundle of these parts is one of LLaVA's layout, and is asked as it was fitted.

    tower_type: model_type of the vision tower's config."""
    if projector.kind != "mlp" or tower_type not in _PROCESSORS:
        raise ConfigError(
            f"--save-as llava is given for a projector of kind {projector.kind} over a {tower_type}; LLaVA has two"
            f" linear maps of each patch over {' or '.join(_PROCESSORS)}: expected --image-features patches --projector"
            " mlp without --image-tokens"
        )
    own = Template.parse(template, language.tokenizer, IMAGE_TOKEN)  # a checkpoint's tokenizer may have the token
    marked = _with_image_token(language.tokenizer)
    theirs = Template.parse(template, marked, IMAGE_TOKEN)
    if (own.prefix_ids, own.suffix_ids) != (theirs.prefix_ids, theirs.suffix_ids):
        raise ConfigError(
            f"--save-as llava: the tokens of the template {template!r} change where the image is written {IMAGE_TOKEN},"
            " as LLaVA's processor does; expected one in which a line ends, or a special token follows, after the image"
        )


def _with_image_token(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer that also has `<image>`."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([tokenizers.AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    return Tokenizer(backend, tokenizer.bos_token, tokenizer.eos_token)


def save_llava(parts: "Parts", folder: Path) -> None:
    """Write the checkpoint into a local folder. The parts' folders must be on disk; the weights are held in memory."""
    from captioner.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(parts.language.tokenizer_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    image_id = int(tokenizer.get_added_vocab()[IMAGE_TOKEN])
    model = _model(parts, image_id)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    language_dtype = _dtype_of(parts.language.weights)
    _edit(folder / "config.json", dtype=str(language_dtype).removeprefix("torch."))
    prompt = parts.template.text.replace(IMAGE, IMAGE_TOKEN)
    (folder / "chat_template.jinja").write_text("{{ " + json.dumps(prompt) + " }}")
    _write_processor(parts, folder)


def _model(parts: "Parts", image_id: int) -> Any:
    """Return the whole model, each part in the number format in which it is stored."""
    import torch
    from transformers import GenerationConfig, LlavaForConditionalGeneration

    from captioner.model.module import allocate, freeze

    cpu, dtype = torch.device("cpu"), _dtype_of(parts.language.weights)
    model: Any = allocate(LlavaForConditionalGeneration, _config(parts, image_id), dtype=dtype, device=cpu)
    model.tie_weights()
    inner = model.model
    inner.vision_tower.to(_dtype_of(parts.tower.weights))
    inner.multi_modal_projector.to(_dtype_of(parts.projector_weights))
    for name, tensor in inner.vision_tower.named_parameters():
        if name.removeprefix("vision_model.") in parts.tower.family.unused(parts.tower.config):
            tensor.data.zero_()  # no patch state passes through it, and the tower may lack it
    wrapped = "vision_model." if hasattr(inner.vision_tower, "vision_model") else ""
    for weights, place in (
        (parts.tower.weights, f"model.vision_tower.{wrapped}"),
        (parts.projector_weights, "model.multi_modal_projector."),
        (parts.language.weights, "model.language_"),
    ):
        weights.select(partial(_placed, place)).load_into(model)
    if parts.adapter:
        parts.adapter.merge_into(model, partial(_placed, "model.language_"))
    _make_room(model, image_id, parts.language.tokenizer.bos_token_id or parts.language.eos_token_ids[0])
    eos = list(parts.language.eos_token_ids)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=parts.language.tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=eos[0]
    )
    return freeze(model)


def _placed(place: str, name: str) -> str:
    """Return a tensor's name in the whole model: `model.X` of a language model is `model.language_model.X`."""
    return name if name.startswith("lm_head.") else place + name


def _config(parts: "Parts", image_id: int) -> Any:
    from transformers import LlavaConfig

    projector = parts.projector
    vision = {**parts.tower.config.for_transformers(), "model_type": parts.tower.family.config.model_type}
    text = {**parts.language.config.for_transformers(), "model_type": parts.language.family.config.model_type}
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=projector.num_image_tokens,
        projector_hidden_act=projector.hidden_act,
        vision_feature_layer=projector.vision_feature_layer,
        vision_feature_select_strategy=projector.vision_feature_select_strategy,
        multimodal_projector_bias=projector.has_bias,
        tie_word_embeddings=parts.language.config.tie_word_embeddings,
    )


def _make_room(model: Any, image_id: int, like: int) -> None:
    """Embed the image token where the model has no row for it: each new row is that of `like`, so none wins a draw."""
    import torch

    before = model.get_input_embeddings().num_embeddings
    if image_id < before:
        return
    model.resize_token_embeddings(image_id + 1, pad_to_multiple_of=_ROWS, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[before:] = layer.weight[like]


def _dtype_of(weights: "Weights") -> "torch.dtype":
    """Return the number format in which most of the weights are stored."""
    import torch

    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return names[max(weights.tensors.values(), key=lambda tensor: tensor.end - tensor.start).dtype]


def _write_processor(parts: "Parts", folder: Path) -> None:
    kind = parts.tower.family.config.model_type
    images = {
        "image_processor_type": _PROCESSORS[kind],
        **parts.tower.preprocessing,
        "processor_class": "LlavaProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": int(parts.tower.family.has_cls),
        "patch_size": parts.tower.config.patch_size,
        "vision_feature_select_strategy": parts.projector.vision_feature_select_strategy,
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2) + "\n")
