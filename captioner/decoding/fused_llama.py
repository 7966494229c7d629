"""LLaMA's layers with few kernels: q, k and v in one product, gate and up in one, and one kernel between products.

The weights stay those of an unmodified `LlamaForCausalLM`, which goes on working: they are laid side by side, and its
parameters become views. RoPE with its scalings, the activation and the norms' settings are read from it. Letters as in
`captioner.decoding.operations`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import LlamaForCausalLM

from captioner.decoding.attention import SlotView, TransformersLayers, attend_prompts, head_dim
from captioner.decoding.operations import Operations, operations_for
from captioner.decoding.step import Layers

__all__ = ["FusedLlama", "layers_of"]


@dataclass(frozen=True, slots=True)
class _Product:
    """Linear maps of the same input as one."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, linears: Sequence[nn.Linear]) -> "_Product":
        weight = _side_by_side([one.weight for one in linears])
        biases = [one.bias for one in linears if one.bias is not None]
        return cls(weight, _side_by_side(biases) if biases else None)

    def __call__(self, rows: Tensor) -> Tensor:
        return linear(rows, self.weight, self.bias)


class FusedLlama:
    """The layers of a LLaMA from embeddings to what its head reads."""

    def __init__(self, llama: LlamaForCausalLM, operations: Operations) -> None:
        self._llama = llama.model
        self._operations = operations
        self._head_dim = head_dim(llama.config)
        self._is_silu = llama.config.hidden_act in ("silu", "swish")
        self._layers = [(layer, *_products(layer)) for layer in self._llama.layers]
        if llama.device.type == "cuda":
            torch.cuda.empty_cache()  # where the parts lay before

    def __call__(self, embeds: Tensor, positions: Tensor, view: SlotView) -> Tensor:
        """Return the last hidden state of the decode rows, float[R, D], and fill the slots of all rows.

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
        num_rows = len(view.columns)
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

    def _attend(self, attention: Any, qkv: Tensor, cos: Tensor, sin: Tensor, view: SlotView) -> Tensor:
        """float[T, H + 2K, d] -> float[T, H, d]."""
        keys, values = view.kv[attention.layer_idx]
        num_rows, num_kv = len(view.columns), keys.shape[1]
        self._operations.rotate_into_slots(qkv, cos, sin, keys, values, view.columns)
        query, key, value = torch.split(qkv, [qkv.shape[1] - 2 * num_kv, num_kv, num_kv], 1)
        if view.prompts is None:
            return self._operations.attend(query, keys, values, view, attention.scaling)
        q, k, v = (rows[num_rows:].transpose(0, 1) for rows in (query, key, value))
        of_prompts = attend_prompts(q, k, v, keys, values, view.prompts, attention.scaling)
        of_slots = self._operations.attend(query[:num_rows], keys, values, view, attention.scaling)
        return torch.cat([of_slots, of_prompts])


def layers_of(llama: LlamaForCausalLM) -> Layers:
    """Return what runs the layers of a LLaMA: few kernels on a CUDA device, transformers itself elsewhere."""
    if llama.device.type == "cuda":
        return FusedLlama(llama, operations_for(llama.device))
    return TransformersLayers(llama)


def _products(layer: Any) -> tuple[_Product, _Product]:
    """Return the product of q, k and v, and that of gate and up."""
    attention, mlp = layer.self_attn, layer.mlp
    return _Product.of([attention.q_proj, attention.k_proj, attention.v_proj]), _Product.of(
        [mlp.gate_proj, mlp.up_proj]
    )


def _side_by_side(parameters: Sequence[Tensor]) -> Tensor:
    """Return the parameters as one tensor of which each is a view from now on; as they lie, if they lie so already."""
    if (found := _neighbours(parameters)) is not None:
        return found
    # A fit's gradients pass through weights that were made outside inference mode; those made inside stay so.
    with torch.inference_mode(parameters[0].is_inference()), torch.no_grad():
        joined = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, torch.split(joined, [len(one) for one in parameters]), strict=True):
            parameter.data = part
    return joined


def _neighbours(parameters: Sequence[Tensor]) -> Tensor | None:
    first = parameters[0].detach()
    if any(one.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for one in parameters):
        return None
    ends = accumulate((one.numel() for one in parameters), initial=first.storage_offset())
    if any(one.storage_offset() != end for one, end in zip(parameters, ends, strict=False)):
        return None
    return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())
