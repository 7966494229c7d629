"""What a fit will do: read the labels, tie CLIP and LLaMA together with random weights, count images and steps.

Everything that can be refused is refused here, before Ray is started. Loads no weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from captioner.config import Dtype, FitConfig, ModelConfig
from captioner.errors import BundleError, ConfigError
from captioner.feature_plan import FeaturePlan, plan_features
from captioner.fitting.loop import num_steps_of
from captioner.fitting.output import FitOutput
from captioner.labels import Labels, read_labels
from captioner.model.bundle import BundleDescription, describe, save_bundle
from captioner.model.clip import read_clip
from captioner.model.folder import Folder, open_folder
from captioner.model.llama import LlamaSource, read_llama
from captioner.model.projector import ProjectorConfig, build_projector
from captioner.model.template import DEFAULT_TEMPLATE
from captioner.sources.urls import absolute, join, local_path, redact, scheme

__all__ = ["FitPlan", "llama_of", "model_options", "open_output", "plan_fit", "save_start"]

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
    def model_options(self) -> dict[str, object]:
        """What opens the stores of CLIP and LLaMA."""
        return model_options(self.config, self.output)

    def on(self, *, has_gpus: bool) -> "FitPlan":
        """Return this as it is for workers with or without GPUs."""
        dtype = _features_dtype(self.config, has_gpus=has_gpus)
        if dtype == self.features.model.dtype:
            return self
        run_folder = self.features.run_folder
        features = _features(self.config, self.output, self.labels, self.start, run_folder, dtype)
        return replace(self, features=features)

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
    output = absolute(config.target.output)
    found = FitOutput(output, _options_at(output, config))
    found.check_owner()
    return found


def _options_at(url: str, config: FitConfig) -> dict[str, object]:
    """Return what opens the store of a URL: the output's options on the output's kind of store, else those of LABELS
    on theirs; those of LABELS anywhere remote if LABELS is local, as nobody else can be meant by them."""
    own, of_labels = config.target.output_storage_options, config.labels.storage_options
    kind = scheme(absolute(url))
    if own is not None and kind == scheme(absolute(config.target.output)):
        return own
    return of_labels if scheme(config.labels.labels_path) in (kind, "file") and kind != "file" else {}


def model_options(config: FitConfig, output: FitOutput) -> dict[str, object]:
    """Return what opens CLIP and LLaMA, and the bundle with the first weights that names them."""
    part = config.model.model or config.model.clip or "demo"
    return output.storage_options if scheme(output.url) != "file" else _options_at(part, config)


def plan_fit(config: FitConfig, output: FitOutput, run_folder: str) -> FitPlan:
    """Return the plan of a fit; what is found out about the labels is written below `run_folder`.

    Raises UsageError for whatever cannot run: labels, models, another fit's output, a flag out of range.
    """
    with TemporaryDirectory() as folder:
        start = save_start(config, folder, model_options(config, output))
    identity = _identity(config, start)
    output.check(identity)  # before anything is written there
    _check_context(config, start)
    labels = read_labels(config.labels, run_folder, output.storage_options)
    _check_judge(config, labels)
    identity["labels"] = labels.fingerprint
    output.check(identity)
    dtype = _features_dtype(config, has_gpus=torch.cuda.is_available())
    return FitPlan(
        config=config,
        output=output,
        labels=labels,
        start=start,
        features=_features(config, output, labels, start, run_folder, dtype),
        identity=identity,
    )


def _features_dtype(config: FitConfig, *, has_gpus: bool) -> Dtype:
    if config.model.dtype != "auto":
        return config.model.dtype
    is_cpu = not has_gpus or config.model.device == "cpu" or config.resources.gpus_per_worker == 0
    return "float32" if is_cpu else "bfloat16"


def _features(
    config: FitConfig, output: FitOutput, labels: Labels, start: BundleDescription, run_folder: str, dtype: Dtype
) -> FeaturePlan:
    shared = config.target.features
    folder = absolute(shared) if shared else join(output.run_folder, "features")
    return plan_features(
        labels,
        start,
        ModelConfig(dtype=dtype, device=config.model.device),
        config.image,
        run_folder=run_folder,
        features_folder=folder,
        features_options=_options_at(folder, config) if shared else output.storage_options,
        clip_options=model_options(config, output),
        output_options=output.storage_options,
    )


def save_start(config: FitConfig, folder: str, options: Mapping[str, Any] | None = None) -> BundleDescription:
    """Write the bundle with the first weights, which follow from the seed, and return its description."""
    clip, llama, template = _parts(config)
    projector = ProjectorConfig(
        kind=_KINDS[config.training.projector],
        num_features=int(read_clip(_folder(clip, config)).config.hidden_size),
        width=read_llama(_folder(llama, config), template=template).width,
        num_image_tokens=config.training.image_tokens,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        weights = build_projector(projector)
    return save_bundle(
        folder, weights, projector, clip=clip, llama=llama, template=template, storage_options=dict(options or {})
    )


def llama_of(plan: FitPlan) -> LlamaSource:
    """Return the LLaMA that a fit is for, not loaded."""
    return read_llama(_folder(plan.start.llama, plan.config), template=plan.start.template)


def _folder(part: str, config: FitConfig) -> Folder:
    return open_folder(part, _options_at(part, config) or None)


def _parts(config: FitConfig) -> tuple[str, str, str]:
    """Return CLIP, LLaMA and template. Raises BundleError for a model that has no CLIP and LLaMA of its own."""
    model = config.model
    if model.clip and model.llama:
        return model.clip, model.llama, model.template or DEFAULT_TEMPLATE
    named = model.model or "demo"
    found = describe(named, _options_at(named, config) or None)
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


def _check_judge(config: FitConfig, labels: Labels) -> None:
    """Raise ConfigError for a choice between weights where nothing is there to judge them by."""
    if labels.counts()["validation"].num_images:
        return
    training = config.training
    asked = [f"--early-stop {training.early_stop}"] if training.early_stop else []
    asked += ["--keep-best-by cider"] if training.keep_best_by == "cider" else []
    if asked:
        raise ConfigError(
            f"{asked[0]} needs a validation split; LABELS have no image in it. Name one with --split-column, give it"
            " images with --validation-share, or leave the flag out"
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
