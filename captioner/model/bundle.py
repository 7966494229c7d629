"""A bundle: a folder on any store that says which CLIP, projector, LLaMA and template make captions together.

    bundle.json             names CLIP and LLaMA (a folder inside, a path, a URL or a hub id), the template, and the
                            fingerprints of what the projector was fitted to
    projector.safetensors   the projector
    clip/ llama/            in a bundle that carries its models

`describe` reads configs and headers only; `load` brings the weights to a device; `save_bundle` writes one. All of them
take LLaVA checkpoints and the name `demo` as well. Knows the layout of that folder and no tensor.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from fsspec.core import url_to_fs
from fsspec.utils import get_protocol
from safetensors.torch import save as to_safetensors
from torch import nn

from captioner.errors import BundleError, ConfigError
from captioner.model.caption_model import CaptionModel
from captioner.model.clip import ClipSource, load_clip, load_tower, pixel_affine, read_clip
from captioner.model.folder import Folder, StorageOptions, open_folder
from captioner.model.hub import MODEL_FILES
from captioner.model.joint_space import JointSpace
from captioner.model.llama import read_llama
from captioner.model.llava import is_llava, read_llava
from captioner.model.parts import Parts
from captioner.model.projector import ProjectorConfig
from captioner.model.template import DEFAULT_TEMPLATE, Template
from captioner.model.vision import VisionEncoder
from captioner.model.weights import Weights, read_weights

__all__ = ["BundleDescription", "describe", "load", "load_joint_space", "load_vision", "save_bundle"]

_FORMAT = "captioner-bundle"
_VERSION = 1
_PROJECTOR = "projector.safetensors"


@dataclass(frozen=True, kw_only=True)
class BundleDescription:
    """What a model is, known without loading it."""

    name: str
    kind: Literal["bundle", "llava"]
    fingerprint: str
    """Hex digest of everything in the model that shapes a caption."""

    clip: str
    """Where its CLIP is: folder, URL or hub id."""

    llama: str
    """Where its LLaMA is."""

    clip_fingerprint: str
    llama_fingerprint: str
    image_size: int
    """Side of the square image that CLIP reads, in pixels."""

    preprocessing: dict[str, Any]
    """The image processor's config, as in preprocessor_config.json."""

    projector: ProjectorConfig
    template: str
    num_prompt_tokens: int
    """Tokens of the prompt, without the image."""

    eos_token_ids: tuple[int, ...]
    context_length: int
    """Most tokens, prompt and image included, that the LLaMA was made for."""

    vocab_size: int
    clip_parameters: int
    """Of the vision tower alone."""

    projector_parameters: int
    llama_parameters: int
    weights_bytes: int
    """Bytes of all three as they are stored."""

    text_weights: Weights | None = field(repr=False)
    """Of CLIP's text tower; None where it has none, and CLIPScore cannot be had."""

    provenance: dict[str, Any]
    """How it was made, as its bundle.json tells."""

    @property
    def has_text_tower(self) -> bool:
        """Whether CLIPScore can be had from it."""
        return self.text_weights is not None

    def check_text_tower(self, asker: str) -> None:
        """Raise ConfigError where there is no text tower. asker: the flag, or what it asked for."""
        if not self.has_text_tower:
            raise ConfigError(
                f"{asker} compares captions with images by CLIP's text tower, and {self.clip} has none; expected a"
                " bundle over a whole CLIP: text_model and text_projection in its weights, and its tokenizer.json"
            )

    @property
    def text_fingerprint(self) -> str:
        """Hex digest of what CLIPScore needs beside the vision tower, empty where there is none; shapes no caption."""
        return self.text_weights.fingerprint() if self.text_weights else ""

    @property
    def num_image_tokens(self) -> int:
        """Embeddings that stand for one image."""
        return self.projector.num_image_tokens

    @property
    def summary(self) -> str:
        """One log line for people and grep."""
        projector = self.projector
        return (
            f"model={self.name} kind={self.kind} clip={_millions(self.clip_parameters)} image_size={self.image_size} "
            f"projector={projector.kind}:{projector.num_features}->{projector.num_image_tokens}x{projector.width} "
            f"llama={_millions(self.llama_parameters)} context_length={self.context_length} "
            f"template={self.template!r} fingerprint={self.fingerprint[:12]}"
        )


def describe(model: str, storage_options: StorageOptions = None, *, prompt: str | None = None) -> BundleDescription:
    """Return what a model is, from its configs and headers, after checking that its parts fit each other.

    model: `demo`, a bundle or a LLaVA checkpoint by folder, URL or hub id. prompt: for LLaVA, the question to ask or a
    whole template with `{image}`. Raises BundleError or ShapeError naming both sides of what does not fit.
    """
    return _describe(_read(model, storage_options, prompt, on_disk=False))


