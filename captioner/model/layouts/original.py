"""The original LLaVA's layout: a language model's config with `mm_*` keys, tensors under `model.mm_projector`.

As haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT write it. The tower is in the weights, or named; its config is in its own
folder. `ASPECTS` says how each `image_aspect_ratio` becomes pixels.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from captioner.errors import BundleError
from captioner.model.configs import check_not_quantized
from captioner.model.folder import Folder
from captioner.model.language.language import LanguageSource, end_tokens
from captioner.model.language.table import language_config
from captioner.model.layouts.layout import CheckpointOptions, Layout, Opener
from captioner.model.layouts.prompts import CheckpointTurns, read_checkpoint_tokenizer, read_template
from captioner.model.layouts.tiles import Tiles, newline_name
from captioner.model.parts import Parts
from captioner.model.projector_config import ProjectorConfig
from captioner.model.towers.table import read_preprocessing, tower_config, tower_of
from captioner.model.towers.tower import TowerFamily, TowerSource, num_layers_to
from captioner.model.weights import Weights, read_weights

__all__ = ["ASPECTS", "ORIGINAL", "read_original"]

_LANGUAGES = {
    "llava_llama": "llama",
    "llava": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
}
"""The language model of each model_type."""

_IN_WEIGHTS = re.compile(r"model\.vision_tower\.(?:vision_tower\.)?(.*)")
_PROJECTOR = re.compile(r"model\.mm_projector\.(.*)")
_PARTS = ("model.mm_projector.", "model.vision_tower.", "model.image_newline", "model.vision_resampler.")


@dataclass(frozen=True)
class _ProjectorLayout:
    """A value of `mm_projector_type`: the kind of projector, and the names of its tensors."""

    kind: str
    names: Mapping[str, str]


_PROJECTORS = {
    "linear": _ProjectorLayout("patch_linear", {"weight": "weight", "bias": "bias"}),
    "mlp2x_gelu": _ProjectorLayout(
        "mlp",
        {
            "0.weight": "linear_1.weight",
            "0.bias": "linear_1.bias",
            "2.weight": "linear_2.weight",
            "2.bias": "linear_2.bias",
        },
    ),
}


def _squared(preprocessing: dict[str, Any]) -> dict[str, Any]:
    return preprocessing


def _padded(preprocessing: dict[str, Any]) -> dict[str, Any]:
    return preprocessing | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}


ASPECTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"pad": _padded, "square": _squared}
"""The image processor's config of a value of `image_aspect_ratio`, from that of the tower."""


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this layout; `llava` is also the model_type of transformers' own."""
    kind = config.get("model_type")
    return "mm_vision_tower" in config or (kind in _LANGUAGES and kind != "llava")


def read_original(folder: Folder, options: CheckpointOptions, opener: Opener) -> Parts:
    """Return the parts of a checkpoint from its config, tokenizer and headers. Raises as `read_llava` does."""
    raw = folder.read_json("config.json")
    check_not_quantized(raw, where=folder.name)
    own = {name: value for name, value in raw.items() if not name.startswith("mm_")}
    family, config = language_config(own | {"model_type": _language(raw, folder)}, folder.name)
    projector_layout = _projector_layout(raw, folder)
    aspect, tiles = _aspect(raw, folder)
    weights = read_weights(folder)
    tokenizer_folder, tokenizer = read_checkpoint_tokenizer(folder, options, opener)
    template = read_template(tokenizer_folder, tokenizer, family, options, "<image>")
    tower, layer = _tower(raw, folder, weights, options, opener, aspect)
    eos = end_tokens(folder.read_json_if_any("generation_config.json"), raw, tokenizer, template.text, family)
    language = LanguageSource(
        family, folder, config, weights.select(_language_name), tokenizer, eos, tokenizer_folder
    ).checked()
    strategy = _strategy(raw, tower.family, folder)
    return Parts(
        name=folder.name,
        kind="llava",
        tower=tower,
        language=language,
        projector=ProjectorConfig(
            kind=projector_layout.kind,
            num_features=int(raw.get("mm_hidden_size", tower.config.hidden_size)),
            width=language.width,
            num_image_tokens=tower.num_states - (strategy == "default"),
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
        ),
        projector_weights=weights.select(lambda name: _projector_name(name, projector_layout)),
        template=template,
        turns=CheckpointTurns(tokenizer_folder, tokenizer, family, "<image>", options.system_prompt),
        anyres=tiles.anyres(tower.config) if tiles else None,
        newline_weights=weights.select(newline_name) if tiles else None,
    )


ORIGINAL = Layout(name="the original LLaVA (llava_llama and the like)", matches=is_original, read=read_original)


def _language(raw: Mapping[str, Any], folder: Folder) -> str:
    kind = str(raw.get("model_type"))
    if kind not in _LANGUAGES:
        raise BundleError(
            f"the LLaVA in {folder.name} has model_type {kind!r}; supported in the original layout are "
            f"{', '.join(_LANGUAGES)}"
        )
    return _LANGUAGES[kind]


