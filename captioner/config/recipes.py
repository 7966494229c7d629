"""Recipes of a fit: the settings behind published figures, by name.

A recipe states what its source states and this package has; whatever the source leaves open or has beside it, such as
other augmentation, stays as it is by default. The command line fills them in below its flags and its --config file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["RECIPES", "Recipe", "RecipeName"]

RecipeName = Literal["linear-1", "pooled-64", "patches", "llava-stage-1", "lora-style"]


@dataclass(frozen=True)
class Recipe:
    """Settings of one fit whose outcome was published."""

    settings: Mapping[str, str | int | float]
    """Names of fields in `config.training`, and their values."""

    figure: str
    """What came of it."""

    source: str


_DEPALM: Mapping[str, str | int | float] = {
    "epochs": 8,
    "captions_per_epoch": "one",
    "learning_rate": 8e-4,
    "weight_decay": 0.1,
    "max_grad_norm": 0.8,
}
_DEPALM_FIGURE = "{} CIDEr on COCO by a frozen LLaMA-7B over EVA02-CLIP-L/14 at 224 px, 3 beams"
_DEPALM_SOURCE = "DePALM (arXiv:2403.13499), config/run.yaml and {} in its repository"

RECIPES: Mapping[str, Recipe] = {
    "linear-1": Recipe(
        {"projector": "linear", "image_features": "pooled", "image_tokens": 1, **_DEPALM},
        _DEPALM_FIGURE.format(122.9),
        _DEPALM_SOURCE.format("coco_100%_limber-1"),
    ),
    "pooled-64": Recipe(
        {
            "projector": "linear",
            "image_features": "patches",
            "image_tokens": 64,
            "min_crop_area": 0.5,
            **_DEPALM,
            "learning_rate": 1e-3,
        },
        _DEPALM_FIGURE.format(131.8),
        _DEPALM_SOURCE.format("coco_100%_depalm-R-avgpool-L0"),
    ),
    "patches": Recipe(
        {"projector": "linear", "image_features": "patches", "min_crop_area": 0.5, **_DEPALM},
        _DEPALM_FIGURE.format(136.3),
        _DEPALM_SOURCE.format("coco_100%_limber-all"),
    ),
    "llava-stage-1": Recipe(
        {
            "projector": "mlp",
            "image_features": "patches",
            "epochs": 1,
            "batch_size": 256,
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
        },
        "the first stage of LLaVA-1.5: 558,000 images in 3.5 hours on 8 A100",
        "LLaVA-1.5 (arXiv:2310.03744), scripts/v1_5/pretrain.sh in its repository",
    ),
    "lora-style": Recipe(
        {
            "lora_rank": 64,
            "lora_alpha": 64.0,
            "lora_learning_rate": 5e-5,
            "learning_rate": 0.0,
            "epochs": 3,
            "batch_size": 32,
            "weight_decay": 0.0,
        },
        "another style of captions from 200 examples or more",
        "JoyCaption's finetuning/README.md and train.py in its repository, whose adapter is on the tower, too",
    ),
}
