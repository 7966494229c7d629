"""The rungs of quality: which projector the settings ask for over a tower. Knows no weights."""

from typing import Any

from captioner.config import TrainingConfig
from captioner.errors import ConfigError
from captioner.model.projector_config import KINDS, ProjectorConfig
from captioner.model.towers.tower import TowerSource

__all__ = ["projector_of", "rung", "settings_of"]

_POOLED = {"linear": "linear", "mlp": "pooled_mlp"}
_PATCHES = {"linear": "patch_linear", "mlp": "mlp"}
_AVERAGED = {"linear": "average_linear", "mlp": "average_mlp"}
_QUERIES = {"query": "query"}


def projector_of(training: TrainingConfig, tower: TowerSource, width: int) -> ProjectorConfig:
    """Return the shape of the projector that is to be fitted. width: of the language model.

    Raises ConfigError for more image tokens than patches."""
    asked, num_features = training.image_tokens, int(tower.config.hidden_size)
    if training.image_features == "pooled":
        kind = _POOLED[training.projector]
        return ProjectorConfig(kind=kind, num_features=num_features, width=width, num_image_tokens=asked or 1)
    patches = tower.config.num_patches
    if asked and asked > patches:
        raise ConfigError(
            f"--image-tokens is {asked}; the {tower.family.name} in {tower.folder.name} gives {patches} patches of an"
            f" image: expected at most {patches}"
        )
    kinds = (_PATCHES if asked in (None, patches) else _AVERAGED) | _QUERIES
    return ProjectorConfig(
        kind=kinds[training.projector],
        num_features=num_features,
        width=width,
        num_image_tokens=asked or patches,
        vision_feature_select_strategy="default" if tower.family.has_cls else "full",
    )


def settings_of(projector: ProjectorConfig) -> dict[str, Any]:
    """Return the settings that ask for a projector of this kind; none of a kind from elsewhere."""
    for features, kinds in (("pooled", _POOLED), ("patches", _PATCHES), ("patches", _AVERAGED), ("patches", _QUERIES)):
        for name, kind in kinds.items():
            if kind == projector.kind:
                tokens = None if kinds is _PATCHES else projector.num_image_tokens
                return {"projector": name, "image_features": features, "image_tokens": tokens}
    return {}


def rung(projector: ProjectorConfig) -> str:
    """Return for people what LLaMA reads of an image."""
    layer = f"patches of hidden state {projector.vision_feature_layer}"
    match KINDS[projector.kind].pooling:
        case "average":
            return f"{layer}, averaged to {projector.num_image_tokens:,} tokens ({projector.kind})"
        case "query":
            return f"{layer}, read by {projector.num_image_tokens:,} learned queries, each a token (query)"
    return f"{layer}, each a token: {projector.num_image_tokens:,} ({projector.kind})"
