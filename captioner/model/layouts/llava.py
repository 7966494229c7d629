"""transformers' LLaVA: `LlavaForConditionalGeneration` over any tower and language model of the tables, old and new.

Its parts are loaded like those of a bundle.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from captioner.errors import BundleError
from captioner.model.configs import PartConfig, check_not_quantized, known_values
from captioner.model.folder import Folder
from captioner.model.language.language import LanguageConfig, LanguageFamily, LanguageSource, end_tokens
from captioner.model.language.table import LANGUAGE_MODELS, language_supported
from captioner.model.layouts.layout import CheckpointOptions, Layout, Opener
from captioner.model.layouts.prompts import CheckpointTurns, read_checkpoint_tokenizer, read_template
from captioner.model.layouts.tiles import Tiles, newline_name
from captioner.model.parts import Parts
from captioner.model.projector_config import ProjectorConfig
from captioner.model.tokenizer import Tokenizer
from captioner.model.towers.table import TOWERS, read_preprocessing, tower_of, towers_supported
from captioner.model.towers.tower import TowerConfig, TowerFamily, TowerSource
from captioner.model.weights import read_weights

__all__ = ["LLAVA", "LlavaConfig", "llava_parts"]

_CLIP_OF_OLD = {
    "intermediate_size": 4096,
    "hidden_size": 1024,
    "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
"""The vision tower of a LLaVA whose config names none."""


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(PartConfig):
    """transformers' LlavaConfig, its parts not read yet."""

    model_type: ClassVar[str] = "llava"
    class_name: ClassVar[str] = "LlavaConfig"
    default_image_token: ClassVar[int] = 32000
    default_tower: ClassVar[Mapping[str, Any]] = {"model_type": "clip_vision_model", **_CLIP_OF_OLD}
    default_language: ClassVar[str] = "llama"
    unchecked: ClassVar[tuple[str, ...]] = (
        *("raw", "vision_config", "text_config", "vision_feature_layer"),
        "vision_feature_select_strategy",
    )
    vision_config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    projector_hidden_act: str = "gelu"
    vision_feature_select_strategy: Any = "default"
    vision_feature_layer: Any = -2
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False

    @classmethod
    def read(cls, raw: Mapping[str, Any], *, where: str) -> Self:
        """Return the config of a LLaVA. Raises BundleError for a value that cannot be."""
        parts: dict[str, Any] = {
            "vision_config": {
                "model_type": cls.default_tower["model_type"],
                **(raw.get("vision_config") or cls.default_tower),
            },
            "text_config": {"model_type": cls.default_language, **(raw.get("text_config") or {})},
        }
        own = ("raw", "vision_config", "text_config")
        parts |= {name: raw.get(name, getattr(cls, name)) for name in cls.unchecked if name not in own}
        return cls(**known_values(cls, raw, where), **parts)


