"""CLIP's activation, x sigmoid(1.702 x), in one pass over a layer's widest states where transformers makes three.

It is silu(1.702 x) / 1.702, and torch has silu as one operation. Both factors are left to the products before and after
it, which apply them to their sums before these are rounded, so that no weight changes. Knows nothing of files.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

__all__ = ["fuse_quick_gelu"]

_SLOPE = 1.702


def fuse_quick_gelu(tower: CLIPVisionModel) -> CLIPVisionModel:
    """Return a frozen tower, its weights in place, with the quicker MLPs if this is its activation."""
    if tower.config.hidden_act == "quick_gelu":
        for layer in tower.modules():
            if isinstance(layer, CLIPEncoderLayer):
                layer.add_module("mlp", _QuickGeluMlp(layer.mlp))
    return tower


class _QuickGeluMlp(nn.Module):
    """The MLP of a CLIP layer, with its parameters under their names. D its width, I its inner one."""

    _bias: Tensor

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2
        self.register_buffer("_bias", self.fc1.bias.detach() * _SLOPE, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """float[..., D] -> float[..., D]"""
        rows = states.reshape(-1, states.shape[-1])
        inner = silu(torch.addmm(self._bias, rows, self.fc1.weight.t(), alpha=_SLOPE), inplace=True)  # float[rows, I]
        return torch.addmm(self.fc2.bias, inner, self.fc2.weight.t(), alpha=1 / _SLOPE).view(states.shape)
