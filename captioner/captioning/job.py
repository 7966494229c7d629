"""A caption job whose config is resolved, once: what it reads, what it writes, which captions its table holds.

Later steps take the locations from here and never go back to the paths and options of the config. Opens no store; asks
for the address of the input's web server.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from captioner import demo
from captioner.captioning.job_prompts import (
    answers_of,
    asked_prompts,
    check_model_takes,
    read_job_prompts,
    with_prompt_columns,
)
from captioner.config import CaptionJobConfig
from captioner.errors import ConfigError
from captioner.inputs.access import with_home
from captioner.model.bundle import BundleDescription
from captioner.prompts import Prompt
from captioner.schema import TRANSIENT_REASONS, RejectReason
from captioner.storage import Location
from captioner.storage.urls import redact

__all__ = ["DEMO_MODEL", "Job", "output_location", "resolve"]

DEMO_MODEL = "the demo model knows only drawn shapes: what it says of any other image is wrong"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a caption job reads and writes."""

    config: CaptionJobConfig
    """Its paths are those of `images` and `output`, so that they mean the same in the folder of any worker."""

    images: Location
    """The input."""

    output: Location
    """Folder of the caption table."""

    prompts: tuple[Prompt, ...] = ()
    """What `--prompts` names; captions answer the model's own prompt where `caption` is not among them."""

    @property
    def retried_reasons(self) -> frozenset[str]:
        """The reject reasons whose images are tried again. Raises ConfigError for an unknown reason."""
        text = self.config.retry_failures
        groups = {"transient": TRANSIENT_REASONS, "all": frozenset(RejectReason), "none": frozenset[str]()}
        if text in groups:
            return frozenset(groups[text])
        unknown = sorted(set(text.split(",")) - set(RejectReason))
        if unknown:
            raise ConfigError(
                f"--retry-failures names {', '.join(unknown)}; expected transient, all, none, or some of"
                f" {', '.join(RejectReason)}"
            )
        return frozenset(text.split(","))

    @property
    def reads_demo_images(self) -> bool:
        """Whether the input is the embedded images."""
        return str(self.images) == str(Location(str(demo.images_path())))

    @property
    def is_demo_model_elsewhere(self) -> bool:
        """Whether the demo model is to caption other images than the embedded ones."""
        return self.config.model.model == "demo" and not self.reads_demo_images

    def check_model(self, model: BundleDescription) -> None:
        """Raise ConfigError unless the model takes prompts and longest caption, and scores as asked."""
        wanted, prompt = self.config.decoding.max_new_tokens, model.num_prompt_tokens + model.num_image_tokens
        room = model.context_length - prompt
        if self.prompts:
            check_model_takes(self.asked(model), model)
        elif wanted > room:
            raise ConfigError(
                f"--max-new-tokens is {wanted}; {model.name} reads {model.context_length} tokens,"
                f" of which prompt and image take {prompt}: expected at most {room}"
            )
        if self.config.scoring.needs_text_tower:
            model.check_text_tower("--clip-score" if self.config.scoring.clip_score else "--rerank clip-score")

    def asked(self, model: BundleDescription) -> tuple[Prompt, ...]:
        """Return what is asked of each image by name, `caption` among it; nothing where there are no named prompts."""
        return asked_prompts(self.prompts, model, self.config.decoding)

    def identity(self, model: BundleDescription) -> dict[str, Any]:
        """Return everything that decides which captions the table holds: no credentials, limits or resources."""
        config, access = self.config, self.config.input
        scoring = {"scoring": {**asdict(config.scoring), "text_tower": model.text_fingerprint}}
        return {
            "input": redact(_without_slash(self.images)),
            "columns": {
                "image_column": access.image_column,
                "id_column": access.id_column,
                "keep_columns": list(access.keep_columns),
                **({} if access.tar_images == "first" else {"tar_images": access.tar_images}),
                **({"explode_images": True} if access.explode_images else {}),
            },
            "model": {"name": model.name, "fingerprint": model.fingerprint, "dtype": config.model.dtype},
            "decoding": {**asdict(config.decoding), "stop": list(config.decoding.stop)},
            "image": {"size": model.image_size, "fast_decode": config.image.fast_decode},
            **({"prompts": {prompt.name: prompt.identity for prompt in self.prompts}} if self.prompts else {}),
            **(scoring if config.scoring.needs_text_tower else {}),  # left out, so that older tables stay the same
        }


def resolve(config: CaptionJobConfig) -> Job:
    """Return the job that a config describes."""
    path = str(demo.images_path()) if config.input_path == "demo" else config.input_path
    images = Location(path, config.input.storage_options)
    output, prompts = _output(config, images), read_job_prompts(config)
    answers = answers_of(config.decoding, prompts)
    return Job(
        config=replace(
            config,
            input_path=images.url_with_secrets,
            input=with_prompt_columns(with_home(config.input, images.url_with_secrets), prompts, answers),
            output=output.url_with_secrets,
            model=replace(config.model, model_storage_options=_model_options(config, images, output)),
        ),
        images=images,
        output=output,
        prompts=prompts,
    )


def output_location(config: CaptionJobConfig) -> Location:
    """Return the folder of the table that a resolved config writes."""
    return _output(config, Location(config.input_path, config.input.storage_options))


def _output(config: CaptionJobConfig, images: Location) -> Location:
    """Return where the table goes; its store has the input's options unless others are given."""
    if config.input.output_storage_options is not None:
        return Location(config.output, config.input.output_storage_options)
    if images.is_local:  # which needs no options itself, so that those given are meant for the output
        return Location(config.output, images.storage_options)
    return images.beside(config.output)


def _model_options(config: CaptionJobConfig, images: Location, output: Location) -> dict[str, object]:
    """Return the options of the model's store: those given, else the images' on the images' server alone.

    Local images need none themselves: the options given with them belong to the server of a remote output that has
    them too, else to the model's."""
    if config.model.model_storage_options is not None:
        return config.model.model_storage_options
    owners = [images] if config.input.output_storage_options is not None else [images, output]
    owner = next((location for location in owners if not location.is_local), None)
    return owner.beside(config.model.model).storage_options if owner else images.storage_options


def _without_slash(images: Location) -> str:
    """Return a local path without the slash that a shell adds; on a store `a` and `a/` may differ."""
    url = images.url_with_secrets
    return url.rstrip("/") or url if images.is_local else url
