"""What a user may set for jobs/caption.py."""

from dataclasses import dataclass, field, replace
from typing import Annotated

from tyro.conf import Positional, arg

from captioner.config.checks import check
from captioner.config.decoding import DecodingConfig
from captioner.config.image import ImageConfig
from captioner.config.input import InputConfig
from captioner.config.model import ModelConfig
from captioner.config.resources import ResourceConfig
from captioner.config.scoring import ScoringConfig

__all__ = ["CaptionJobConfig", "CaptioningConfig"]


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    """Which images are captioned, by which model, and how: the flags that a job and its plan share."""

    input_path: Annotated[Positional[str], arg(metavar="INPUT")] = "demo"
    """Folder, prefix, glob, file, list of URIs, Parquet or tars (shard-{0000..0099}.tar), on any fsspec store.
    `demo` is the embedded images."""

    output: Annotated[Positional[str], arg(metavar="OUTPUT")] = ""
    """Folder of the caption table, on any fsspec store. The same command again continues it.
    By default `captions-demo` when the input is `demo`."""

    prompts: str | None = None
    """YAML file on this machine with several prompts by name: each answer is a column of the table. Without `caption`
    among them, captions answer --prompt as ever. The guide's page on prompts says what the file may say."""

    input: InputConfig = field(default_factory=InputConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)


@dataclass(frozen=True, kw_only=True)
class CaptionJobConfig(CaptioningConfig):
    """One caption job: images in, a Parquet caption table out."""

    retry_failures: str = "transient"
    """Failures of earlier runs to try again: `transient`, `all`, `none`, or reasons as `corrupt,missing`."""

    max_failed_share: float = 1.0
    """End the job when more than this share of the images, 0 to 1, has failed; captions stay. 1: never."""

    refresh: bool = False
    """List the input again and caption new images too; earlier images keep their keys.
    Images that changed or vanished since are only counted."""

    dry_run: bool = False
    """Print the plan - images, units, model, images left - and stop."""

    def __post_init__(self) -> None:
        if not self.output:
            check(self.input_path == "demo", "OUTPUT", "missing", f"a folder for the captions of {self.input_path}")
            object.__setattr__(self, "output", "captions-demo")
        if self.input_path == "demo" and not self.model.model:
            object.__setattr__(self, "model", replace(self.model, model="demo"))
        check(0 <= self.max_failed_share <= 1, "--max-failed-share", self.max_failed_share, "0 to 1")
        is_choice = self.scoring.rerank == "logprob" or self.decoding.num_captions > 1
        check(is_choice, "--rerank", self.scoring.rerank, "--num-captions of 2 or more with it")
        self._check_slots()

    def _check_slots(self) -> None:
        beams = self.decoding.num_beams if self.decoding.num_beams > 1 else self.decoding.num_captions
        enough = self.resources.slots == "auto" or int(self.resources.slots) >= beams
        check(enough, "--slots", self.resources.slots, f"at least {beams}, the beams or captions of one image")
