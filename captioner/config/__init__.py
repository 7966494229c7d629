"""What a user may set: frozen dataclasses, checked once when they are made. One file a job or a group of flags.

Flags, `--config` files, help texts and `_run/` are all made from these, so that they never drift. Knows no torch and
no Ray; a bad value raises `ConfigError`. A second line of a field's docstring begins a sentence: the help page breaks
its lines there.
"""

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
