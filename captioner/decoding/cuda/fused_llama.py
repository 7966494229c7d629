"""LLaMA's layers with few kernels: q, k and v in one product, gate and up in one, one kernel between products.

The weights remain those of an unmodified `LlamaForCausalLM`, which still works: related weights are joined into one
tensor, and its parameters become views of it. RoPE with its scalings, the activation and the norms' settings are read
from the model. Letters as in `captioner.decoding.cuda.operations`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import LlamaForCausalLM

from captioner.decoding.cuda.operations import Operations
from captioner.decoding.layout import PROMPT_TILES
from captioner.decoding.stores import head_dim
from captioner.decoding.view import StepView

__all__ = ["FusedLlama"]


@dataclass(frozen=True, slots=True)
class _Product:
    """Linear maps of the same input as one."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, linears: Sequence[nn.Linear]) -> "_Product":
        weight = _joined([one.weight for one in linears])
        biases = [one.bias for one in linears if one.bias is not None]
        return cls(weight, _joined(biases) if biases else None)

    def __call__(self, rows: Tensor) -> Tensor:
        return linear(rows, self.weight, self.bias)


class FusedLlama:
    """The layers of a LLaMA, from embeddings to the hidden states that its head reads."""

    blocks = PROMPT_TILES

    def __init__(self, llama: LlamaForCausalLM, operations: Operations) -> None:
        self._llama = llama.model
        self._operations = operations
        self._head_dim = head_dim(llama.config)
        self._is_silu = llama.config.hidden_act in ("silu", "swish")
        self._layers = [(layer, *_products(layer)) for layer in self._llama.layers]
        if llama.device.type == "cuda":
            torch.cuda.empty_cache()  # the separate weights were there

    def __call__(self, embeds: Tensor, positions: Tensor, view: StepView, /) -> Tensor:
        """Return the last hidden state of the decode rows, float[R, D], and write all rows to the stores.

        embeds: float[T, D], which is overwritten. positions: int64[T]."""
        cos, sin = (t[0] for t in self._llama.rotary_emb(embeds, position_ids=positions[None]))
        residual, hidden = embeds, None
        for layer, qkv_product, gate_and_up in self._layers:
            normed = self._norm(hidden, residual, layer.input_layernorm)
            qkv = qkv_product(normed).view(len(embeds), -1, self._head_dim)
            attended = self._attend(layer.self_attn, qkv, cos, sin, view)
            hidden = layer.self_attn.o_proj(attended.flatten(1))
            normed = self._norm(hidden, residual, layer.post_attention_layernorm)
            hidden = layer.mlp.down_proj(self._activate(layer.mlp, gate_and_up(normed)))
        num_rows = view.num_rows
        last = None if hidden is None else hidden[:num_rows]
        return self._norm(last, residual[:num_rows], self._llama.norm)

    def _norm(self, hidden: Tensor | None, residual: Tensor, norm: Any) -> Tensor:
        return self._operations.add_norm(hidden, residual, norm.weight, norm.variance_epsilon)

    def _activate(self, mlp: Any, gate_and_up: Tensor) -> Tensor:
        if self._is_silu:
            return self._operations.silu_mul(gate_and_up)
        gate, up = gate_and_up.chunk(2, -1)
        activated: Tensor = mlp.act_fn(gate) * up
        return activated

    def _attend(self, attention: Any, qkv: Tensor, cos: Tensor, sin: Tensor, view: StepView) -> Tensor:
        """float[T, H + 2K, d] -> float[T, H, d]."""
        layer, num_kv = attention.layer_idx, view.stores.own.shape[3]
        self._operations.rotate_into_stores(qkv, cos, sin, view, layer)
        return self._operations.attend(qkv[:, : -2 * num_kv], view, layer, attention.scaling)


def _products(layer: Any) -> tuple[_Product, _Product]:
    """Return the product of q, k and v, and that of gate and up."""
    attention, mlp = layer.self_attn, layer.mlp
    return _Product.of([attention.q_proj, attention.k_proj, attention.v_proj]), _Product.of(
        [mlp.gate_proj, mlp.up_proj]
    )


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """Make each parameter a view of one tensor and return it; without a copy if an earlier engine has joined them."""
    if (found := _as_one(parameters)) is not None:
        return found
    # Weights created outside inference mode must stay outside: a fit's gradients pass through them.
    with torch.inference_mode(parameters[0].is_inference()), torch.no_grad():
        joined = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, torch.split(joined, [len(one) for one in parameters]), strict=True):
            parameter.data = part
    return joined


def _as_one(parameters: Sequence[Tensor]) -> Tensor | None:
    """Return the tensor of which the parameters are already neighbouring views, or None."""
    first = parameters[0].detach()
    if any(one.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for one in parameters):
        return None
    ends = accumulate((one.numel() for one in parameters), initial=first.storage_offset())
    if any(one.storage_offset() != end for one, end in zip(parameters, ends, strict=False)):
        return None
    return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())
