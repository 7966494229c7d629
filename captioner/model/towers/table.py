"""The table of vision towers, and how a folder is read as one of them.

A new family is a file beside this one and an entry here; one from outside the package is set in `TOWERS` by its user.
"""

import logging
from collections.abc import Mapping
from typing import Any

from captioner.errors import BundleError
from captioner.model.configs import check_not_quantized
from captioner.model.folder import Folder
from captioner.model.towers.clip import CLIP
from captioner.model.towers.siglip import SIGLIP
from captioner.model.towers.tower import TowerConfig, TowerFamily, TowerSource
from captioner.model.weights import Weights, read_weights

__all__ = ["TOWERS", "read_preprocessing", "read_tower", "tower_config", "tower_of", "towers_supported"]

_LOG = logging.getLogger(__name__)

TOWERS: dict[str, TowerFamily] = {family.config.model_type: family for family in (CLIP, SIGLIP)}
"""Families of vision towers by their model_type."""


def towers_supported() -> str:
    """Return the model_types of all families, for people."""
    return ", ".join(TOWERS)


def tower_config(raw: Mapping[str, Any], where: str) -> tuple[TowerFamily, TowerConfig]:
    """Return family and config of a config.json of a tower, alone or beside a text tower.

    Raises BundleError for a family that is not in the table, or a value that cannot be."""
    kind = raw.get("model_type")
    check_not_quantized(raw, where=where)
    for family in TOWERS.values():
        if kind == family.config.model_type:
            return family, family.config.read(raw, where=where)
        if kind is not None and kind == family.whole_type:
            return family, family.config.read_whole(raw, where=where)
    whole = [family.whole_type for family in TOWERS.values() if family.whole_type]
    raise BundleError(
        f"the vision model in {where} has model_type {kind!r}; supported are {', '.join(whole)} and their vision "
        f"towers alone: {towers_supported()}"
    )


def read_tower(folder: Folder) -> TowerSource:
    """Return the vision tower of a folder from its config and headers.

    Raises BundleError if it is of no known family, its weights do not fit its config, or its preprocessing is not
    supported or for another size."""
    raw = folder.read_json("config.json")
    family, config = tower_config(raw, folder.name)
    weights = read_weights(folder)
    return tower_of(family, folder, config, weights, text_weights=_text_weights(folder, weights))


def tower_of(
    family: TowerFamily,
    folder: Folder,
    config: TowerConfig,
    weights: Weights,
    *,
    preprocessing: dict[str, Any] | None = None,
    text_weights: Weights | None = None,
) -> TowerSource:
    """Return a checked tower; weights: under the names of a checkpoint of the family."""
    preprocessing = preprocessing or read_preprocessing(folder, family, config)
    own = weights.select(family.tensor_name)
    return TowerSource(family, folder, config, own, preprocessing, text_weights).checked()


def read_preprocessing(folder: Folder, family: TowerFamily, config: TowerConfig) -> dict[str, Any]:
    """Return the image processor's config from its file, or the family's own if the folder has none."""
    found = folder.read_json_if_any("preprocessor_config.json")
    found = found or folder.read_json_if_any("processor_config.json").get("image_processor", {})
    if found:
        return found
    size = config.image_size
    _LOG.warning("event=preprocessing_assumed folder=%s reason=no_preprocessor_config.json size=%d", folder.name, size)
    return family.preprocessing(config)


def _text_weights(folder: Folder, weights: Weights) -> Weights | None:
    """Return what CLIPScore needs beside the vision tower: CLIP's text tower and both projections."""
    if "text_projection.weight" not in weights.tensors or not folder.has("tokenizer.json"):
        return None
    parts = ("text_model.", "text_projection.", "visual_projection.")
    return weights.select(lambda name: name if name.startswith(parts) else None)