def load(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    storage_options: StorageOptions = None,
    prompt: str | None = None,
    with_text_tower: bool = False,
) -> CaptionModel:
    """Return a model on the device, frozen; one that lies on a store is copied to the local cache first.

    dtype: as in `ModelConfig`; `auto` is bfloat16 on a GPU that has it, float16 on an older one, float32 on a CPU.
    with_text_tower: CLIP's other half too, for CLIPScore. Raises what `describe` raises,
    and ConfigError for a device that is not there.
    """
    where = _device(device)
    parts = _read(model, storage_options, prompt, on_disk=True)
    return parts.load(dtype=_dtype(dtype, where), device=where, with_text_tower=with_text_tower)


def load_vision(
    clip: str, *, dtype: str = "auto", device: str = "auto", storage_options: StorageOptions = None
) -> VisionEncoder:
    """Return a vision tower alone, whole and frozen; `clip` as a description names it. Raises as `load`."""
    where = _device(device)
    return _vision(read_clip(open_folder(clip, storage_options).on_disk()), _dtype(dtype, where), where)


def load_joint_space(
    model: str, *, dtype: str = "auto", device: str = "auto", storage_options: StorageOptions = None
) -> tuple[VisionEncoder, JointSpace]:
    """Return both towers of a model's CLIP, frozen, without its LLaMA. Raises as `load`."""
    where = _device(device)
    folder = _read(model, storage_options, None, on_disk=False).clip.folder.on_disk()
    vision = _vision(read_clip(folder), _dtype(dtype, where), where)
    clip, tokenizer = load_clip(folder, dtype=_dtype(dtype, where), device=where)
    return vision, JointSpace(clip, tokenizer, keeps_vision_tower=False)


def _vision(source: ClipSource, dtype: torch.dtype, device: torch.device) -> VisionEncoder:
    pixel_scale, pixel_shift = pixel_affine(source.preprocessing, device)
    return VisionEncoder(
        tower=load_tower(source, num_layers=None, dtype=dtype, device=device),
        image_size=source.image_size,
        pixel_scale=pixel_scale,
        pixel_shift=pixel_shift,
    )


def save_bundle(
    folder: str | os.PathLike[str],
    projector: nn.Module,
    config: ProjectorConfig,
    *,
    clip: str,
    llama: str,
    template: str = DEFAULT_TEMPLATE,
    carries_models: bool = False,
    provenance: dict[str, Any] | None = None,
    storage_options: StorageOptions = None,
) -> BundleDescription:
    """Write a bundle with this projector, over an older one, and return its description.

    bundle.json goes first and comes last, so that a bundle that was cut is none.

    clip, llama: a folder that is already inside (`clip`), a path, a URL or a hub id; a path of this machine is made
    absolute. With `carries_models` they are copied to `clip/` and `llama/` inside, so that the bundle can move. Raises
    BundleError or ShapeError, and leaves no bundle.json, if the parts do not fit.
    """
    fs, path = url_to_fs(os.fspath(folder), **(storage_options or {}))
    fs.makedirs(path, exist_ok=True)
    target = Folder(fs, path.rstrip("/"), os.fspath(folder))
    target.remove("bundle.json")  # a projector of today beside the config of yesterday would be no bundle
    if carries_models:
        clip = _carry(clip, "clip", target, storage_options)
        llama = _carry(llama, "llama", target, storage_options)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in projector.state_dict().items()}
    target.write(_PROJECTOR, to_safetensors(state))
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "clip": _reference(clip, target),
        "llama": _reference(llama, target),
        "projector": asdict(config),
        "template": template,
        "provenance": provenance or {},
    }
    parts = _read_bundle(target, content, storage_options, on_disk=False)
    parts.check()
    content["fitted_to"] = {"clip": parts.clip_fingerprint, "llama": parts.llama_fingerprint}
    target.write("bundle.json", json.dumps(content, indent=2).encode() + b"\n")
    return _describe(parts)


def _read(model: str, storage_options: StorageOptions, prompt: str | None, *, on_disk: bool) -> Parts:
    """Return the checked parts of a model; with `on_disk`, all on local disk."""
    location = _demo() if model == "demo" else model
    folder = open_folder(location, storage_options)
    folder = folder.on_disk() if on_disk else folder
    if folder.has("bundle.json"):
        if prompt is not None:
            raise ConfigError(
                f"--prompt is {prompt!r}, but {model} is a bundle, whose projector was fitted with its own template; "
                "--prompt is for LLaVA checkpoints"
            )
        parts = _read_bundle(folder, folder.read_json("bundle.json"), storage_options, on_disk=on_disk)
    elif is_llava(folder.read_json_if_any("config.json")):
        parts = read_llava(folder, prompt)
    else:
        raise BundleError(_not_a_model(folder))
    parts.check()
    return parts


