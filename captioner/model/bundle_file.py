"""What a bundle.json says, and the parts of a model that it leads to. Reads configs and headers; loads no weights."""

from dataclasses import replace
from typing import Any

from captioner.errors import BundleError
from captioner.model.adapter import Adapter, read_adapter
from captioner.model.folder import Folder, check_server
from captioner.model.language.table import read_language
from captioner.model.layouts.layout import CheckpointOptions, Opener
from captioner.model.layouts.table import layout_of, supported
from captioner.model.parts import Checkpoint, Parts
from captioner.model.projector_config import ProjectorConfig
from captioner.model.template import Template
from captioner.model.towers.table import read_tower
from captioner.model.turns import FittedTurns
from captioner.model.weights import read_weights

__all__ = ["ADAPTER", "FORMAT", "PROJECTOR", "VERSIONS", "not_a_model", "read_bundle"]

FORMAT = "captioner-bundle"
VERSIONS = (1, 2)
"""2 of bundles with an adapter, which older releases would leave out in silence, and of those over a checkpoint."""

PROJECTOR = "projector.safetensors"
ADAPTER = "adapter"
"""The names of its files and folders."""


def read_bundle(folder: Folder, content: dict[str, Any], opener: Opener) -> Parts:
    """Return the parts that the content of a folder's bundle.json names. Raises BundleError."""
    _check_format(folder, content)
    if "checkpoint" in content:
        return _read_over_checkpoint(folder, content, opener)
    language = read_language(opener.open(content["llama"], folder, is_named_inside=True), template=content["template"])
    return Parts(
        name=folder.name,
        kind="bundle",
        tower=read_tower(opener.open(content["clip"], folder, is_named_inside=True)),
        language=language,
        projector=_projector_config(folder, content["projector"]),
        projector_weights=read_weights(folder, PROJECTOR),
        adapter=_adapter(folder, content, opener),
        template=Template.parse(content["template"], language.tokenizer),
        turns=FittedTurns(content["template"]),
        fitted_to=content.get("fitted_to", {}),
        provenance=content.get("provenance", {}),
    )


def _read_over_checkpoint(folder: Folder, content: dict[str, Any], opener: Opener) -> Parts:
    """Return the parts of a bundle over a published checkpoint, which is asked by the bundle's template."""
    names = {name: content[name] for name in ("tokenizer", "vision_tower") if name in content}
    for location in names.values():
        if not opener.allow_remote_parts:
            check_server(location, folder)
    found = opener.open(content["checkpoint"], folder, is_named_inside=True)
    layout = layout_of(found.read_json_if_any("config.json"))
    if layout is None:
        raise BundleError(not_a_model(found))
    parts = layout.read(found, CheckpointOptions(prompt=content["template"], **names), opener)
    return replace(
        parts,
        name=folder.name,
        kind="bundle",
        projector=_projector_config(folder, content["projector"]),
        projector_weights=read_weights(folder, PROJECTOR),
        adapter=_adapter(folder, content, opener),
        checkpoint=Checkpoint(location=found.name, **names),
        fitted_to=content.get("fitted_to", {}),
        provenance=content.get("provenance", {}),
    )


def _check_format(folder: Folder, content: dict[str, Any]) -> None:
    where = f"{folder.name}/bundle.json"
    if content.get("format") != FORMAT:
        raise BundleError(f"{where} has format {content.get('format')!r}; expected {FORMAT!r}")
    if content.get("version") not in VERSIONS:
        raise BundleError(
            f"{where} has version {content.get('version')!r}; this release reads versions {VERSIONS[0]} to "
            f"{VERSIONS[-1]}: update captioner, or fit the bundle again"
        )
    models = ("checkpoint",) if "checkpoint" in content else ("clip", "llama")
    types = dict.fromkeys((*models, *({"tokenizer", "vision_tower"} & content.keys()), "template"), str)
    for name, kind in {**types, "projector": dict}.items():
        if not isinstance(content.get(name), kind):
            raise BundleError(f"{where} has {name} = {content.get(name)!r}; expected a {kind.__name__}")


def _adapter(folder: Folder, content: dict[str, Any], opener: Opener) -> Adapter | None:
    if "adapter" not in content:
        return None
    if content["adapter"] != ADAPTER:
        raise BundleError(
            f"{folder.name}/bundle.json has adapter = {content['adapter']!r}; expected {ADAPTER!r}, a folder inside"
        )
    return read_adapter(opener.open(ADAPTER, folder, is_named_inside=True))


def _projector_config(folder: Folder, content: dict[str, Any]) -> ProjectorConfig:
    try:
        return ProjectorConfig(**content)
    except TypeError as error:
        raise BundleError(f"the projector in {folder.name}/bundle.json is not understood: {error}") from error


def not_a_model(folder: Folder) -> str:
    """Return what to say of a folder that holds neither a bundle nor a checkpoint of a known layout."""
    if folder.is_empty():
        return f"{folder.name} is an empty folder; expected a bundle (bundle.json) or a LLaVA checkpoint (config.json)"
    found = folder.read_json_if_any("config.json").get("model_type")
    if found is None:
        return f"{folder.name} has no bundle.json; expected a bundle, or a LLaVA checkpoint with a config.json"
    return (
        f"{folder.name} is a {found} model; expected a bundle or a checkpoint of {supported()}. To tie a vision tower "
        "and a language model together, fit one: python jobs/fit_projector.py"
    )
