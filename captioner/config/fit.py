"""What a user may set for jobs/fit_projector.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from captioner.config.checks import check
from captioner.config.image import ImageConfig
from captioner.config.labels import LabelsConfig
from captioner.config.recipes import RECIPES, Recipe, RecipeName
from captioner.config.resources import ResourceConfig
from captioner.config.training import TrainingConfig

__all__ = ["FitConfig", "FitModelConfig", "FitResourceConfig", "FitTargetConfig"]


@dataclass(frozen=True, kw_only=True)
class FitModelConfig:
    """Which vision tower and language model the projector connects. Both stay frozen, the language model's adapter
    aside."""

    model: str | None = None
    """A bundle whose CLIP, LLaMA and template are used, by folder on any store; --initial-projector says whether its
    projector is. Or a published LLaVA of one square an image, by folder or hub name, whose projector goes on learning.
    By default `demo` when LABELS is `demo`."""

    initial_projector: Literal["random", "model"] | None = None
    """The first weights of the projector: `random`, by --seed, or those of --model, which go on learning, as an adapter
    in it does. By default those of --model with --lora-rank, else random."""

    model_storage_options: dict[str, object] | None = field(default=None, repr=False)
    """fsspec options of the store of --model, or of --clip and --llama, as JSON. By default those of the output on the
    output's server, and of LABELS on theirs, or on any where LABELS is local. Never saved."""

    allow_remote_parts: bool = False
    """Follow that bundle to a CLIP or LLaMA at a URL on another server than its own."""

    clip: Annotated[str | None, arg(aliases=("--vision-tower",))] = None
    """A vision tower by hub name or path, with a language model instead of --model: CLIP, as
    openai/clip-vit-large-patch14, or SigLIP, as google/siglip-so400m-patch14-384. With a published LLaVA by --model:
    in place of the tower that it names."""

    llama: Annotated[str | None, arg(aliases=("--language-model",))] = None
    """A language model by hub name or path: LLaMA, as meta-llama/Meta-Llama-3-8B, Mistral or Qwen2."""

    tokenizer: str | None = None
    """A folder, URL or hub name of the tokenizer of a published LLaVA that has none."""

    template: str | None = None
    """Prompt, special tokens written out, with `{image}` once; of a published LLaVA also a question, as --prompt of the
    caption job. By default that of --model, or the language model's start token and `{image}`."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the tower and the language model; the projector's weights are always float32.
    `auto`: bfloat16 on a GPU, float32 on a CPU."""

    device: str = "auto"
    """`auto`: the worker's GPU, or the CPU when it has none; or `cpu`."""

    def __post_init__(self) -> None:
        check(self.device in ("auto", "cpu"), "--device", self.device, "auto or cpu")
        is_pair = (self.clip is None) == (self.llama is None) or (self.model is not None and self.llama is None)
        check(is_pair, "--clip without --llama, or the reverse,", "given", "both")
        check(self.model is None or self.llama is None, "--model", self.model, "either a model, or --clip and --llama")
        has_own = self.initial_projector != "model" or self.llama is None
        check(has_own, "--initial-projector", "model", "random with --clip and --llama, which have no projector")


@dataclass(frozen=True, kw_only=True)
class FitResourceConfig:
    """How many workers, CPUs and GPUs the fit uses."""

    workers: str = "auto"
    """Training workers, as `8`, or as `1:8` (elastic: as many as the cluster has room for).
    `auto`: one for each GPU; 1 without a GPU."""

    gpus_per_worker: float | None = None
    """GPUs of each worker. By default 1 when the cluster has GPUs, else 0."""

    cpu_workers: str = "auto"
    """Workers that fetch and decode images before the fit, as `8` or `1:8`. `auto`: as many as the CPUs allow."""

    max_failures: int = 3
    """Lost workers, preempted ones not counted, that the fit survives; it continues from its checkpoint."""

    def __post_init__(self) -> None:
        check(self.max_failures >= 0, "--max-failures", self.max_failures, "0 or more")
        self.for_features()

    def for_features(self) -> ResourceConfig:
        """Return the resources of the job that computes image features. Raises ConfigError for a bad value."""
        return ResourceConfig(workers=self.workers, gpus_per_worker=self.gpus_per_worker, cpu_workers=self.cpu_workers)


@dataclass(frozen=True, kw_only=True)
class FitTargetConfig:
    """Where the bundle is saved, and what beside it."""

    output: Annotated[Positional[str], arg(metavar="OUTPUT_BUNDLE")] = ""
    """Folder of the bundle, on any fsspec store. The same command again continues the fit.
    By default `demo-refit` when LABELS is `demo`."""

    output_storage_options: dict[str, object] | None = None
    """fsspec options of its store, as JSON.
    By default those of LABELS, when both are on the same server (kind of store and host) or LABELS is local."""

    features: str | None = None
    """Folder of the image features, which several fits may share. By default inside OUTPUT_BUNDLE."""

    carry_models: bool = False
    """Copy CLIP and LLaMA into the bundle, so that it can move."""

    save_as: Literal["llava"] | None = None
    """Write OUTPUT_BUNDLE/llava as well: the same model as transformers' LlavaForConditionalGeneration loads it. Of
    --image-features patches with --projector mlp and all patches. Takes the memory of all three models once."""

    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl; only into a local folder."""

    def __post_init__(self) -> None:
        is_local = not self.tensorboard or "://" not in self.output
        check(is_local, "--tensorboard", f"given with {self.output}", "an OUTPUT_BUNDLE of this machine")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Fit the projector between a CLIP and a LLaMA on labelled images, and save a bundle to caption with."""

    labels: LabelsConfig = field(default_factory=LabelsConfig)

    target: FitTargetConfig = field(default_factory=FitTargetConfig)
    model: FitModelConfig = field(default_factory=FitModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    resources: FitResourceConfig = field(default_factory=FitResourceConfig)

    recipe: RecipeName | None = None
    """Take the settings behind a published figure, which the plan prints with its source; any flag given wins, and any
    setting of a --config file. In Python, `config.recipes.RECIPES` has them."""

    dry_run: bool = False
    """Print the plan - images, models, steps left, the price by rung - and stop."""

    recipes: ClassVar[Mapping[str, Recipe]] = RECIPES

    def __post_init__(self) -> None:
        is_demo = self.labels.labels_path == "demo"
        if not self.target.output:
            check(is_demo, "OUTPUT_BUNDLE", "missing", f"a folder for the bundle fitted to {self.labels.labels_path}")
            object.__setattr__(self, "target", replace(self.target, output="demo-refit"))
        has_model = is_demo or self.model.model or self.model.clip
        check(bool(has_model), "--model", "missing", "a bundle, or --clip and --llama")
