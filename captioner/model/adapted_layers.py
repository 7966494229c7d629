"""A language model whose linear maps learn by LoRA, as peft's layers: what a fit trains.

Captioning merges an adapter instead (`adapter.Adapter.merge_into`).
"""

from typing import Any

import torch
from torch import nn

from captioner.model.adapter import Adapter

__all__ = ["adapt", "adapter_weights", "has_adapter"]

_NAME = "default"


def adapt(llama: nn.Module, adapter: Adapter) -> None:
    """Put peft's layers around the linear maps of a model, with the adapter's weights in float32, frozen."""
    from peft import LoraConfig, inject_adapter_in_model  # here, not above: a fit without an adapter needs none

    config = adapter.config
    alpha: Any = config.alpha  # peft says int, and divides it by the rank
    settings = LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=list(config.modules), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(settings, llama, adapter_name=_NAME)
    weights = adapter_weights(llama)
    for name, tensor in adapter.tensors().items():
        weight = weights[name]
        weight.data = tensor.to(weight.device, torch.float32)
    llama.requires_grad_(False)


def adapter_weights(llama: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of the adapter of a model, none of one without, by the names that an adapter's folder has."""
    inside = (pair for pair in llama.named_parameters() if ".lora_" in pair[0])
    return {name.replace(f".{_NAME}.", "."): weight for name, weight in inside}


def has_adapter(llama: nn.Module) -> bool:
    """Whether a model has an adapter that is not merged: then what its linear maps do is not their weights alone."""
    return bool(adapter_weights(llama))
