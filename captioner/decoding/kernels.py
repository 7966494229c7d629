"""The operations between LLaMA's products as one Triton kernel each. Imported where there is a CUDA device only.

A step of 8B parameters takes some 1,400 kernels in transformers' layers, most of them smaller than the time it takes to
begin one. Letters as in `captioner.decoding.operations`; every kernel rounds where the plain operation rounds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from captioner.decoding.attention import SlotView

__all__ = ["TritonOperations"]

_SILU_BLOCK = 1024
_COLUMNS_AT_ONCE = 32
_SMALLEST_DOT = 16
"""Rows and columns that a tensor core multiplies at least."""


class TritonOperations:
    """The operations on a CUDA device."""

    def add_norm(self, hidden: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Operations."""
        normed = torch.empty_like(residual)
        num_rows, width = residual.shape
        added = residual if hidden is None else hidden
        block = triton.next_power_of_2(width)
        _add_norm[(num_rows,)](
            added, residual, weight, normed, width, eps, ADDS=hidden is not None, BLOCK=block, num_warps=8
        )
        return normed

    def rotate_into_slots(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, columns: Tensor
    ) -> None:
        """See Operations."""
        num_rows, num_heads, width = qkv.shape
        _rotate_into_slots[(num_rows, num_heads)](
            *(qkv, cos, sin, keys, values, columns, len(columns), num_heads, keys.shape[1]),
            *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
            HALF=width // 2,
            BLOCK=triton.next_power_of_2(width // 2),
            num_warps=1,
        )

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, view: SlotView, scaling: float) -> Tensor:
        """See Operations; reads each slot up to its own column, not to that of the longest caption."""
        num_rows, num_heads, width = queries.shape
        num_kv = keys.shape[1]
        attended = torch.empty((num_rows, num_heads, width), dtype=queries.dtype, device=queries.device)
        _attend[(num_rows, num_kv)](
            *(queries, keys, values, view.columns, attended, scaling, queries.stride(0)),
            *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
            GROUP=num_heads // num_kv,
            WIDTH=width,
            BLOCK_GROUP=max(triton.next_power_of_2(num_heads // num_kv), _SMALLEST_DOT),
            BLOCK_WIDTH=max(triton.next_power_of_2(width), _SMALLEST_DOT),
            BLOCK_COLUMNS=_COLUMNS_AT_ONCE,
            PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
            num_warps=2,
        )
        return attended

    def silu_mul(self, gate_and_up: Tensor) -> Tensor:
        """See Operations."""
        num_rows, width = len(gate_and_up), gate_and_up.shape[1] // 2
        product = gate_and_up.new_empty(num_rows, width)
        _silu_mul[(num_rows, triton.cdiv(width, _SILU_BLOCK))](gate_and_up, product, width, BLOCK=_SILU_BLOCK)
        return product


@triton.jit
def _add_norm(hidden, residual, weight, normed, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    is_inside = at < width
    place = tl.program_id(0) * width + at
    total = tl.load(residual + place, mask=is_inside, other=0.0)
    if ADDS:
        total = (total.to(tl.float32) + tl.load(hidden + place, mask=is_inside, other=0.0).to(tl.float32)).to(
            total.dtype
        )
        tl.store(residual + place, total, mask=is_inside)
    exact = total.to(tl.float32)
    scaled = (exact * tl.rsqrt(tl.sum(exact * exact, 0) / width + eps)).to(total.dtype)
    scales = tl.load(weight + at, mask=is_inside, other=0.0)
    tl.store(normed + place, (scales.to(tl.float32) * scaled.to(tl.float32)).to(total.dtype), mask=is_inside)


@triton.jit
def _rotate_into_slots(
    qkv, cos, sin, keys, values, columns, num_decode, num_heads, num_kv,
    key_slot, key_head, value_slot, value_head, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    first = tl.arange(0, BLOCK)
    is_inside = first < HALF
    second = first + HALF
    source = qkv + (row * num_heads + head) * 2 * HALF
    one = tl.load(source + first, mask=is_inside, other=0.0)
    two = tl.load(source + second, mask=is_inside, other=0.0)
    kind = one.dtype
    if head < num_heads - num_kv:
        turn = row * 2 * HALF
        cos_one = tl.load(cos + turn + first, mask=is_inside, other=0.0).to(tl.float32)
        cos_two = tl.load(cos + turn + second, mask=is_inside, other=0.0).to(tl.float32)
        sin_one = tl.load(sin + turn + first, mask=is_inside, other=0.0).to(tl.float32)
        sin_two = tl.load(sin + turn + second, mask=is_inside, other=0.0).to(tl.float32)
        x, y = one.to(tl.float32), two.to(tl.float32)
        one = ((x * cos_one).to(kind).to(tl.float32) - (y * sin_one).to(kind).to(tl.float32)).to(kind)
        two = ((y * cos_two).to(kind).to(tl.float32) + (x * sin_two).to(kind).to(tl.float32)).to(kind)
        tl.store(source + first, one, mask=is_inside)
        tl.store(source + second, two, mask=is_inside)
    if row < num_decode:
        column = tl.load(columns + row)
        slot = row.to(tl.int64)
        if head >= num_heads - num_kv:
            target = values + slot * value_slot + (head - num_heads + num_kv) * value_head + column * 2 * HALF
            tl.store(target + first, one, mask=is_inside)
            tl.store(target + second, two, mask=is_inside)
        elif head >= num_heads - 2 * num_kv:
            target = keys + slot * key_slot + (head - num_heads + 2 * num_kv) * key_head + column * 2 * HALF
            tl.store(target + first, one, mask=is_inside)
            tl.store(target + second, two, mask=is_inside)


@triton.jit
def _attend(
    queries, keys, values, columns, attended, scaling, query_row, key_slot, key_head, value_slot, value_head,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, kv_head = tl.program_id(0), tl.program_id(1)
    member, channel = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_WIDTH)
    of_group = (kv_head * GROUP + member[:, None]) * WIDTH + channel[None, :]
    is_inside = (member[:, None] < GROUP) & (channel[None, :] < WIDTH)
    query = tl.load(queries + row * query_row + of_group, mask=is_inside, other=0.0)
    last = tl.load(columns + row)
    slot = row.to(tl.int64)
    key_of_slot = keys + slot * key_slot + kv_head * key_head
    value_of_slot = values + slot * value_slot + kv_head * value_head
    greatest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_GROUP], tl.float32)
    total = tl.zeros([BLOCK_GROUP, BLOCK_WIDTH], tl.float32)
    for start in range(0, last + 1, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        is_seen = column <= last
        key = tl.load(
            key_of_slot + column[None, :] * WIDTH + channel[:, None],
            mask=is_seen[None, :] & (channel[:, None] < WIDTH),
            other=0.0,
        )
        scores = tl.dot(query, key, input_precision=PRECISION) * scaling
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        now = tl.maximum(greatest, tl.max(scores, 1))
        weights = tl.exp(scores - now[:, None])
        faded = tl.exp(greatest - now)
        value = tl.load(
            value_of_slot + column[:, None] * WIDTH + channel[None, :],
            mask=is_seen[:, None] & (channel[None, :] < WIDTH),
            other=0.0,
        )
        mass = mass * faded + tl.sum(weights, 1)
        total = total * faded[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        greatest = now
    num_heads = tl.num_programs(1) * GROUP
    target = attended + row * num_heads * WIDTH + of_group
    tl.store(target, (total / mass[:, None]).to(query.dtype), mask=is_inside)


@triton.jit
def _silu_mul(gate_and_up, product, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = at < width
    source = gate_and_up + row * 2 * width + at
    gate = tl.load(source, mask=is_inside, other=0.0)
    up = tl.load(source + width, mask=is_inside, other=0.0)
    exact = gate.to(tl.float32)
    bent = (exact * tl.sigmoid(exact)).to(gate.dtype)
    tl.store(product + row * width + at, (bent.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=is_inside)
