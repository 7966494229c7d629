"""The plan of a fit: labels read, CLIP and LLaMA joined by a projector with random weights, images and steps counted.

Everything that can be refused is refused here, before Ray starts. Loads no weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

from captioner.config import Dtype, FitConfig, ModelConfig
from captioner.config.checks import flag_name
from captioner.errors import ConfigError
from captioner.model.bundle import BundleDescription
from captioner.model.language.language import LanguageSource
from captioner.model.layouts.llava_export import check_llava
from captioner.storage.urls import absolute, join, local_path, redact
from captioner.training.features.feature_plan import FeaturePlan, plan_features
from captioner.training.fit.fit_output import FitOutput
from captioner.training.fit.fit_stores import model_options, options_at
from captioner.training.fit.initial_bundle import InitialModels, keeps_projector, read_models, save_initial_bundle
from captioner.training.fit.rungs import rung, settings_of
from captioner.training.fit.schedule import examples_per_epoch, num_steps_of
from captioner.training.labels.labels import Labels, read_labels

__all__ = ["FitPlan", "open_output", "plan_fit"]

_NOT_IN_IDENTITY = ("log_every", "checkpoint_every", "gradient_checkpointing")
_LATER = {
    "captions_per_epoch": "all",
    "image_features": "pooled",
    "min_crop_area": 1.0,
    "lora_rank": 0,
    "lora_modules": (),
    "lora_alpha": None,
    "lora_learning_rate": 2e-4,
}
"""Settings that older fits do not record, and their values in these."""


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """One fit, checked."""

    config: FitConfig
    output: FitOutput
    labels: Labels
    models: InitialModels
    start: BundleDescription
    """The bundle with the initial weights."""

    features: FeaturePlan
    identity: dict[str, Any]
    """Everything that decides on the final weights; no credentials, no resources."""

    @property
    def language(self) -> LanguageSource:
        """The language model, not loaded."""
        return self.models.language

    @property
    def num_steps(self) -> int:
        """Steps of the whole fit, if every image has features."""
        training, count = self.config.training, self.labels.counts()["train"]
        shown = examples_per_epoch(training, num_images=count.num_images, num_captions=count.num_captions)
        return num_steps_of(training, shown)

    @property
    def tensorboard_folder(self) -> str | None:
        """Folder of TensorBoard's events; None if the config asks for none."""
        return local_path(join(self.output.run_folder, "tensorboard")) if self.config.target.tensorboard else None

    @property
    def model_options(self) -> dict[str, object]:
        """Storage options of CLIP and LLaMA."""
        return model_options(self.config, self.output)

    def for_workers(self, *, has_gpus: bool) -> "FitPlan":
        """Return the plan for workers with or without GPUs: features have a dtype."""
        dtype = _features_dtype(self.config, has_gpus=has_gpus)
        if dtype == self.features.model.dtype:
            return self
        run_folder = self.features.run_folder
        features = _features(self.config, self.output, self.labels, self.start, run_folder, dtype)
        return replace(self, features=features)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the plan for people."""
        counts = self.labels.counts()
        splits = ", ".join(f"{name} {c.num_images:,} images {c.num_captions:,} captions" for name, c in counts.items())
        unused = {**self.labels.failed, **self.labels.left_out}
        out = "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in unused.items()) if unused else ""
        training = self.config.training
        yield f"labels    {redact(self.config.labels.labels_path)}: {splits}{out}"
        if self.start.checkpoint:
            yield f"model     {self.start.checkpoint.location}, a published checkpoint"
        yield f"clip      {self.start.clip} ({self.start.clip_parameters:,} parameters, frozen)"
        yield f"llama     {self.start.llama} ({self.start.llama_parameters:,} parameters, frozen)"
        projector = self.start.projector
        begun = ", from its weights in --model" if keeps_projector(self.config, self.start) else ""
        learns = f"fitted{begun}" if training.learning_rate else "frozen"
        yield (
            f"projector {projector.kind} {projector.num_features} -> {projector.num_image_tokens} x {projector.width}"
            f" ({self.start.projector_parameters:,} parameters, {learns})"
        )
        if adapter := self.start.adapter:
            learns = "fitted" if training.lora_rank else "frozen"
            yield (
                f"adapter   LoRA of rank {adapter.rank}, alpha {adapter.alpha:g} on {', '.join(adapter.modules)}"
                f" ({self.start.adapter_parameters:,} parameters, {learns})"
            )
        yield f"template  {self.start.template!r}"
        yield from _recipe_lines(self.config)
        num_missing, num_images = len(self.features.missing), self.labels.table.num_rows
        if projector.reads_patches:
            yield f"rung      {rung(projector)}"
            yield f"pixels    {num_missing:,} of {num_images:,} images to check; streamed into each step, never kept"
            if num_bytes := self.features.bytes_to_keep:
                where = redact(self.features.cache.url)
                yield f"images    copied from inside their files to {where}: at most {-(-num_bytes // 10**6):,} MB"
        else:
            yield f"features  {num_missing:,} of {num_images:,} images to compute"
        shown = ", one caption an image and epoch" if training.captions_per_epoch == "one" else ""
        shown += f", crops of {training.min_crop_area:g} or more of it" if training.min_crop_area < 1 else ""
        yield f"steps     {self.num_steps:,} of {training.batch_size:,} examples{shown}"
        yield f"output    {redact(self.output.url)}"
        if self.config.target.save_as:
            yield f"llava     {redact(self.output.llava_url)}"


def _recipe_lines(config: FitConfig) -> Iterator[str]:
    """Yield what the recipe is, with its source, and what of it was set otherwise."""
    if config.recipe:
        recipe, training = config.recipes[config.recipe], asdict(config.training)
        yield f"recipe    {config.recipe}: {recipe.figure}; {recipe.source}"
        ours = [name for name, value in recipe.settings.items() if training[name] == value]
        yield "          " + ", ".join(f"{flag_name(name)} {recipe.settings[name]}" for name in ours)
        others = [f"{flag_name(n)} {training[n]} in place of {v}" for n, v in recipe.settings.items() if n not in ours]
        if others:
            yield f"          but {', '.join(others)}"


def open_output(config: FitConfig) -> FitOutput:
    """Return the output folder, after checking that only this fit may have written it."""
    output = absolute(config.target.output)
    found = FitOutput(output, options_at(output, config))
    found.check_owner()
    return found


def plan_fit(
    config: FitConfig, output: FitOutput, run_folder: str, take_lease: Callable[[], object] = lambda: None
) -> FitPlan:
    """Return the plan of a fit; facts about the labels are written below `run_folder`.

    take_lease: called before the first byte is written, once no model is left to refuse. Raises UsageError for what
    cannot run: labels, models, another fit's output, a flag out of range.
    """
    import torch  # here and below, not above: a wrong path is refused without it

    models = read_models(config)
    with TemporaryDirectory() as folder:
        start = save_initial_bundle(config, folder, model_options(config, output), models)
    if keeps_projector(config, start):
        config = replace(config, training=replace(config.training, **settings_of(start.projector)))
    identity = _identity(config, start)
    output.refuse_other_fit(identity)  # before anything is written there
    _check_context(config, start)
    if config.target.save_as:
        check_llava(start.projector, start.tower_config.model_type, models.language, start.template)
    take_lease()
    output.refuse_other_fit(identity)  # again: another fit may have begun here while this one waited for the lease
    labels = read_labels(config.labels, run_folder, output.storage_options)
    _check_validation(config, labels)
    identity["labels"] = labels.fingerprint
    output.refuse_other_fit(identity)
    dtype = _features_dtype(config, has_gpus=torch.cuda.is_available())
    return FitPlan(
        config=config,
        output=output,
        labels=labels,
        models=models,
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
        features_options=options_at(folder, config) if shared else output.storage_options,
        clip_options=model_options(config, output),
        output_options=output.storage_options,
        keeps_features=not start.projector.reads_patches,
    )


def _check_context(config: FitConfig, start: BundleDescription) -> None:
    prompt = start.num_prompt_tokens + start.num_image_tokens
    room = start.context_length - prompt
    longest = config.training.max_caption_tokens
    if longest > room:
        raise ConfigError(
            f"--max-caption-tokens is {longest}; the LLaMA reads {start.context_length} tokens, of which prompt and"
            f" image take {prompt}: expected at most {room}"
        )


def _check_validation(config: FitConfig, labels: Labels) -> None:
    """Raise ConfigError if the config chooses weights by their validation figures and there is no validation image."""
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
    training = {name: value for name, value in asdict(config.training).items() if name not in _NOT_IN_IDENTITY}
    training = {name: value for name, value in training.items() if value != _LATER.get(name, ...)}
    training["image_tokens"] = start.projector.num_image_tokens
    # Random weights follow from the seed; those of a model do not.
    begun = {"start": start.fingerprint} if keeps_projector(config, start) else {}
    return begun | {
        "clip": start.clip_fingerprint,
        "llama": start.llama_fingerprint,
        "template": start.template,
        "projector": asdict(start.projector),
        "training": training,
        "dtype": config.model.dtype,
        "fast_decode": config.image.fast_decode,
    }
