"""How a transformers module is made from a config: checked, without initialising weights that are loaded next.

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

__all__ = ["allocate", "freeze", "parse_config"]

_Config = TypeVar("_Config")
_PretrainedConfig = TypeVar("_PretrainedConfig", bound=PretrainedConfig)
_Module = TypeVar("_Module", bound=nn.Module)

_ALLOCATING = threading.Lock()


def parse_config(config_class: type[_PretrainedConfig], raw: dict[str, Any], *, where: str) -> _PretrainedConfig:
    """Return the config that a config.json describes. Raises BundleError if transformers refuses its values."""
    if "quantization_config" in raw:
        raise BundleError(
            f"{where} is a quantized checkpoint; expected the original weights in float32, float16 or bfloat16"
        )
    try:
        config: _PretrainedConfig = config_class.from_dict(raw)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{where}/config.json is not a valid {config_class.__name__}: {error}") from error
    return config


def allocate(
    build: Callable[[_Config], _Module], config: _Config, *, dtype: torch.dtype, device: torch.device
) -> _Module:
    """Return `build(config)` on the device in this dtype: weights allocated but not set, buffers right.

    One thread at a time: torch's initialisers and default dtype are swapped for the whole process meanwhile, and two
    swaps that overlap would restore each other's, so that no module of the process would be initialised again.
    """
    with _ALLOCATING, no_init_weights(), torch.device(device), _default_dtype(dtype):
        return build(config)


def freeze(module: _Module) -> _Module:
    """Return the module in evaluation mode with no gradients for any parameter."""
    return module.requires_grad_(False).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
