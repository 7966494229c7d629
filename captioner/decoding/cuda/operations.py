"""The operations between the matrix products of a LLaMA layer, in plain torch: the reference for the kernels.

They round where transformers rounds, so that the results are the same. All that a row reads or writes is found on the
device, so that a step can be recorded. T token rows, of which the first R are decode rows and the others prompt rows in
`PROMPT_TILES`: all rows of a tile read one slot. D model width, H query heads, K kv heads, d head width, I width
of the MLP.
"""

import importlib.util
import os
import shutil
import warnings
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from captioner.decoding.layout import PROMPT_TILES
from captioner.decoding.view import StepView

__all__ = ["Operations", "PlainOperations", "operations_for", "write_rows"]


class Operations(Protocol):
    """The four steps between products."""

    def add_norm(self, hidden: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add `hidden` to the residual, in place, and return the RMS norm of the sum; all float[T, D]."""

    def rotate_into_stores(self, qkv: Tensor, cos: Tensor, sin: Tensor, view: StepView, layer: int) -> None:
        """Rotate queries and keys, in place, and write the keys and values of all rows where the view says.

        qkv: float[T, H + 2K, d]. cos, sin: float[T, d]."""

    def attend(self, queries: Tensor, view: StepView, layer: int, scaling: float) -> Tensor:
        """Return the attention output of all rows, float[T, H, d]. queries: float[T, H, d]."""

    def silu_mul(self, gate_and_up: Tensor) -> Tensor:
        """Return silu(gate) * up, float[T, I], from float[T, 2 I] with gate before up."""


class PlainOperations:
    """The operations in torch, for any device."""

    def add_norm(self, hidden: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Operations."""
        if hidden is not None:
            residual.add_(hidden)
        exact = residual.float()
        return weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)).to(residual.dtype)

    def rotate_into_stores(self, qkv: Tensor, cos: Tensor, sin: Tensor, view: StepView, layer: int) -> None:
        """See Operations."""
        num_kv = view.stores.own.shape[3]
        turned = qkv[:, :-num_kv]
        first, second = turned.chunk(2, -1)
        turned.copy_(turned * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None])
        write_rows(qkv[:, -2 * num_kv : -num_kv], qkv[:, -num_kv:], view, layer)

    def attend(self, queries: Tensor, view: StepView, layer: int, scaling: float) -> Tensor:
        """See Operations. Reads all columns of a slot, and masks those that a row may not see."""
        num_rows, tile = view.num_rows, PROMPT_TILES.num_rows
        slots = torch.arange(num_rows, device=queries.device)
        of_slots = _attend(queries[:num_rows, None], view.columns[:num_rows, None], view, slots, layer, scaling)
        if len(queries) == num_rows:
            return of_slots.flatten(0, 1)
        tiles, columns = (rows[num_rows:].view(-1, tile, *rows.shape[1:]) for rows in (queries, view.columns))
        of_prompts = _attend(tiles, columns, view, view.targets[::tile, 0], layer, scaling)
        return torch.cat([of_slots.flatten(0, 1), of_prompts.flatten(0, 1)])

    def silu_mul(self, gate_and_up: Tensor) -> Tensor:
        """See Operations."""
        gate, up = gate_and_up.chunk(2, -1)
        return silu(gate) * up


def write_rows(keys: Tensor, values: Tensor, view: StepView, layer: int) -> None:
    """Write the keys and values of all rows, float[T, K, d], where the view says."""
    slots = torch.arange(view.num_rows, device=keys.device)
    for part, rows in enumerate((keys, values)):
        view.stores.own[layer, part][slots, :, view.own_columns] = rows[: view.num_rows]
        if len(rows) > view.num_rows:
            _write_prompts(rows[view.num_rows :], view, layer, part)


def _write_prompts(rows: Tensor, view: StepView, layer: int, part: int) -> None:
    """Write float[T - R, K, d]: rows of an image to the prefix store, others to their slots.

    A row that does not belong into a store is written where nothing is read: the spare slot, an image's last column."""
    stores, columns, readers = view.stores, view.columns[view.num_rows :], view.targets[:, 0]
    in_own = columns - stores.prefix_len[readers]
    spare = stores.own.shape[2] - 1
    targets = torch.where(in_own[:, None] < 0, spare, view.targets)
    stores.own[layer, part][targets, :, in_own.clamp(min=0)[:, None]] = rows[:, None]
    if stores.has_prefixes:
        prefixes = stores.prefixes[layer, part]
        at = torch.where(in_own < 0, columns, prefixes.shape[2] - 1)
        prefixes[stores.prefix_of[readers], :, at] = rows


def _attend(queries: Tensor, columns: Tensor, view: StepView, slots: Tensor, layer: int, scaling: float) -> Tensor:
    """float[N, rows, H, d], N slots of as many rows, at columns int64[N, rows] -> float[N, rows, H, d]."""
    keys, values = (_columns_of(slots, view, layer, part) for part in (0, 1))
    is_seen = torch.arange(keys.shape[2], device=queries.device) <= columns[:, None, :, None]
    attended = scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys,
        values,
        attn_mask=torch.where(is_seen, 0.0, -torch.inf).to(queries.dtype),
        scale=scaling,
        enable_gqa=queries.shape[2] != keys.shape[1],
    )
    return attended.transpose(1, 2)


def _columns_of(slots: Tensor, view: StepView, layer: int, part: int) -> Tensor:
    """Return all columns of some slots in their order, float[N, K, columns, d], from both stores."""
    stores = view.stores
    own = stores.own[layer, part][slots]
    if not stores.has_prefixes:
        return own
    prefixes = stores.prefixes[layer, part][stores.prefix_of[slots]]
    columns = torch.arange(prefixes.shape[2] + own.shape[2], device=slots.device)
    in_own = columns - stores.prefix_len[slots][:, None]
    at = torch.where(in_own < 0, columns, prefixes.shape[2] + in_own).clamp(max=len(columns) - 1)
    both = torch.cat([prefixes, own], 2)
    return both.gather(2, at[:, None, :, None].expand_as(both))


def operations_for(device: torch.device) -> Operations:
    """Return Triton kernels for a CUDA device where they can be compiled, else the plain operations."""
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
    from captioner.decoding.cuda.kernels import TritonOperations

    return TritonOperations()