def _read_bundle(folder: Folder, content: dict[str, Any], storage_options: StorageOptions, *, on_disk: bool) -> Parts:
    _check_format(folder, content)

    def part(name: str) -> Folder:
        found = open_folder(content[name], _options_for(content[name], storage_options, folder.name), inside=folder)
        return found.on_disk() if on_disk else found

    llama = read_llama(part("llama"), template=content["template"])
    return Parts(
        name=folder.name,
        kind="bundle",
        clip=read_clip(part("clip")),
        llama=llama,
        projector=_projector_config(folder, content["projector"]),
        projector_weights=read_weights(folder, _PROJECTOR),
        template=Template.parse(content["template"], llama.tokenizer),
        fitted_to=content.get("fitted_to", {}),
        provenance=content.get("provenance", {}),
    )


def _options_for(part: str, storage_options: StorageOptions, model: str) -> StorageOptions:
    """Return the options of the bundle's store for a part on the same kind of store, none for another; those that come
    with a bundle of this machine, whose own disk needs none, can only be meant for its parts."""
    return storage_options if get_protocol(model) in (get_protocol(part), "file") else None


def _check_format(folder: Folder, content: dict[str, Any]) -> None:
    where = f"{folder.name}/bundle.json"
    if content.get("format") != _FORMAT:
        raise BundleError(f"{where} has format {content.get('format')!r}; expected {_FORMAT!r}")
    if content.get("version") != _VERSION:
        raise BundleError(
            f"{where} has version {content.get('version')!r}; this release reads version {_VERSION}: update "
            "captioner, or fit the bundle anew"
        )
    types = {"clip": str, "llama": str, "template": str, "projector": dict}
    for name, kind in types.items():
        if not isinstance(content.get(name), kind):
            raise BundleError(f"{where} has {name} = {content.get(name)!r}; expected a {kind.__name__}")


def _projector_config(folder: Folder, content: dict[str, Any]) -> ProjectorConfig:
    try:
        return ProjectorConfig(**content)
    except TypeError as error:
        raise BundleError(f"the projector in {folder.name}/bundle.json is not understood: {error}") from error


def _not_a_model(folder: Folder) -> str:
    if folder.is_empty():
        return f"{folder.name} is an empty folder; expected a bundle (bundle.json) or a LLaVA checkpoint (config.json)"
    found = folder.read_json_if_any("config.json").get("model_type")
    if found is None:
        return f"{folder.name} has no bundle.json; expected a bundle, or a LLaVA checkpoint with a config.json"
    return (
        f"{folder.name} is a {found} model; expected a bundle or a checkpoint of "
        "LlavaForConditionalGeneration. To tie a CLIP and a LLaMA together, fit one: python jobs/fit_projector.py"
    )


def _describe(parts: Parts) -> BundleDescription:
    return BundleDescription(
        name=parts.name,
        kind=parts.kind,
        fingerprint=parts.fingerprint,
        clip=parts.clip.folder.name,
        llama=parts.llama.folder.name,
        clip_fingerprint=parts.clip_fingerprint,
        llama_fingerprint=parts.llama_fingerprint,
        image_size=parts.clip.image_size,
        preprocessing=parts.clip.preprocessing,
        projector=parts.projector,
        template=parts.template.text,
        num_prompt_tokens=parts.template.num_tokens,
        eos_token_ids=parts.llama.eos_token_ids,
        context_length=parts.llama.context_length,
        vocab_size=parts.llama.config.vocab_size,
        clip_parameters=parts.clip.weights.num_parameters,
        projector_parameters=parts.projector_weights.num_parameters,
        llama_parameters=parts.llama.weights.num_parameters,
        weights_bytes=sum(w.size_bytes for w in (parts.clip.weights, parts.projector_weights, parts.llama.weights)),
        text_weights=parts.clip.text_weights,
        provenance=parts.provenance,
    )


def _carry(location: str, name: str, folder: Folder, storage_options: StorageOptions) -> str:
    """Copy a model into the bundle and return the name that it has there."""
    source = open_folder(location, _options_for(location, storage_options, folder.name), inside=folder)
    inside = folder.child(name)
    if source.path != inside.path:
        source.copy_to(inside, MODEL_FILES)
    return name


def _reference(location: str, folder: Folder) -> str:
    """Return what bundle.json shall say of a part: as given, but a path of this machine made absolute."""
    if "://" in location or folder.has(location) or not Path(location).expanduser().is_dir():
        return location
    return str(Path(location).expanduser().resolve())


def _demo() -> str:
    from captioner.demo import bundle_path  # the demo stands apart: a real model never needs it

    return str(bundle_path())


def _device(name: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ConfigError(f"--device is {name}; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not has_gpu or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"--device is {name}, but torch sees {torch.cuda.device_count()} GPUs here; expected auto or cpu"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count < 1e9 else f"{count / 1e9:.1f}B"
