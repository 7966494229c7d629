"""What a user may set: frozen dataclasses, checked once when they are made. One file a job or a group of flags.

Flags, `--config` files, help texts and `_run/` are all made from these, so that they never drift. Knows no torch and
no Ray; a bad value raises `ConfigError`. A second line of a field's docstring begins a sentence: the help page breaks
its lines there.

A name is imported when it is asked for: a process that decodes images starts in 0.20 s of a core, and in 0.28 s with
all files of this room and tyro, which they bring.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captioner.config.caption_job import CaptionJobConfig
    from captioner.config.checks import worker_range
    from captioner.config.decoding import DecodingConfig
    from captioner.config.doctor import DoctorConfig
    from captioner.config.evaluate import EvaluateConfig
    from captioner.config.export import ExportConfig
    from captioner.config.fit import FitConfig, FitModelConfig, FitResourceConfig, FitTargetConfig
    from captioner.config.gallery import MAX_CARDS, GalleryConfig
    from captioner.config.image import ImageConfig
    from captioner.config.image_access import ImageAccessConfig
    from captioner.config.input import InputConfig
    from captioner.config.labels import LabelsConfig
    from captioner.config.model import Dtype, ModelConfig
    from captioner.config.options import with_options
    from captioner.config.plan import PlanConfig
    from captioner.config.query import QueryConfig
    from captioner.config.resources import ResourceConfig
    from captioner.config.scoring import ScoringConfig
    from captioner.config.training import TrainingConfig
    from captioner.config.verify import VerifyConfig

__all__ = [
    "MAX_CARDS",
    "CaptionJobConfig",
    "DecodingConfig",
    "DoctorConfig",
    "Dtype",
    "EvaluateConfig",
    "ExportConfig",
    "FitConfig",
    "FitModelConfig",
    "FitResourceConfig",
    "FitTargetConfig",
    "GalleryConfig",
    "ImageAccessConfig",
    "ImageConfig",
    "InputConfig",
    "LabelsConfig",
    "ModelConfig",
    "PlanConfig",
    "QueryConfig",
    "ResourceConfig",
    "ScoringConfig",
    "TrainingConfig",
    "VerifyConfig",
    "with_options",
    "worker_range",
]

_HOMES = {
    "caption_job": ["CaptionJobConfig"],
    "checks": ["worker_range"],
    "decoding": ["DecodingConfig"],
    "doctor": ["DoctorConfig"],
    "evaluate": ["EvaluateConfig"],
    "export": ["ExportConfig"],
    "fit": ["FitConfig", "FitModelConfig", "FitResourceConfig", "FitTargetConfig"],
    "gallery": ["MAX_CARDS", "GalleryConfig"],
    "image": ["ImageConfig"],
    "image_access": ["ImageAccessConfig"],
    "input": ["InputConfig"],
    "labels": ["LabelsConfig"],
    "model": ["Dtype", "ModelConfig"],
    "options": ["with_options"],
    "plan": ["PlanConfig"],
    "query": ["QueryConfig"],
    "resources": ["ResourceConfig"],
    "scoring": ["ScoringConfig"],
    "training": ["TrainingConfig"],
    "verify": ["VerifyConfig"],
}


def __getattr__(name: str) -> Any:
    """Return what `__all__` names, from the file that it is in."""
    for home, names in _HOMES.items():
        if name in names:
            found = globals()[name] = getattr(importlib.import_module(f"captioner.config.{home}"), name)
            return found
    raise AttributeError(f"module {__name__} has no attribute {name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
