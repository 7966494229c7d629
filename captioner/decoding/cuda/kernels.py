"""The operations between LLaMA's products as one Triton kernel each. Imported only with a CUDA device.

In transformers' layers a step of 8B parameters takes some 1,400 kernels, most of them shorter than a kernel launch.
Letters as in `captioner.decoding.cuda.operations`; every kernel rounds where the plain operation rounds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from captioner.decoding.layout import PROMPT_TILES
from captioner.decoding.view import StepView

__all__ = ["TritonOperations"]

_SILU_BLOCK = 1024
_COLUMNS_AT_ONCE = 32
_SMALLEST_DOT = 16
"""Fewest rows and columns of a tensor core product."""


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

    def rotate_into_stores(self, qkv: Tensor, cos: Tensor, sin: Tensor, view: StepView, layer: int) -> None:
        """See Operations."""
        num_rows, num_heads, width = qkv.shape
        stores, own, prefixes = view.stores, view.stores.own[layer], view.stores.prefixes[layer]
        _rotate_into_stores[(num_rows, num_heads)](
            *(qkv, cos, sin, own[0], own[1], prefixes[0], prefixes[1], view.columns, view.targets),
            *(stores.prefix_of, stores.prefix_len, view.num_rows, num_heads, own.shape[2]),
            *(own.stride(1), own.stride(2), prefixes.stride(1), prefixes.stride(2)),
            TARGETS=view.targets.shape[1],
            HALF=width // 2,
            BLOCK=triton.next_power_of_2(width // 2),
            num_warps=1,
        )

    def attend(self, queries: Tensor, view: StepView, layer: int, scaling: float) -> Tensor:
        """See Operations; reads each slot up to the row's own column, not up to that of the longest caption."""
        num_rows, tile = view.num_rows, PROMPT_TILES.num_rows
        attended = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        self._attend(queries, view, layer, scaling, attended, range(num_rows), rows_at_once=1)
        if len(queries) > num_rows:
            self._attend(queries, view, layer, scaling, attended, range(num_rows, len(queries)), rows_at_once=tile)
        return attended

    def _attend(
        self, queries: Tensor, view: StepView, layer: int, scaling: float, attended: Tensor, rows: range, *,
        rows_at_once: int,
    ) -> None:  # fmt: skip
        stores, own, prefixes = view.stores, view.stores.own[layer], view.stores.prefixes[layer]
        num_kv, (num_heads, width) = own.shape[2], queries.shape[1:]
        group = num_heads // num_kv
        _attend[(len(rows) // rows_at_once, num_kv)](
            *(queries, own[0], own[1], prefixes[0], prefixes[1], view.columns, view.targets),
            *(stores.prefix_of, stores.prefix_len, attended, scaling, rows.start, queries.stride(0)),
            *(own.stride(1), own.stride(2), prefixes.stride(1), prefixes.stride(2)),
            TARGETS=view.targets.shape[1],
            ROWS=rows_at_once,
            GROUP=group,
            WIDTH=width,
            BLOCK_ROWS=max(triton.next_power_of_2(rows_at_once * group), _SMALLEST_DOT),
            BLOCK_WIDTH=max(triton.next_power_of_2(width), _SMALLEST_DOT),
            BLOCK_COLUMNS=_COLUMNS_AT_ONCE,
            PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
            num_warps=2 if rows_at_once == 1 else 4,
        )

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
def _rotate_into_stores(
    qkv, cos, sin, own_keys, own_values, prefix_keys, prefix_values, columns, targets, prefix_of, prefix_len,
    num_decode, num_heads, num_kv, own_slot, own_head, prefix_place, prefix_head,
    TARGETS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
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
    column = tl.load(columns + row)
    if head >= num_heads - 2 * num_kv:
        kv_head = (head - num_heads + 2 * num_kv) % num_kv
        for member in range(TARGETS):
            slot = row.to(tl.int64)
            if row >= num_decode:
                slot = tl.load(targets + (row - num_decode) * TARGETS + member)
            length = tl.load(prefix_len + slot)
            if column < length:
                target = tl.load(prefix_of + slot) * prefix_place + kv_head * prefix_head + column * 2 * HALF
                if head >= num_heads - num_kv:
                    tl.store(prefix_values + target + first, one, mask=is_inside)
                    tl.store(prefix_values + target + second, two, mask=is_inside)
                else:
                    tl.store(prefix_keys + target + first, one, mask=is_inside)
                    tl.store(prefix_keys + target + second, two, mask=is_inside)
            else:
                target = slot * own_slot + kv_head * own_head + (column - length) * 2 * HALF
                if head >= num_heads - num_kv:
                    tl.store(own_values + target + first, one, mask=is_inside)
                    tl.store(own_values + target + second, two, mask=is_inside)
                else:
                    tl.store(own_keys + target + first, one, mask=is_inside)
                    tl.store(own_keys + target + second, two, mask=is_inside)


@triton.jit
def _attend(
    queries, own_keys, own_values, prefix_keys, prefix_values, columns, targets, prefix_of, prefix_len, attended,
    scaling, first_row, query_row, own_slot, own_head, prefix_place, prefix_head,
    TARGETS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    member, channel = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_WIDTH)
    row = first_row + tile * ROWS + member // GROUP
    of_head = (kv_head * GROUP + member % GROUP)[:, None] * WIDTH + channel[None, :]
    is_row = member < ROWS * GROUP
    is_inside = is_row[:, None] & (channel[None, :] < WIDTH)
    query = tl.load(queries + row[:, None] * query_row + of_head, mask=is_inside, other=0.0)
    last = tl.load(columns + row, mask=is_row, other=0)
    slot = tile.to(tl.int64)
    if ROWS > 1:
        slot = tl.load(targets + tile * ROWS * TARGETS)
    length = tl.load(prefix_len + slot)
    end = tl.max(last, 0) + 1
    greatest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    # Every row sees column 0, which is in the first block of the first store that has columns: no row is all masked.
    of_image = tl.load(prefix_of + slot) * prefix_place + kv_head * prefix_head
    greatest, mass, total = _read(
        query, prefix_keys + of_image, prefix_values + of_image, last, tl.minimum(end, length), scaling,
        greatest, mass, total, WIDTH, BLOCK_WIDTH, BLOCK_COLUMNS, PRECISION,
    )  # fmt: skip
    of_slot = slot * own_slot + kv_head * own_head
    greatest, mass, total = _read(
        query, own_keys + of_slot, own_values + of_slot, last - length, end - length, scaling,
        greatest, mass, total, WIDTH, BLOCK_WIDTH, BLOCK_COLUMNS, PRECISION,
    )  # fmt: skip
    num_heads = tl.num_programs(1) * GROUP
    target = attended + row[:, None] * num_heads * WIDTH + of_head
    tl.store(target, (total / mass[:, None]).to(query.dtype), mask=is_inside)


@triton.jit
def _read(
    query, keys, values, last, end, scaling, greatest, mass, total,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax of each query row over columns 0 to end - 1 of one store, of which it sees those up to its
    own `last`."""
    channel = tl.arange(0, BLOCK_WIDTH)
    for start in range(0, end, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        is_there = column < end
        key = tl.load(
            keys + column[None, :] * WIDTH + channel[:, None],
            mask=is_there[None, :] & (channel[:, None] < WIDTH),
            other=0.0,
        )
        scores = tl.dot(query, key, input_precision=PRECISION) * scaling
        is_seen = is_there[None, :] & (column[None, :] <= last[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        now = tl.maximum(greatest, tl.max(scores, 1))
        weights = tl.exp(scores - now[:, None])
        faded = tl.exp(greatest - now)
        value = tl.load(
            values + column[:, None] * WIDTH + channel[None, :],
            mask=is_there[:, None] & (channel[None, :] < WIDTH),
            other=0.0,
        )
        mass = mass * faded + tl.sum(weights, 1)
        total = total * faded[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        greatest = now
    return greatest, mass, total


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
