"""A bundle: a folder on any store that names the tower, projector, language model and template that caption together.

    bundle.json             names the tower as `clip` and the language model as `llama` (a folder inside, a path, a URL
                            or a hub id), the template, and the fingerprints of both that the projector was fitted to
    projector.safetensors   the projector
    adapter/                LoRA of the language model, as peft writes it, where a fit has made one
    clip/ llama/            in a bundle that contains its models

A bundle over a published checkpoint names that as `checkpoint` in place of both, and `checkpoint/` is there in one that
contains it.

`describe` reads configs and headers only, without torch; `load` loads the weights to a device; both take published
checkpoints and the name `demo` as well. `save_bundle` writes a bundle. Knows the layout of that folder and no tensor.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fsspec.core import url_to_fs

from captioner.errors import BundleError, ConfigError
from captioner.model.adapter import AdapterConfig, save_adapter
from captioner.model.bundle_file import ADAPTER, FORMAT, PROJECTOR, not_a_model, read_bundle
from captioner.model.description import BundleDescription, ClipDescription, description_of
from captioner.model.folder import Folder, StorageOptions, open_folder, options_for, reference
from captioner.model.hub import MODEL_FILES
from captioner.model.layouts.layout import CheckpointOptions, Opener
from captioner.model.layouts.table import layout_of
from captioner.model.parts import Checkpoint, Parts
from captioner.model.projector_config import ProjectorConfig
from captioner.model.template import DEFAULT_TEMPLATE
from captioner.model.towers.table import read_tower
from captioner.storage import redact

if TYPE_CHECKING:
    from torch import Tensor, nn

    from captioner.model.caption_model import CaptionModel
    from captioner.model.joint_space import JointSpace
    from captioner.model.vision import VisionEncoder

__all__ = [
    "BundleDescription",
    "ClipDescription",
    "describe",
    "describe_clip",
    "load",
    "load_clip_space",
    "load_joint_space",
    "load_vision",
    "read_parts",
    "save_as_llava",
    "save_bundle",
]


def describe(
    model: str,
    storage_options: StorageOptions = None,
    *,
    allow_remote_parts: bool = False,
    **checkpoint_options: str | None,
) -> BundleDescription:
    """Return the description of a model from its configs and headers, after checking that its parts fit each other.

    model: `demo`, a bundle or a published checkpoint by folder, URL or hub id. allow_remote_parts: follow a bundle to
    URLs on other servers than its own. checkpoint_options: as in `CheckpointOptions`, `prompt` among them. Raises
    BundleError or ShapeError naming both sides of what does not fit.
    """
    return description_of(
        read_parts(model, storage_options, allow_remote_parts=allow_remote_parts, **checkpoint_options)
    )


def read_parts(
    model: str,
    storage_options: StorageOptions = None,
    *,
    allow_remote_parts: bool = False,
    **checkpoint_options: str | None,
) -> Parts:
    """Return the checked parts of a model where they lie, no weights loaded. Others, and raises, as `describe`."""
    opener = Opener(storage_options=storage_options, is_on_disk=False, allow_remote_parts=allow_remote_parts)
    return _read(model, opener, CheckpointOptions(**checkpoint_options))


def load(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    storage_options: StorageOptions = None,
    with_text_tower: bool = False,
    merges_adapter: bool = True,
    allow_remote_parts: bool = False,
    **checkpoint_options: str | None,
) -> "CaptionModel":
    """Return a model on the device, frozen; a model on a store is copied to the local cache first.

    dtype: as in `ModelConfig`; `auto` is bfloat16 on a GPU that has it, float16 on an older one, float32 on a CPU.
    with_text_tower: CLIP's text tower too, for CLIPScore. merges_adapter: else it stays in layers of its own, which a
    fit trains. Others, and raises, as `describe`; ConfigError for a device that does not exist.
    """
    from captioner.model import loading  # here and below, not above: it brings torch, and a description needs none

    where = loading.device_of(device)
    opener = Opener(storage_options=storage_options, is_on_disk=True, allow_remote_parts=allow_remote_parts)
    parts = _read(model, opener, CheckpointOptions(**checkpoint_options))
    options = {"with_text_tower": with_text_tower, "merges_adapter": merges_adapter}
    return loading.load_parts(parts, loading.dtype_of(dtype, where), where, **options)


def load_vision(
    clip: str, *, dtype: str = "auto", device: str = "auto", storage_options: StorageOptions = None
) -> "VisionEncoder":
    """Return a vision tower alone, with all layers, frozen. clip: as in BundleDescription. Raises as `load` does."""
    from captioner.model import loading

    where = loading.device_of(device)
    folder = open_folder(clip, storage_options).on_disk()
    return loading.load_vision(read_tower(folder), loading.dtype_of(dtype, where), where)


def load_joint_space(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    storage_options: StorageOptions = None,
    allow_remote_parts: bool = False,
) -> "tuple[VisionEncoder, JointSpace]":
    """Return both towers of a model's CLIP, frozen, without its LLaMA. Raises as `load` does."""
    from captioner.model import loading

    where = loading.device_of(device)
    opener = Opener(storage_options=storage_options, is_on_disk=False, allow_remote_parts=allow_remote_parts)
    parts = _read(model, opener, CheckpointOptions())
    folder = parts.tower.folder.on_disk()
    return loading.load_joint_space(read_tower(folder), loading.dtype_of(dtype, where), where)


