"""The bundle with which a fit begins: tower and language model, a projector, and an adapter where LoRA is asked for.

Random weights follow from the seed; others are those of the model that the user named. Knows models; no labels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.config import FitConfig, TrainingConfig
from captioner.config.checks import check, flag_name
from captioner.errors import ConfigError
from captioner.model.adapter import Adapter, AdapterConfig, adapter_config
from captioner.model.bundle import BundleDescription, read_parts, save_bundle
from captioner.model.folder import Folder, open_folder
from captioner.model.language.language import LanguageSource
from captioner.model.language.table import read_language
from captioner.model.parts import Checkpoint, Parts
from captioner.model.projector_config import ProjectorConfig
from captioner.model.shapes import Shapes
from captioner.model.template import DEFAULT_TEMPLATE
from captioner.model.tokenizer import read_tokenizer
from captioner.model.towers.table import read_tower
from captioner.training.fit.fit_stores import named_model, part_options
from captioner.training.fit.rungs import projector_of

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["InitialModels", "keeps_projector", "read_models", "save_initial_bundle"]

_RUNG = ("projector", "image_features", "image_tokens")
"""Settings that say of which kind a new projector is."""


@dataclass(frozen=True, kw_only=True)
class InitialModels:
    """The models that a fit begins with."""

    clip: str = ""
    llama: str = ""
    checkpoint: Checkpoint | None = None
    """A published one, in place of both."""

    template: str
    language: LanguageSource
    whole: Parts | None = None
    """The model whose projector goes on learning; None for a new projector."""


def keeps_projector(config: FitConfig, start: BundleDescription | None = None) -> bool:
    """Whether the projector of the model goes on learning: as asked, by default with LoRA and of a checkpoint.

    start: the initial bundle, which tells of a published checkpoint."""
    asked = config.model.initial_projector
    by_default = config.training.lora_rank > 0 and config.model.llama is None
    return asked == "model" if asked else by_default or bool(start and start.checkpoint)


def save_initial_bundle(
    config: FitConfig, folder: str, options: Mapping[str, Any] | None = None, models: InitialModels | None = None
) -> BundleDescription:
    """Write the bundle with the initial weights, a function of the settings, and return its description.

    models: what `read_models` returns for the config. Raises ConfigError for settings that do not fit the models,
    BundleError."""
    import torch  # here and below, not above: a wrong path is refused without it

    models = models or read_models(config)
    language = models.language
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        shape, projector = _projector(models, config)
        adapter = _adapter(models.whole, language.family.shapes(language.config), config.training)
    return save_bundle(
        folder,
        projector,
        shape,
        clip=models.clip,
        llama=models.llama,
        checkpoint=models.checkpoint,
        template=models.template,
        adapter=adapter,
        storage_options=dict(options or {}),
    )


def read_models(config: FitConfig) -> InitialModels:
    """Return the models of the flags, not loaded. Raises ConfigError for flags that are for models of another kind."""
    model = config.model
    if model.clip and model.llama:
        template = model.template or _default_template(model.llama, config)
        return _of_parts(model.clip, model.llama, template, config)
    found = _read_model(config)
    checkpoint = found.checkpoint
    if found.kind == "llava":
        named = _absolute_part(named_model(config))
        checkpoint = Checkpoint(
            location=named, tokenizer=_absolute(model.tokenizer), vision_tower=_absolute(model.clip)
        )
    if checkpoint is None:
        template = model.template or found.template.text
        clip, llama = (_absolute_part(part.folder.name) for part in (found.tower, found.language))
        return replace(_of_parts(clip, llama, template, config), whole=found if keeps_projector(config) else None)
    _check_checkpoint(found, config)
    template = found.template.text if found.kind == "llava" else model.template or found.template.text
    return InitialModels(checkpoint=checkpoint, template=template, language=found.language, whole=found)


def _of_parts(clip: str, llama: str, template: str, config: FitConfig) -> InitialModels:
    language = read_language(_folder(llama, config), template=template)
    return InitialModels(clip=clip, llama=llama, template=template, language=language)


def _read_model(config: FitConfig) -> Parts:
    """Return the parts of --model. Raises ConfigError for flags that are for published checkpoints alone."""
    model, named = config.model, named_model(config)
    is_bundle = named == "demo" or _folder(named, config).has("bundle.json")
    options = {
        "vision_tower": model.clip,
        "tokenizer": model.tokenizer,
        "prompt": None if is_bundle else model.template,
    }
    return read_parts(
        named, part_options(named, config) or None, allow_remote_parts=model.allow_remote_parts, **options
    )


def _check_checkpoint(found: Parts, config: FitConfig) -> None:
    """Raise ConfigError for a published checkpoint that a fit cannot begin with."""
    if found.anyres:
        raise ConfigError(
            f"{found.name} cuts an image into up to {found.anyres.most_image_tiles} tiles, so that images differ in"
            " their number of image tokens; a fit reads one square an image: expected a checkpoint without tiles, as"
            " LLaVA-1.5's, or a tower and a language model by --clip and --llama"
        )
    if config.model.initial_projector == "random":
        raise ConfigError(
            f"--initial-projector is random, but {found.name} is or stands over a published checkpoint, whose projector"
            " goes on learning; expected none, or a tower and a language model by --clip and --llama"
        )


def _projector(models: InitialModels, config: FitConfig) -> "tuple[ProjectorConfig, nn.Module]":
    """Return the projector's shape and its first weights: random, or those of the model."""
    from captioner.model.projector import build_projector

    if models.whole is None:
        tower = read_tower(_folder(models.clip, config))
        shape = projector_of(config.training, tower, models.language.width)
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
    wanted = projector_of(training, model.tower, model.language.width) if asked else model.projector
    num_tokens = training.image_tokens or model.projector.num_image_tokens
    if (wanted.kind, num_tokens) != (model.projector.kind, model.projector.num_image_tokens):
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


def _absolute(part: str | None) -> str | None:
    return None if part is None else _absolute_part(part)


def _absolute_part(part: str) -> str:
    """Return the name of CLIP or LLaMA for any process: the absolute path of a local folder."""
    is_local = "://" not in part and Path(part).is_dir()
    return str(Path(part).resolve()) if is_local else part
