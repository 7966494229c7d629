"""Build a transformers module from a config, without initialising weights that are loaded next.

Knows transformers' config and module classes in general; nothing of CLIP or LLaMA in particular.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights

from captioner.errors import BundleError
from captioner.model.configs import check_not_quantized
from captioner.model.shapes import Shapes

__all__ = ["allocate", "freeze", "parse_config", "shapes_of"]

_Config = TypeVar("_Config")
_PretrainedConfig = TypeVar("_PretrainedConfig", bound=PretrainedConfig)
_Module = TypeVar("_Module", bound=nn.Module)

_ALLOCATING = threading.Lock()


def parse_config(config_class: type[_PretrainedConfig], raw: dict[str, Any], *, where: str) -> _PretrainedConfig:
    """Return the config that a config.json describes. Raises BundleError if transformers refuses its values."""
    check_not_quantized(raw, where=where)
    try:
        config: _PretrainedConfig = config_class.from_dict(raw)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{where}/config.json is not a valid {config_class.__name__}: {error}") from error
    return config


def allocate(
    build: Callable[[_Config], _Module], config: _Config, *, dtype: torch.dtype, device: torch.device
) -> _Module:
    """Return `build(config)` on the device in this dtype: weights allocated but not set, buffers right.

    One thread at a time: torch's initialisers and default dtype are replaced for the whole process meanwhile, and two
    overlapping calls would restore each other's replacements, so that no module would ever be initialised again.
    """
    with _ALLOCATING, no_init_weights(), torch.device(device), _default_dtype(dtype):
        return build(config)


def freeze(module: _Module) -> _Module:
    """Return the module in evaluation mode with no gradients for any parameter."""
    return module.requires_grad_(False).eval()


def shapes_of(module: nn.Module) -> Shapes:
    """Return the tensors of a module, on any device, meta as well."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
