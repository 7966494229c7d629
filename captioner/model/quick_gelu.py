"""CLIP's activation, x * sigmoid(1.702 x), for which transformers passes three times over the widest states of a layer.

On a CPU the three passes go over a few rows at a time, which stay in the cache: the same results (in float32 a few last
bits depend on the number of threads, as in transformers). On a CUDA device there is one pass: the activation is
silu(1.702 x) / 1.702, and torch has silu as one operation. The matrix products before and after it apply both factors
to their sums before these are rounded; of the weights only the first bias is scaled. `torch.compile` would fuse the
passes too, but needs a C++ compiler at run time, which a worker's image need not have.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

__all__ = ["fuse_quick_gelu"]

_SLOPE = 1.702
_CACHED_ROWS = 64  # for each thread: a megabyte of ViT-L/14's states in float32


def fuse_quick_gelu(tower: CLIPVisionModel) -> CLIPVisionModel:
    """Return the frozen tower, with faster MLPs in place of its own if this is its activation."""
    if tower.config.hidden_act == "quick_gelu":
        for layer in tower.modules():
            if isinstance(layer, CLIPEncoderLayer):
                layer.add_module("mlp", QuickGeluMlp(layer.mlp))
    return tower


class QuickGeluMlp(nn.Module):
    """The MLP of a CLIP layer, its parameters under the same names. D width, I inner width."""

    _bias: Tensor

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2
        self.register_buffer("_bias", self.fc1.bias.detach() * _SLOPE, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """float[..., D] -> float[..., D]"""
        return self.in_one_pass(states) if states.is_cuda else self.in_cache(states)

    def in_cache(self, states: Tensor) -> Tensor:
        """The results of transformers. On a CPU the sums of `in_one_pass` depend on the number of threads."""
        inner: Tensor = self.fc1(states)
        for rows in torch.split(inner.view(-1, inner.shape[-1]), _CACHED_ROWS * torch.get_num_threads()):
            rows.mul_((rows * _SLOPE).sigmoid_())
        outer: Tensor = self.fc2(inner)
        return outer

    def in_one_pass(self, states: Tensor) -> Tensor:
        """The same with one pass between the products, rounded less often."""
        rows = states.reshape(-1, states.shape[-1])
        inner = silu(torch.addmm(self._bias, rows, self.fc1.weight.t(), alpha=_SLOPE), inplace=True)  # float[rows, I]
        return torch.addmm(self.fc2.bias, inner, self.fc2.weight.t(), alpha=1 / _SLOPE).view(states.shape)