def describe_clip(clip: str, storage_options: StorageOptions = None) -> ClipDescription:
    """Return the description of a CLIP alone, by folder, URL or hub id. Raises BundleError if it is no whole CLIP."""
    source = read_tower(open_folder(clip, storage_options))
    if source.text_weights is None:
        raise BundleError(
            f"the {source.family.name} in {source.folder.name} has no text tower of CLIP; expected a whole CLIP: "
            "text_model and text_projection in its weights, and its tokenizer.json"
        )
    return ClipDescription(
        clip=source.folder.name,
        preprocessing=source.preprocessing,
        text_fingerprint=source.text_weights.fingerprint(),
    )


def load_clip_space(
    clip: str, *, dtype: str = "auto", device: str = "auto", storage_options: StorageOptions = None
) -> "tuple[VisionEncoder, JointSpace]":
    """Return both towers of a CLIP alone, frozen. Raises as `load` and `describe_clip` do."""
    from captioner.model import loading

    where = loading.device_of(device)
    source = read_tower(open_folder(clip, storage_options).on_disk())
    return loading.load_joint_space(source, loading.dtype_of(dtype, where), where)


def save_bundle(
    folder: str | os.PathLike[str],
    projector: "nn.Module",
    config: ProjectorConfig,
    *,
    clip: str = "",
    llama: str = "",
    checkpoint: Checkpoint | None = None,
    template: str = DEFAULT_TEMPLATE,
    adapter: "tuple[AdapterConfig, Mapping[str, Tensor]] | None" = None,
    carries_models: bool = False,
    provenance: dict[str, Any] | None = None,
    storage_options: StorageOptions = None,
) -> BundleDescription:
    """Write a bundle with this projector, over an older one, and return its description.

    bundle.json is removed first and written last, so that an interrupted save leaves no bundle.

    clip, llama: a folder that is already inside (`clip`), a path, a URL or a hub id; a local path is made absolute.
    checkpoint: a published one with both, in their place. adapter: of the LLaMA, its settings and weights.
    carries_models: copy the models inside, so that the bundle can be moved. Raises BundleError or ShapeError, and
    leaves no bundle.json, if the parts do not fit.
    """
    from safetensors.torch import save as to_safetensors

    target = _new_folder(os.fspath(folder), storage_options)
    target.remove("bundle.json")  # a new projector must never stand beside an old config
    models = {"clip": clip, "llama": llama} if checkpoint is None else _given(checkpoint)
    models = (_carried if carries_models else _references)(models, target, storage_options)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in projector.state_dict().items()}
    target.write(PROJECTOR, to_safetensors(state))
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": 2 if adapter or checkpoint else 1,
        **models,
        "projector": asdict(config),
        "template": template,
        "provenance": provenance or {},
    }
    if adapter:
        save_adapter(target.child(ADAPTER), *adapter)
        content["adapter"] = ADAPTER
    opener = Opener(storage_options=storage_options, is_on_disk=False, allow_remote_parts=True)
    parts = read_bundle(target, content, opener)
    parts.check()
    content["fitted_to"] = {"clip": parts.clip_fingerprint, "llama": parts.llama_fingerprint}
    target.write("bundle.json", json.dumps(content, indent=2).encode() + b"\n")
    return description_of(parts)


