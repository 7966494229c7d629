"""A projector's module from its config. The classes are in `projectors`, one file each."""

from importlib import import_module

from torch import nn

from captioner.model.projector_config import KINDS, ProjectorConfig

__all__ = ["ProjectorConfig", "build_projector"]


def build_projector(config: ProjectorConfig) -> nn.Module:
    """Return a new projector with random weights, on torch's default device."""
    kind = KINDS[config.kind]
    built: nn.Module = getattr(import_module(f"captioner.model.projectors.{kind.file}"), kind.module)(config)
    return built
