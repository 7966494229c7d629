"""What a user may set for jobs/doctor.py."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from captioner.config.model import ModelConfig

__all__ = ["DoctorConfig"]


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Look whether captions can be made here: packages, GPU, memory, disk, logins, and what a job would run with."""

    input_path: Annotated[Positional[str], arg(metavar="INPUT")] = ""
    """What a job is to read; its store is asked for it. By default none is asked."""

    output: Annotated[Positional[str], arg(metavar="OUTPUT")] = ""
    """Where a job is to write; its store is asked what is there. Nothing is written."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of these stores, as JSON. By default the usual environment variables."""

    model: ModelConfig = field(default_factory=ModelConfig)