def save_as_llava(
    model: str, folder: str, *, storage_options: StorageOptions = None, allow_remote_parts: bool = False
) -> None:
    """Write a bundle as transformers' LLaVA into a folder of the same store; config.json last. Raises as `load` does.

    The projector is one that `layouts.llava_export.check_llava` takes."""
    from captioner.model.layouts.llava_export import save_llava

    opener = Opener(storage_options=storage_options, is_on_disk=True, allow_remote_parts=allow_remote_parts)
    parts = _read(model, opener, CheckpointOptions())
    fs, path = url_to_fs(folder, **(storage_options or {}))
    with TemporaryDirectory() as made:
        save_llava(parts, Path(made))
        config = Path(made, "config.json").read_bytes()
        Path(made, "config.json").unlink()
        target = Folder(fs, path.rstrip("/"), folder)
        Folder.local(Path(made)).copy_to(target, MODEL_FILES)
        target.write("config.json", config)


def _read(model: str, opener: Opener, options: CheckpointOptions) -> Parts:
    """Return the checked parts of a model. Raises BundleError for odd configs."""
    try:
        parts = _parts(model, opener, options)
        parts.check()
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise BundleError(
            f"a config in {redact(model)} holds another value than expected: {type(error).__name__}: {error};"
            " copy the model again, or load and save it with transformers"
        ) from error
    return parts


def _parts(model: str, opener: Opener, options: CheckpointOptions) -> Parts:
    location = _demo() if model == "demo" else model
    folder = open_folder(location, opener.storage_options)
    if opener.is_on_disk and not folder.is_local:
        _parts_in(folder, replace(opener, is_on_disk=False), options).check()  # refused before weights are fetched
        folder = folder.on_disk()
    return _parts_in(folder, opener, options)


def _parts_in(folder: Folder, opener: Opener, options: CheckpointOptions) -> Parts:
    if folder.has("bundle.json"):
        _check_options(folder, options)
        return read_bundle(folder, folder.read_json("bundle.json"), opener)
    layout = layout_of(folder.read_json_if_any("config.json"))
    if layout is None:
        raise BundleError(not_a_model(folder))
    return layout.read(folder, options, opener)


def _check_options(folder: Folder, options: CheckpointOptions) -> None:
    """Raise ConfigError for an option of published checkpoints that is given with a bundle."""
    for name, value in asdict(options).items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} is {value!r}, but {folder.name} is a bundle, whose projector was fitted with its own "
                f"template, tokenizer and vision tower; {flag} is for LLaVA checkpoints"
            )


def _given(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what bundle.json says of a checkpoint, by its name there."""
    beside = {"tokenizer": checkpoint.tokenizer, "vision_tower": checkpoint.vision_tower}
    return {"checkpoint": checkpoint.location} | {name: named for name, named in beside.items() if named is not None}


def _references(models: Mapping[str, str], folder: Folder, _options: StorageOptions) -> dict[str, str]:
    """Return what bundle.json names models by that stay where they are."""
    return {name: reference(location, folder) for name, location in models.items()}


def _carried(models: Mapping[str, str], folder: Folder, storage_options: StorageOptions) -> dict[str, str]:
    """Copy models into the bundle, those beside a checkpoint into it, and return the names that they have there."""
    inside = folder.child("checkpoint")
    return {
        name: _carry(location, name, inside if name in ("tokenizer", "vision_tower") else folder, storage_options)
        for name, location in models.items()
    }


def _new_folder(location: str, storage_options: StorageOptions) -> Folder:
    """Return a folder to write, made if it is not there."""
    fs, path = url_to_fs(location, **(storage_options or {}))
    fs.makedirs(path, exist_ok=True)
    return Folder(fs, path.rstrip("/"), location)


def _carry(location: str, name: str, folder: Folder, storage_options: StorageOptions) -> str:
    """Copy a model into the bundle and return the name that it has there."""
    source = open_folder(location, options_for(location, storage_options, folder.name), inside=folder)
    inside = folder.child(name)
    if source.path != inside.path:
        source.copy_to(inside, MODEL_FILES)
    return name


def _demo() -> str:
    from captioner.demo import bundle_path  # imported here: other models never need it

    return str(bundle_path())
