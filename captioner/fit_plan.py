"""What a fit will do: read the labels, tie CLIP and LLaMA together with random weights, count images and steps.

Everything that can be refused is refused here, before Ray is started. Loads no weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from captioner.config import FitConfig, FitModelConfig, ModelConfig
from captioner.errors import BundleError, ConfigError
from captioner.feature_plan import FeaturePlan, plan_features
from captioner.fitting.loop import num_steps_of
from captioner.fitting.output import FitOutput
from captioner.labels import Labels, read_labels
from captioner.model.bundle import BundleDescription, describe, save_bundle
from captioner.model.clip import read_clip
from captioner.model.folder import open_folder
from captioner.model.llama import read_llama
from captioner.model.projector import ProjectorConfig, build_projector
from captioner.model.template import DEFAULT_TEMPLATE
from captioner.sources.urls import absolute, join, local_path, redact, scheme

__all__ = ["FitPlan", "open_output", "plan_fit", "save_start"]

_KINDS = {"linear": "linear", "mlp": "pooled_mlp"}
_NOT_SHAPING = ("log_every", "checkpoint_every", "gradient_checkpointing")


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """One fit, checked."""

    config: FitConfig
    output: FitOutput
    labels: Labels
    start: BundleDescription
    """The bundle with the first weights."""

    features: FeaturePlan
    identity: dict[str, Any]
    """Everything that decides which weights come out; no credentials, no resources."""

    @property
    def num_steps(self) -> int:
        """Steps of the whole fit, if every image has features."""
        return num_steps_of(self.config.training, self.labels.counts()["train"].num_captions)

    @property
    def tensorboard_folder(self) -> str | None:
        """Where TensorBoard's events go, if they are wanted."""
        return local_path(join(self.output.run_folder, "tensorboard")) if self.config.target.tensorboard else None

    @property
    def model(self) -> ModelConfig:
        """How workers load the models."""
        return ModelConfig(model=self.start.name, dtype=self.config.model.dtype, device=self.config.model.device)

    def lines(self) -> Iterator[str]:
        """Yield the plan as people read it."""
        counts = self.labels.counts()
        splits = ", ".join(f"{name} {c.num_images:,} images {c.num_captions:,} captions" for name, c in counts.items())
        unused = {**self.labels.failed, **self.labels.left_out}
        out = "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in unused.items()) if unused else ""
        training = self.config.training
        yield f"labels    {redact(self.config.labels.labels_path)}: {splits}{out}"
        yield f"clip      {self.start.clip} ({self.start.clip_parameters:,} parameters, frozen)"
        yield f"llama     {self.start.llama} ({self.start.llama_parameters:,} parameters, frozen)"
        projector = self.start.projector
        yield (
            f"projector {projector.kind} {projector.num_features} -> {projector.num_image_tokens} x {projector.width}"
            f" ({self.start.projector_parameters:,} parameters, fitted)"
        )
        yield f"template  {self.start.template!r}"
        yield f"features  {len(self.features.missing):,} of {self.labels.table.num_rows:,} images to compute"
        yield f"steps     {self.num_steps:,} of {training.batch_size:,} examples"
        yield f"output    {redact(self.output.url)}"


def open_output(config: FitConfig) -> FitOutput:
    """Return the output folder, after checking that it is nobody else's."""
    labels, output = config.labels, absolute(config.target.output)
    options = config.target.output_storage_options
    if options is None:
        is_shared = scheme(labels.labels_path) in (scheme(output), "file")
        options = labels.storage_options if is_shared else {}
    found = FitOutput(output, options)
    found.check_owner()
    return found


def plan_fit(config: FitConfig, output: FitOutput, run_folder: str) -> FitPlan:
    """Return the plan of a fit; what is found out about the labels is written below `run_folder`.

    Raises UsageError for whatever cannot run: labels, models, another fit's output, a flag out of range.
    """
    options = output.storage_options
    with TemporaryDirectory() as folder:
        start = save_start(config, folder)
    identity = _identity(config, start)
    output.check(identity)  # before anything is written there
    _check_context(config, start)
    labels = read_labels(config.labels, run_folder, options)
    identity["labels"] = labels.fingerprint
    output.check(identity)
    model = ModelConfig(dtype=config.model.dtype, device=config.model.device)
    shared = config.target.features
    folder = absolute(shared) if shared else join(output.run_folder, "features")
    features = plan_features(
        labels,
        start,
        model,
        config.image,
        run_folder=run_folder,
        features_folder=folder,
        output_options=options,
    )
    return FitPlan(config=config, output=output, labels=labels, start=start, features=features, identity=identity)


def save_start(config: FitConfig, folder: str, options: Mapping[str, Any] | None = None) -> BundleDescription:
    """Write the bundle with the first weights, which follow from the seed, and return its description."""
    clip, llama, template = _parts(config.model, config.labels.storage_options)
    projector = ProjectorConfig(
        kind=_KINDS[config.training.projector],
        num_features=int(read_clip(open_folder(clip)).config.hidden_size),
        width=read_llama(open_folder(llama), template=template).width,
        num_image_tokens=config.training.image_tokens,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        weights = build_projector(projector)
    return save_bundle(
        folder, weights, projector, clip=clip, llama=llama, template=template, storage_options=dict(options or {})
    )


def _parts(model: FitModelConfig, options: dict[str, object]) -> tuple[str, str, str]:
    """Return CLIP, LLaMA and template. Raises BundleError for a model that has no CLIP and LLaMA of its own."""
    if model.clip and model.llama:
        return model.clip, model.llama, model.template or DEFAULT_TEMPLATE
    found = describe(model.model or "demo", options or None)
    if found.kind != "bundle":
        raise BundleError(
            f"{found.name} is a LLaVA checkpoint, whose CLIP and LLaMA cannot be had apart; expected a bundle, or the"
            " two by --clip and --llama"
        )
    return _anywhere(found.clip), _anywhere(found.llama), model.template or found.template


def _anywhere(part: str) -> str:
    """Return a part of a bundle as every process can name it: a folder of this machine by its absolute path."""
    is_local = "://" not in part and Path(part).is_dir()
    return str(Path(part).resolve()) if is_local else part


def _check_context(config: FitConfig, start: BundleDescription) -> None:
    prompt = start.num_prompt_tokens + start.num_image_tokens
    room = start.context_length - prompt
    longest = config.training.max_caption_tokens
    if longest > room:
        raise ConfigError(
            f"--max-caption-tokens is {longest}; the LLaMA reads {start.context_length} tokens, of which prompt and"
            f" image take {prompt}: expected at most {room}"
        )


def _identity(config: FitConfig, start: BundleDescription) -> dict[str, Any]:
    training = {name: value for name, value in asdict(config.training).items() if name not in _NOT_SHAPING}
    return {
        "clip": start.clip_fingerprint,
        "llama": start.llama_fingerprint,
        "template": start.template,
        "projector": asdict(start.projector),
        "training": training,
        "dtype": config.model.dtype,
        "fast_decode": config.image.fast_decode,
    }
