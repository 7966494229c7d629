"""A published LLaVA checkpoint, read as the three parts it is made of.

Knows the layouts of `LlavaForConditionalGeneration` over CLIP and LLaMA, old and new, and the prompt of
LLaMA-3-Instruct; its parts are loaded like those of a bundle.
"""

import re
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedTokenizerFast

from captioner.errors import BundleError
from captioner.model.clip import ClipSource, check_tower, read_preprocessing, tower_name
from captioner.model.folder import Folder
from captioner.model.llama import LlamaSource, check_llama, end_tokens
from captioner.model.module import parse_config
from captioner.model.parts import Parts
from captioner.model.projector import ProjectorConfig
from captioner.model.template import Template
from captioner.model.tokenizer import read_tokenizer
from captioner.model.weights import read_weights

__all__ = ["is_llava", "read_llava"]

_LLAMA_3_TURN = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{image}\n%s<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
_QUESTION = "Describe the image in one sentence."


def is_llava(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a LLaVA checkpoint."""
    return config.get("model_type") == "llava" or "LlavaForConditionalGeneration" in (config.get("architectures") or ())


def read_llava(folder: Folder, prompt: str | None) -> Parts:
    """Return the parts of a LLaVA checkpoint from its config, tokenizer and headers.

    prompt: a question in place of the default one, or a whole template with `{image}` or `<image>`. Raises
    BundleError if it is not over CLIP and LLaMA, or if there is no known prompt for its tokenizer.
    """
    raw = folder.read_json("config.json")
    config = parse_config(LlavaConfig, raw, where=folder.name)
    vision, text, layer = _family(config, folder)
    weights = read_weights(folder)
    tokenizer = read_tokenizer(folder)
    template = Template.parse(_template(prompt, tokenizer, folder), tokenizer)
    clip = check_tower(
        ClipSource(folder, vision, weights.select(_tower_name), read_preprocessing(folder, vision), text_weights=None)
    )
    eos = end_tokens(
        folder.read_json_if_any("generation_config.json"), raw.get("text_config", {}), tokenizer, template.text
    )
    llama = check_llama(LlamaSource(folder, text, weights.select(_llama_name), tokenizer, eos))
    return Parts(
        name=folder.name,
        kind="llava",
        clip=clip,
        llama=llama,
        projector=_projector(config, layer, clip, llama),
        projector_weights=weights.select(_projector_name),
        template=template,
    )


def _family(config: LlavaConfig, folder: Folder) -> tuple[CLIPVisionConfig, LlamaConfig, int]:
    """Return both configs and the hidden state that is read. Raises BundleError for another family."""
    vision, text = config.vision_config, config.text_config
    if not isinstance(vision, CLIPVisionConfig) or not isinstance(text, LlamaConfig):
        kinds = " and ".join(str(getattr(part, "model_type", None)) for part in (vision, text))
        raise BundleError(f"the LLaVA in {folder.name} is over {kinds}; supported is clip_vision_model and llama")
    if not isinstance(config.vision_feature_layer, int):
        raise BundleError(
            f"the LLaVA in {folder.name} reads CLIP's hidden states {config.vision_feature_layer}; expected one layer"
        )
    text.tie_word_embeddings = config.tie_word_embeddings  # as LlavaForConditionalGeneration reads it
    return vision, text, config.vision_feature_layer


def _template(prompt: str | None, tokenizer: PreTrainedTokenizerFast, folder: Folder) -> str:
    prompt = (prompt or _QUESTION).replace("<image>", "{image}")  # as model cards write it
    if "{image}" in prompt:
        return prompt
    if "<|start_header_id|>" not in tokenizer.get_added_vocab():
        raise BundleError(
            f"the tokenizer in {folder.name} is not that of LLaMA-3-Instruct, so its prompt is not known; give the "
            "whole prompt, as --prompt 'USER: {image}\\nDescribe the image. ASSISTANT:'"
        )
    return _LLAMA_3_TURN % prompt


def _projector(config: LlavaConfig, layer: int, clip: ClipSource, llama: LlamaSource) -> ProjectorConfig:
    strategy = config.vision_feature_select_strategy
    return ProjectorConfig(
        kind="mlp",
        num_features=clip.config.hidden_size,
        width=llama.width,
        num_image_tokens=clip.num_patches + (strategy == "full"),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        hidden_act=config.projector_hidden_act,
        has_bias=config.multimodal_projector_bias,
    )


def _tower_name(name: str) -> str | None:
    """`[model.]vision_tower.[vision_model.]X` is X of the tower."""
    own = re.match(r"(?:model\.)?vision_tower\.(.*)", name)
    return tower_name(own[1]) if own else None


def _llama_name(name: str) -> str | None:
    """`language_model.model.X`, or newer `model.language_model.X`, is model.X; so is lm_head."""
    own = re.match(r"(?:model\.)?language_model\.(?:model\.)?(.*)", name)
    inner = own[1] if own else name
    if inner.startswith("lm_head."):
        return inner
    return f"model.{inner}" if own else None


def _projector_name(name: str) -> str | None:
    own = re.match(r"(?:model\.)?multi_modal_projector\.(.*)", name)
    return own[1] if own else None