def is_llava(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this layout; the original one has had its model_type, too."""
    is_named = "LlavaForConditionalGeneration" in (config.get("architectures") or ())
    return (config.get("model_type") == "llava" or is_named) and "mm_vision_tower" not in config


def read_llava(folder: Folder, options: CheckpointOptions, opener: Opener) -> Parts:
    """Return the parts of a LLaVA checkpoint from its config, tokenizer and headers.

    Raises BundleError if it is over other parts than those of the tables, or if there is no known prompt for its
    tokenizer.
    """
    raw = folder.read_json("config.json")
    check_not_quantized(raw, where=folder.name)
    return llava_parts(LlavaConfig.read(raw, where=folder.name), raw, folder, options, opener)


def llava_parts(
    config: LlavaConfig,
    raw: Mapping[str, Any],
    folder: Folder,
    options: CheckpointOptions,
    opener: Opener,
    tiles: Tiles | None = None,
) -> Parts:
    """Return the parts of a checkpoint whose config is read. tiles: how it cuts images and packs their patches, if so.

    Raises as `read_llava` does."""
    tower_family, vision, language_family, text = _families(config, folder)
    weights = read_weights(folder)
    tokenizer_folder, tokenizer = read_checkpoint_tokenizer(folder, options, opener)
    index = int(raw.get("image_token_index", raw.get("image_token_id", config.default_image_token)))
    image_token = _image_token(index, folder, tokenizer, tokenizer_folder, options)
    template = read_template(tokenizer_folder, tokenizer, language_family, options, image_token)
    found = read_preprocessing(folder, tower_family, vision)
    preprocessing = tiles.preprocessing(found) if tiles else found
    tower = tower_of(tower_family, folder, vision, weights.select(_tower_name), preprocessing=preprocessing)
    eos = end_tokens(
        folder.read_json_if_any("generation_config.json"),
        raw.get("text_config") or {},
        tokenizer,
        template.text,
        language_family,
    )
    language = LanguageSource(
        language_family, folder, text, weights.select(_language_name), tokenizer, eos, tokenizer_folder
    ).checked()
    return Parts(
        name=folder.name,
        kind="llava",
        tower=tower,
        language=language,
        projector=_projector(config, tower, language),
        projector_weights=weights.select(_projector_name),
        template=template,
        turns=CheckpointTurns(tokenizer_folder, tokenizer, language_family, image_token, options.system_prompt),
        anyres=tiles.anyres(vision) if tiles else None,
        newline_weights=weights.select(newline_name) if tiles else None,
    )


LLAVA = Layout(name="LlavaForConditionalGeneration", matches=is_llava, read=read_llava)


def _families(config: LlavaConfig, folder: Folder) -> tuple[TowerFamily, TowerConfig, LanguageFamily, LanguageConfig]:
    """Return families and configs of both parts. Raises BundleError for a family that is in no table."""
    kinds = [str(part.get("model_type")) for part in (config.vision_config, config.text_config)]
    tower, language = TOWERS.get(kinds[0]), LANGUAGE_MODELS.get(kinds[1])
    if tower is None or language is None:
        raise BundleError(
            f"the LLaVA in {folder.name} is over {' and '.join(kinds)}; supported are the towers {towers_supported()} "
            f"and the language models {language_supported()}"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise BundleError(
            f"the LLaVA in {folder.name} reads the hidden states {config.vision_feature_layer}; expected one layer"
        )
    vision = tower.config.read(config.vision_config, where=folder.name)
    text = language.config.read(config.text_config, where=folder.name)
    is_tied = config.tie_word_embeddings or text.tie_word_embeddings  # as LlavaForConditionalGeneration reads it
    return tower, vision, language, replace(text, tie_word_embeddings=is_tied)


def _image_token(index: int, folder: Folder, tokenizer: Tokenizer, where: Folder, options: CheckpointOptions) -> str:
    """Return the token that stands for an image. Raises BundleError if the tokenizer has none."""
    token = tokenizer.token(index)
    if token is None and "{image}" not in (options.prompt or "").replace("<image>", "{image}"):
        raise BundleError(
            f"{folder.name}/config.json has image_token_index {index}, but the tokenizer in {where.name} has "
            f"{len(tokenizer.get_vocab())} tokens and no <image> among them; expected the tokenizer of the checkpoint,"
            " by --tokenizer, or a whole --prompt"
        )
    return token or "<image>"


def _projector(config: LlavaConfig, tower: TowerSource, language: LanguageSource) -> ProjectorConfig:
    strategy = config.vision_feature_select_strategy
    return ProjectorConfig(
        kind="mlp",
        num_features=tower.config.hidden_size,
        width=language.width,
        num_image_tokens=tower.num_states - (strategy == "default"),
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=strategy,
        hidden_act=config.projector_hidden_act,
        has_bias=config.multimodal_projector_bias,
    )


def _tower_name(name: str) -> str | None:
    """`[model.]vision_tower.X` is X of a checkpoint of the tower."""
    own = re.match(r"(?:model\.)?vision_tower\.(.*)", name)
    return own[1] if own else None


def _language_name(name: str) -> str | None:
    """`language_model.model.X`, or newer `model.language_model.X`, is model.X; so is lm_head."""
    own = re.match(r"(?:model\.)?language_model\.(?:model\.)?(.*)", name)
    inner = own[1] if own else name
    if inner.startswith("lm_head."):
        return inner
    return f"model.{inner}" if own else None


def _projector_name(name: str) -> str | None:
    own = re.match(r"(?:model\.)?multi_modal_projector\.(.*)", name)
    return own[1] if own else None
