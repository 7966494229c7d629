"""What the host knows of a step's rows, for layers that attend block by block. Knows no keys, values or weights.

On a CPU the work of a step need not be of a fixed shape: prompts are attended in blocks over exactly the columns that
they may see, and the captions of one image in one product over exactly the columns of that image.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from captioner.decoding.prefill import Chunk

_FEW_COLUMNS = 64
"""Blocks that read no more columns are attended together where they are alike."""
_MOST_IDLE = 2
"""Places without a caption that a run of images may cross: reading them costs less than one product more."""


class Block(NamedTuple):
    """Rows of one prompt that are attended at once."""

    at: int
    """Its first row among the step's prompt rows."""

    num_rows: int
    first_column: int
    slot: int
    prefix_of: int
    prefix_len: int
    """Columns of its slot that are in the prefix store."""


class Run(NamedTuple):
    """Neighbouring places of the prefix store that hold images of one length."""

    first: int
    """Its first entry in `DecodeGroups.members`."""

    place: int
    num_places: int
    prefix_len: int


class DecodeGroups(NamedTuple):
    """The decode rows of each image in the prefix store."""

    members: Tensor
    """int64[E, slots_per_image]: the rows of each image, R for one that is idle. A caption's place does not change, so
    that no result depends on whether the others of its image still run."""

    runs: list[Run]


class StepPlan(NamedTuple):
    """The rows of a step."""

    blocks: list[list[Block]]
    """Those in one list are attended together."""

    groups: DecodeGroups | None
    """None without a prefix store."""


class Member(NamedTuple):
    """A slot whose caption is decoded."""

    slot: int
    prefix_of: int
    prefix_len: int
    place: int
    """Its number among the slots of its image."""


def blocks_of(
    chunks: Sequence[Chunk], slots: Iterable[int], addresses: Iterable[tuple[int, int]], num_rows: int
) -> list[Block]:
    """Return the blocks of a step's chunks, each `num_rows` long or the last of its prompt.

    slots, addresses: of each chunk, the slot that it reads, and that slot's prefix_of and prefix_len."""
    return [
        Block(chunk.at + start, min(num_rows, chunk.num_rows - start), chunk.first_column + start, slot, *address)
        for chunk, slot, address in zip(chunks, slots, addresses, strict=True)
        for start in range(0, chunk.num_rows, num_rows)
    ]


def alike(blocks: Sequence[Block]) -> list[list[Block]]:
    """Return blocks one by one, or together those that lie side by side, read few columns and as many of each store."""

    def kind(block: Block) -> tuple[int, ...]:
        is_short = block.first_column + block.num_rows <= _FEW_COLUMNS
        return (block.num_rows, block.first_column, block.prefix_len, -1 if is_short else block.at)

    return [list(group) for _, group in groupby(blocks, kind)]


def groups_of(members: Sequence[Member], num_rows: int, slots_per_image: int) -> DecodeGroups:
    """Return the decode rows of a step by image."""
    lengths = {member.prefix_of: member.prefix_len for member in members}
    runs: list[Run] = []
    first = 0
    for place in sorted(lengths):
        end = runs[-1].place + runs[-1].num_places if runs else 0
        if runs and lengths[place] == runs[-1].prefix_len and place - end <= _MOST_IDLE:
            runs[-1] = runs[-1]._replace(num_places=place + 1 - runs[-1].place)
        else:
            first += runs[-1].num_places if runs else 0
            runs.append(Run(first, place, 1, lengths[place]))
    entry_of = {run.place + i: run.first + i for run in runs for i in range(run.num_places)}
    rows = np.full((len(entry_of), slots_per_image), num_rows, np.int64)
    for member in members:
        rows[entry_of[member.prefix_of], member.place] = member.slot
    return DecodeGroups(torch.from_numpy(rows), runs)
