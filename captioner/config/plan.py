"""What a user may set for jobs/plan.py."""

from dataclasses import dataclass, fields
from typing import Annotated

from tyro.conf import Positional, arg

from captioner.config.caption_job import CaptioningConfig, CaptionJobConfig
from captioner.config.checks import check, flag_name

__all__ = ["PlanConfig"]


@dataclass(frozen=True, kw_only=True)
class PlanConfig(CaptioningConfig):
    """Estimate a caption job: caption a small sample here, then print time, workers and price of the whole input.

    Without INPUT: what --model takes of a GPU's memory, and the rate and price of one card."""

    input_path: Annotated[Positional[str], arg(metavar="INPUT")] = ""
    """What a job would read. Without it, for a --model other than `demo`, the memory that the model takes is computed,
    which cards hold it with how many slots, and the rate of one; nothing is captioned. `demo`: the embedded images."""

    output: Annotated[Positional[str], arg(metavar="OUTPUT")] = ""
    """Folder that the job will write; its summary then shows this estimate beside what it took.
    By default nothing is written."""

    sample: int = 256
    """Images to caption."""

    gpu_hourly: float | None = None
    """Price of one GPU for an hour, in any currency."""

    cpu_hourly: float | None = None
    """Price of one CPU core for an hour."""

    def __post_init__(self) -> None:
        check(self.sample >= 1, "--sample", self.sample, "at least 1")
        for name in ("gpu_hourly", "cpu_hourly"):
            price = getattr(self, name)
            check(price is None or price >= 0, flag_name(name), price, "0 or more")
        check(not (self.is_of_model and self.prompts), "--prompts", self.prompts, "an INPUT with it")

    @property
    def is_of_model(self) -> bool:
        """Whether no job is estimated, but what its model takes."""
        return not self.input_path and self.model.model not in ("", "demo")

    @property
    def job(self) -> CaptionJobConfig:
        """The caption job that is estimated."""
        shared = {field.name: getattr(self, field.name) for field in fields(CaptioningConfig)}
        images = self.input_path or "demo"
        return CaptionJobConfig(**{**shared, "input_path": images, "output": self.output or "captions"})