def _projector_layout(raw: Mapping[str, Any], folder: Folder) -> _ProjectorLayout:
    kind = raw.get("mm_projector_type", "linear")  # as the original builds it
    if kind not in _PROJECTORS:
        raise BundleError(
            f"the LLaVA in {folder.name} has mm_projector_type {kind!r}; supported are {', '.join(_PROJECTORS)}"
        )
    return _PROJECTORS[kind]


def _aspect(raw: Mapping[str, Any], folder: Folder) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], Tiles | None]:
    """Return how the image processor's config follows from that of the tower, and the tiles, if images have any."""
    aspect = raw.get("image_aspect_ratio") or "square"
    if str(aspect).startswith("anyres"):
        tiles = _tiles(raw, aspect, folder)
        return tiles.preprocessing, tiles
    if aspect not in ASPECTS:
        raise BundleError(
            f"the LLaVA in {folder.name} has image_aspect_ratio {aspect!r}; supported are {', '.join(ASPECTS)}, anyres "
            "and anyres_max_N"
        )
    return ASPECTS[aspect], None


def _tiles(raw: Mapping[str, Any], aspect: object, folder: Folder) -> Tiles:
    """Return how images are cut into tiles. Grids are read as transformers' converted checkpoints read them: height
    first, which decides only between a grid and the same grid turned, where an image fits both alike."""
    merge = raw.get("mm_patch_merge_type", "flat")
    if merge != "spatial_unpad":
        raise BundleError(
            f"the LLaVA in {folder.name} has image_aspect_ratio {aspect!r} and mm_patch_merge_type {merge!r}; "
            "supported is spatial_unpad"
        )
    pinpoints, where = raw.get("image_grid_pinpoints"), f"{folder.name}/config.json"
    return Tiles.read("LlavaNextImageProcessor", pinpoints, aspect, where=where)


def _strategy(raw: Mapping[str, Any], family: TowerFamily, folder: Folder) -> Any:
    """Return transformers' name: `patch` leaves out the CLS state, and a tower without one gives all."""
    feature = raw.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise BundleError(
            f"the LLaVA in {folder.name} has mm_vision_select_feature {feature!r}; supported are patch and cls_patch"
        )
    return "default" if family.has_cls and feature == "patch" else "full"


def _tower(
    raw: Mapping[str, Any],
    folder: Folder,
    weights: Weights,
    options: CheckpointOptions,
    opener: Opener,
    aspect: Callable[[dict[str, Any]], dict[str, Any]],
) -> tuple[TowerSource, int]:
    """Return the tower and the hidden state that is read, counted from the first: the weights may lack later layers."""
    inside = weights.select(_inside_name)
    where = _tower_folder(raw, folder, options, opener, needs_weights=not inside.tensors)
    family, config = tower_config(where.read_json("config.json"), where.name)
    config = config.for_patches()
    found = aspect({**family.preprocessing(config), **read_preprocessing(where, family, config)})
    layer = num_layers_to(int(raw.get("mm_vision_select_layer", -2)), config, f"{family.name} in {where.name}")
    if not inside.tensors:
        return tower_of(family, where, config, read_weights(where), preprocessing=found), layer
    config = replace(config, num_hidden_layers=max(layer, _num_layers(inside)))
    return tower_of(family, folder, config, inside, preprocessing=found), layer


def _tower_folder(
    raw: Mapping[str, Any], folder: Folder, options: CheckpointOptions, opener: Opener, *, needs_weights: bool
) -> Folder:
    """Return the folder of the tower: the user's, else the one that the checkpoint names."""
    if options.vision_tower:
        return opener.open(options.vision_tower, folder, needs_weights=needs_weights)
    named = raw.get("mm_vision_tower", raw.get("vision_tower"))
    if not isinstance(named, str):
        raise BundleError(
            f"{folder.name}/config.json has mm_vision_tower {named!r}; expected the name of a vision tower, or one by "
            "--vision-tower, a folder or a hub id"
        )
    try:
        return opener.open(named, folder, needs_weights=needs_weights, is_named_inside=True)
    except BundleError as error:
        raise BundleError(
            f"the vision tower that {folder.name} names cannot be opened: {error}; name another with --vision-tower"
        ) from error


def _num_layers(tower: Weights) -> int:
    found = (re.match(r".*encoder\.layers\.(\d+)\.", name) for name in tower.tensors)
    return 1 + max((int(one[1]) for one in found if one), default=-1)


def _inside_name(name: str) -> str | None:
    own = _IN_WEIGHTS.match(name)
    return own[1] if own else None


def _language_name(name: str) -> str | None:
    is_own = name.startswith(("model.", "lm_head.")) and not name.startswith(_PARTS)
    return name if is_own else None


def _projector_name(name: str, layout: _ProjectorLayout) -> str | None:
    """Return a tensor's name in our projector; one that has no place there keeps its own, and is refused for it."""
    own = _PROJECTOR.match(name)
    return layout.names.get(own[1], own[1]) if own else None
