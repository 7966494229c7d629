"""From the checked parts of a model to modules on a device: what `bundle` loads with. Brings torch and transformers.

Knows devices, dtypes and how tower, projector and language model are allocated; not where their folders come from.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, GenerationConfig, PreTrainedTokenizerFast

from captioner.errors import BundleError, ConfigError
from captioner.images.preprocessing import Preprocessing
from captioner.model.caption_model import CaptionModel
from captioner.model.folder import Folder
from captioner.model.joint_space import JointSpace
from captioner.model.language.language import LanguageSource
from captioner.model.module import allocate, freeze, parse_config, shapes_of
from captioner.model.parts import Parts
from captioner.model.projector import build_projector
from captioner.model.tile_packer import TilePacker
from captioner.model.tokenizer import load_tokenizer
from captioner.model.towers.tower import TowerSource
from captioner.model.vision import VisionEncoder
from captioner.model.weights import read_weights

__all__ = ["device_of", "dtype_of", "load_clip", "load_joint_space", "load_parts", "load_vision", "pixel_affine"]


def load_parts(
    parts: Parts,
    dtype: torch.dtype,
    device: torch.device,
    *,
    with_text_tower: bool = False,
    merges_adapter: bool = True,
) -> CaptionModel:
    """Return a model on the device, frozen; the folders of all parts must be on disk.

    with_text_tower: CLIP's text tower too. merges_adapter: else the language model has layers of peft's, whose weights
    are float32. Raises BundleError if there is no text tower."""
    projector = allocate(build_projector, parts.projector, dtype=dtype, device=device)
    parts.projector_weights.load_into(projector)
    num_layers = parts.tower.num_layers(parts.projector.vision_feature_layer) if parts.projector.reads_patches else None
    return CaptionModel(
        vision=_load_vision(parts.tower, num_layers=num_layers, dtype=dtype, device=device),
        projector=freeze(projector),
        projector_config=parts.projector,
        llama=_adapted(parts, _load_language(parts.language, dtype=dtype, device=device), merges=merges_adapter),
        tokenizer=load_tokenizer(parts.language.tokenizer_folder),
        template=parts.template,
        prompt_writer=parts.prompt_writer,
        eos_token_ids=parts.language.eos_token_ids,
        context_length=parts.language.context_length,
        preprocessing=parts.tower.preprocessing,
        fingerprint=parts.fingerprint,
        packer=_packer(parts, dtype, device),
        joint_space=_joint_space(parts, dtype, device) if with_text_tower else None,
    )


def _packer(parts: Parts, dtype: torch.dtype, device: torch.device) -> TilePacker | None:
    if parts.anyres is None or parts.newline_weights is None:
        return None
    packer = allocate(lambda anyres: TilePacker(anyres, parts.language.width), parts.anyres, dtype=dtype, device=device)
    parts.newline_weights.load_into(packer)
    return freeze(packer)


def load_vision(source: TowerSource, dtype: torch.dtype, device: torch.device) -> VisionEncoder:
    """Return a vision tower with all layers, frozen."""
    return _load_vision(source, num_layers=None, dtype=dtype, device=device)


def load_joint_space(source: TowerSource, dtype: torch.dtype, device: torch.device) -> tuple[VisionEncoder, JointSpace]:
    """Return both towers, frozen. Raises BundleError if there is no text tower."""
    vision = load_vision(source, dtype, device)
    clip, tokenizer = load_clip(source.folder, dtype=dtype, device=device)
    return vision, JointSpace(clip, tokenizer, keeps_vision_tower=False)


def _joint_space(parts: Parts, dtype: torch.dtype, device: torch.device) -> JointSpace:
    clip, tokenizer = load_clip(parts.tower.folder, dtype=dtype, device=device)
    return JointSpace(clip, tokenizer, keeps_vision_tower=parts.projector.reads_patches)


def _load_vision(
    source: TowerSource, *, num_layers: int | None, dtype: torch.dtype, device: torch.device
) -> VisionEncoder:
    """Return the tower, frozen. num_layers: load only so many, so that the last hidden state is the one to read."""
    family = source.family
    tower = allocate(lambda found: family.build(found, num_layers), source, dtype=dtype, device=device)
    source.weights.load_into(_plain(tower))
    pixel_scale, pixel_shift = pixel_affine(source.preprocessing, device)
    return VisionEncoder(
        tower=family.optimised(freeze(tower)),
        family=family,
        width=source.config.hidden_size,
        image_size=source.image_size,
        pixel_scale=pixel_scale,
        pixel_shift=pixel_shift,
    )


def load_clip(folder: Folder, *, dtype: torch.dtype, device: torch.device) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """Return both towers, frozen, and the text tower's tokenizer. Raises BundleError if one is not in the folder."""
    raw = folder.read_json("config.json")
    if raw.get("model_type") != "clip":
        raise BundleError(
            f"{folder.name} has no text tower: its model_type is {raw.get('model_type')!r}; expected clip"
        )
    tokenizer = load_tokenizer(folder)
    clip = allocate(CLIPModel, parse_config(CLIPConfig, raw, where=folder.name), dtype=dtype, device=device)
    weights = read_weights(folder.on_disk())
    weights.check_fits(shapes_of(clip), type(clip).__name__)
    weights.load_into(clip)
    return freeze(clip), tokenizer


def _load_language(source: LanguageSource, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the model, frozen, without its own generation settings except the end tokens."""
    config_class, model_class = source.family.classes()
    config = parse_config(config_class, source.config.for_transformers(), where=source.folder.name)
    model: Any = allocate(model_class, config, dtype=dtype, device=device)
    model.tie_weights()
    source.weights.load_into(model)
    eos = list(source.eos_token_ids)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=source.tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=eos[0]
    )
    return freeze(model)


def _adapted(parts: Parts, llama: Any, *, merges: bool) -> Any:
    """Return the language model with the adapter, where there is one."""
    if parts.adapter and merges:
        parts.adapter.merge_into(llama)
    elif parts.adapter:
        from captioner.model.adapted_layers import adapt  # here, not above: only a fit needs peft

        adapt(llama, parts.adapter)
    return llama


def pixel_affine(preprocessing: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift, float32[3, 1, 1] each: the tower reads pixels of 0 to 255 times scale, plus shift."""
    read = Preprocessing.from_config(preprocessing)
    scale = [preprocessing.get("rescale_factor", 1 / 255) / std for std in read.std]
    shift = [-mean / std for mean, std in zip(read.mean, read.std, strict=True)]
    return torch.tensor(scale, device=device).view(3, 1, 1), torch.tensor(shift, device=device).view(3, 1, 1)


def _plain(tower: torch.nn.Module) -> torch.nn.Module:
    """Return the module that has `embeddings` and `encoder`; older transformers wrap it once more."""
    inner: torch.nn.Module = getattr(tower, "vision_model", tower)
    return inner


def device_of(name: str) -> torch.device:
    """Return the device of this name; `auto` is the GPU if torch sees one.

    Raises ConfigError for one that is not there."""
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # MPS has no float64, in which draws are computed
        raise ConfigError(f"--device is {name}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not has_gpu or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"--device is {name}, but torch sees {torch.cuda.device_count()} GPUs here; expected auto or cpu"
        )
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of this name; `auto` is the fastest that the device has."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
