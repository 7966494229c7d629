"""What stands between the products of a LLaMA layer, written plainly: what the kernels of a card are held to.

Rounded where transformers rounds, so that both write the same numbers. T token rows, of which the first R are decode
rows, D model width, H query heads, K kv heads, d head width, I width of the MLP.
"""

import importlib.util
import os
import shutil
import warnings
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import silu

from captioner.decoding.attention import SlotView, attend_decode

__all__ = ["Operations", "PlainOperations", "operations_for"]


class Operations(Protocol):
    """The four steps between products."""

    def add_norm(self, hidden: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add `hidden` to the residual, in place, and return the RMS norm of the sum; all float[T, D]."""

    def rotate_into_slots(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, columns: Tensor
    ) -> None:
        """Rotate queries and keys, in place, and write the decode rows' keys and values into their slots.

        qkv: float[T, H + 2K, d]. cos, sin: float[T, d]. keys, values: float[slots, K, columns, d]. columns: int64[R]:
        where row r of the first R writes into slot r."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, view: SlotView, scaling: float) -> Tensor:
        """Return what each decode row reads from its own slot, float[R, H, d] of float[R, H, d]."""

    def silu_mul(self, gate_and_up: Tensor) -> Tensor:
        """Return silu(gate) x up, float[T, I], from the two side by side, float[T, 2 I]."""


class PlainOperations:
    """The operations in torch: on any device."""

    def add_norm(self, hidden: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Operations."""
        if hidden is not None:
            residual.add_(hidden)
        exact = residual.float()
        return weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)).to(residual.dtype)

    def rotate_into_slots(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, columns: Tensor
    ) -> None:
        """See Operations."""
        num_rows, num_kv = len(columns), keys.shape[1]
        turned = qkv[:, :-num_kv]
        first, second = turned.chunk(2, -1)
        turned.copy_(turned * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None])
        rows = torch.arange(num_rows, device=qkv.device)
        keys[rows, :, columns] = qkv[:num_rows, -2 * num_kv : -num_kv]
        values[rows, :, columns] = qkv[:num_rows, -num_kv:]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, view: SlotView, scaling: float) -> Tensor:
        """See Operations."""
        return attend_decode(queries.transpose(0, 1), keys, values, view.mask, scaling)

    def silu_mul(self, gate_and_up: Tensor) -> Tensor:
        """See Operations."""
        gate, up = gate_and_up.chunk(2, -1)
        return silu(gate) * up


def operations_for(device: torch.device) -> Operations:
    """Return the operations of a device: compiled for a CUDA one, if this machine can compile, else the plain ones."""
    if device.type != "cuda":
        return PlainOperations()
    if importlib.util.find_spec("triton") is None or not (
        os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    ):
        warnings.warn(
            "captions will be written slower than this card can: its kernels need triton, which comes with torch for "
            "CUDA, and a C compiler; install gcc",
            stacklevel=2,
        )
        return PlainOperations()
    from captioner.decoding.kernels import TritonOperations

    return TritonOperations()
