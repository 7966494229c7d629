"""The sizes of an engine's buffers and of its steps. Knows no tensors.

What the slots of one image share stands once, in the prefix store: the prompt before the image, and all of the image
but its last token. What follows stands in each slot's own columns. Where the shared part is short, there is no prefix
store, and each slot has a copy in its own first columns: such captions are then read in one piece.
"""

from dataclasses import dataclass
from typing import NamedTuple

from captioner.config import DecodingConfig

ROW_BUCKET = 16
WINDOW_BUCKET = 16
_SHORT_PREFIX = 64
"""Shared columns that each slot holds a copy of."""
STEP_ROWS = 512
"""Rows of a step of fixed size: twice what an H100 multiplies while it reads an 8B model's weights, and whole tiles for
all its processors in the narrowest product."""
_LEAST_PROMPT_ROWS = 128


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple


def group_size(decoding: DecodingConfig) -> int:
    """Return the number of slots that one text about an image takes."""
    return decoding.num_captions if decoding.num_beams == 1 else decoding.num_beams


class PromptBlocks(NamedTuple):
    """How prompt rows stand in a step. A block is the rows of one prompt that are attended at once; blocks are cut from
    the prompt's own beginning, so that no result depends on what else is in the step."""

    num_rows: int
    """Rows of a block, the last of a prompt excepted."""

    is_padded: bool
    """Every block takes `num_rows` rows of the step, so that its place says which it is."""

    most_rows: int | None = None
    """Prompt rows of one step; None: what fixed steps leave."""


PROMPT_TILES = PromptBlocks(num_rows=16, is_padded=True)
"""On a card: 16 rows of 4 query heads to a kv head are the 64 rows of a product that reads a slot once."""


@dataclass(frozen=True, kw_only=True)
class SlotLayout:
    """The sizes of an engine's buffers."""

    num_slots: int
    group_size: int
    """Most slots that share a whole prompt: num_beams, or the number of captions sampled for each text."""

    num_forks: int
    """Most texts of one image."""

    slots_per_image: int
    """Most slots that share one image."""

    num_images: int
    """Images whose texts are written at once, if each has the most."""

    shared_len: int
    """Tokens S of the prompt before the image, the same for all."""

    max_prefix_len: int
    """Most tokens P of an image's own prefix."""

    max_suffix_len: int
    """Most tokens Q that follow it in a fork."""

    max_new_tokens: int
    is_constrained: bool
    """Whether there is a mask of allowed tokens for each slot."""

    blocks: PromptBlocks

    @classmethod
    def of(
        cls,
        slots: int,
        decoding: DecodingConfig,
        *,
        shared_len: int,
        max_prefix_len: int,
        blocks: PromptBlocks,
        max_suffix_len: int = 0,
        num_forks: int = 1,
        slots_per_image: int | None = None,
        is_constrained: bool = False,
    ) -> "SlotLayout":
        """Return the layout of an engine. slots_per_image: by default, as if all texts took as many."""
        width = group_size(decoding)
        slots_per_image = slots_per_image or width * num_forks
        return cls(
            num_slots=round_up(slots, ROW_BUCKET),
            group_size=width,
            num_forks=num_forks,
            slots_per_image=slots_per_image,
            num_images=slots // slots_per_image,
            shared_len=shared_len,
            max_prefix_len=max_prefix_len,
            max_suffix_len=max_suffix_len,
            max_new_tokens=decoding.max_new_tokens,
            is_constrained=is_constrained,
            blocks=blocks,
        )

    @property
    def stores_prefixes(self) -> bool:
        """Whether images stand in the prefix store."""
        return self.shared_len + self.max_prefix_len - 1 > _SHORT_PREFIX

    @property
    def num_prefixes(self) -> int:
        """Images that the prefix store holds at once; 0 without one."""
        return self.num_images if self.stores_prefixes else 0

    @property
    def own_shared_len(self) -> int:
        """Columns of the prompt before the image that each slot has a copy of."""
        return 0 if self.stores_prefixes else self.shared_len

    @property
    def prefix_columns(self) -> int:
        """Columns of an image in the prefix store; the last is spare."""
        return round_up(self.shared_len + self.max_prefix_len, WINDOW_BUCKET) if self.stores_prefixes else 0

    @property
    def own_columns(self) -> int:
        """Columns of a slot, a whole number of windows; the last generated token is never read and needs none."""
        shared = 0 if self.stores_prefixes else self.shared_len + self.max_prefix_len - 1
        return round_up(shared + self.max_suffix_len + self.max_new_tokens, WINDOW_BUCKET)

    def columns_of(self, prefix_len: int, suffix_len: int) -> tuple[int, int]:
        """Return the columns of a slot that are in the prefix store, and the own column at which decoding begins."""
        shared = self.shared_len + prefix_len - 1
        return (shared, suffix_len) if self.stores_prefixes else (0, shared + suffix_len)

    @property
    def prompt_rows(self) -> int:
        """Most prompt rows C of a step."""
        most = self.blocks.most_rows or max(STEP_ROWS - self.num_slots, _LEAST_PROMPT_ROWS)
        return round_up(min(most, self.most_rows_of_image * self.num_images), 2)

    @property
    def most_rows_of_image(self) -> int:
        """Most prompt rows of all steps together that one image takes."""
        of_image, of_fork = self.max_prefix_len - 1, self.max_suffix_len
        if self.stores_prefixes:
            return self.step_rows(of_image) + self.num_forks * self.step_rows(of_fork)
        return self.num_forks * self.step_rows(of_image + of_fork)

    def step_rows(self, num_rows: int) -> int:
        """Return the rows of a step that prompt rows of one prompt take."""
        return round_up(num_rows, self.blocks.num_rows) if self.blocks.is_padded else num_rows

    def window(self, num_columns: int) -> int:
        """Return the own columns W that a step reads which needs so many."""
        return min(round_up(num_columns, WINDOW_BUCKET), self.own_columns)

    def full_shapes(self) -> "set[StepShape]":
        """Every shape of a step over all slots: with prompt rows, and without."""
        return {StepShape(self.num_slots, self.own_columns, rows) for rows in {0, self.prompt_rows}}


class StepShape(NamedTuple):
    """Everything that the work of a step depends on."""

    num_rows: int
    """Decode rows R: slots 0 to R - 1."""

    window: int
    """Own columns W that decode rows read."""

    num_prompt_rows: int = 0
    """Rows after them, of prompts; 0 in most steps, and always when a prompt is one token."""
