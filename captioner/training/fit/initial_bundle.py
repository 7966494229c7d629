"""The bundle with which a fit begins: tower and language model, a projector, and an adapter where LoRA is asked for.

Random weights follow from the seed; others are those of the model that the user named. Knows models; no labels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.config import FitConfig, TrainingConfig
from captioner.config.checks import check, flag_name
from captioner.errors import BundleError, ConfigError
from captioner.model.adapter import Adapter, AdapterConfig, adapter_config
from captioner.model.bundle import BundleDescription, read_parts, save_bundle
from captioner.model.folder import Folder, open_folder
from captioner.model.language.language import LanguageSource
from captioner.model.language.table import read_language
from captioner.model.parts import Parts
from captioner.model.projector_config import ProjectorConfig
from captioner.model.shapes import Shapes
from captioner.model.template import DEFAULT_TEMPLATE
from captioner.model.tokenizer import read_tokenizer
from captioner.model.towers.table import read_tower
from captioner.training.fit.fit_stores import named_model, part_options
from captioner.training.fit.rungs import projector_of

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["keeps_projector", "language_of", "save_initial_bundle"]

_RUNG = ("projector", "image_features", "image_tokens")
"""Settings that say of which kind a new projector is."""


@dataclass(frozen=True, kw_only=True)
class _Models:
    """The models that a fit begins with."""

    clip: str
    llama: str
    template: str
    whole: Parts | None
    """The model whose projector goes on learning; None for a new projector."""


def keeps_projector(config: FitConfig) -> bool:
    """Whether the projector of the model goes on learning: as asked, by default with LoRA."""
    asked = config.model.initial_projector
    return asked == "model" if asked else config.training.lora_rank > 0 and config.model.clip is None


def save_initial_bundle(config: FitConfig, folder: str, options: Mapping[str, Any] | None = None) -> BundleDescription:
    """Write the bundle with the initial weights, a function of the settings, and return its description.

    Raises ConfigError for settings that do not fit the models, BundleError."""
    import torch  # here and below, not above: a wrong path is refused without it

    models = _models(config)
    language = _language(models, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        shape, projector = _projector(models, language, config)
        adapter = _adapter(models.whole, language.family.shapes(language.config), config.training)
    return save_bundle(
        folder,
        projector,
        shape,
        clip=models.clip,
        llama=models.llama,
        template=models.template,
        adapter=adapter,
        storage_options=dict(options or {}),
    )


def language_of(config: FitConfig, start: BundleDescription) -> LanguageSource:
    """Return the language model of a fit's initial bundle, not loaded."""
    return read_language(_folder(start.llama, config), template=start.template)


def _models(config: FitConfig) -> _Models:
    """Return the models of the flags. Raises BundleError for a model that has no parts of its own."""
    model = config.model
    if model.clip and model.llama:
        template = model.template or _default_template(model.llama, config)
        return _Models(clip=model.clip, llama=model.llama, template=template, whole=None)
    named = named_model(config)
    found = read_parts(named, part_options(named, config) or None, allow_remote_parts=model.allow_remote_parts)
    if found.kind != "bundle":
        raise BundleError(
            f"{found.name} is a LLaVA checkpoint, whose CLIP and LLaMA are not stored apart; expected a bundle, or the"
            " two by --clip and --llama"
        )
    return _Models(
        clip=_absolute_part(found.tower.folder.name),
        llama=_absolute_part(found.language.folder.name),
        template=model.template or found.template.text,
        whole=found if keeps_projector(config) else None,
    )


def _language(models: _Models, config: FitConfig) -> LanguageSource:
    return read_language(_folder(models.llama, config), template=models.template)


def _projector(models: _Models, language: LanguageSource, config: FitConfig) -> "tuple[ProjectorConfig, nn.Module]":
    """Return the projector's shape and its first weights: random, or those of the model."""
    from captioner.model.projector import build_projector

    if models.whole is None:
        shape = projector_of(config.training, read_tower(_folder(models.clip, config)), language.width)
        check(config.training.learning_rate > 0, "--learning-rate", 0, "more than 0 for a projector of random weights")
        return shape, build_projector(shape)
    shape = models.whole.projector
    _check_rung(models.whole, config.training)
    projector = build_projector(shape)
    stored = models.whole.projector_weights
    projector.load_state_dict({name: stored.tensor(name) for name in stored.tensors})
    return shape, projector


def _check_rung(model: Parts, training: TrainingConfig) -> None:
    """Raise ConfigError for flags that ask for another projector than the one that goes on learning."""
    asked = [name for name in _RUNG if getattr(training, name) != getattr(TrainingConfig(), name)]
    if asked and projector_of(training, model.tower, model.language.width).kind != model.projector.kind:
        given = ", ".join(f"{flag_name(name)} {getattr(training, name)}" for name in asked)
        raise ConfigError(
            f"{given} is given, but the projector of {model.name}, which goes on learning, is of kind"
            f" {model.projector.kind} with {model.projector.num_image_tokens} image tokens; expected none of these"
            " flags, or --initial-projector random"
        )


def _adapter(
    model: Parts | None, base: Shapes, training: TrainingConfig
) -> "tuple[AdapterConfig, dict[str, Tensor]] | None":
    """Return the first adapter: new by peft's rule, or that of the model, which goes on learning or stays as it is."""
    found = model.adapter if model else None
    if not training.lora_rank:
        return (found.config, found.tensors()) if found else None
    config = adapter_config(training.lora_rank, training.lora_modules, training.lora_alpha, base)
    if found:
        _check_adapter(str(model and model.name), found, config)
        return config, found.tensors()
    return config, {name: _first_weight(name, shape) for name, shape in config.shapes(base).items()}


def _check_adapter(model: str, found: Adapter, asked: AdapterConfig) -> None:
    if (found.config.rank, found.config.alpha, {*found.config.modules}) != (asked.rank, asked.alpha, {*asked.modules}):
        raise ConfigError(
            f"{model} has an adapter already, of rank {found.config.rank}, alpha {found.config.alpha:g} and the maps"
            f" {', '.join(found.config.modules)}, which goes on learning; expected --lora-rank {found.config.rank}"
            f" --lora-alpha {found.config.alpha:g} --lora-modules {','.join(found.config.modules)}, or"
            " --initial-projector random to begin without it"
        )


def _first_weight(name: str, shape: tuple[int, ...]) -> "Tensor":
    """Return a matrix of a new adapter: updates are zero at first, since the second matrix is."""
    import torch

    weight = torch.zeros(shape)
    if ".lora_A." in name:
        torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight


def _folder(part: str, config: FitConfig) -> Folder:
    return open_folder(part, part_options(part, config) or None)


def _default_template(language_model: str, config: FitConfig) -> str:
    """Return the tokenizer's start token, where it has one, and the image."""
    tokenizer = read_tokenizer(_folder(language_model, config))
    if "<|begin_of_text|>" in tokenizer.get_added_vocab():
        return DEFAULT_TEMPLATE
    return f"{tokenizer.bos_token or ''}{{image}}"


def _absolute_part(part: str) -> str:
    """Return the name of CLIP or LLaMA for any process: the absolute path of a local folder."""
    is_local = "://" not in part and Path(part).is_dir()
    return str(Path(part).resolve()) if is_local else part
