"""Prompts that are waiting to be computed, and which of their rows the next step takes. Host side.

A step takes rows first come, first served, across images: a long prompt takes several steps, short ones share one, and
the captions that are being decoded go on beside them.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from captioner.decoding.jobs import Job, Search
from captioner.decoding.layout import SlotLayout


@dataclass(slots=True, eq=False)
class Prompt:
    """Rows of an image, or of what follows it in one fork: of all tokens but the last, which is a decode row."""

    embeds: Tensor
    """float[n, D]"""

    first_column: int
    readers: Sequence[Search]
    """The searches that need it, none of which decodes before it is computed."""

    is_shared: bool
    """It is written once, to the prefix store; else to each reader's own slots."""

    num_done: int = 0

    @property
    def num_left(self) -> int:
        """Rows that no step has taken yet."""
        return len(self.embeds) - self.num_done


class Chunk(NamedTuple):
    """Rows of one prompt that one step computes."""

    prompt: Prompt
    start: int
    num_rows: int
    at: int
    """Its first row among the step's prompt rows."""

    @property
    def first_column(self) -> int:
        """Column of the first row."""
        return self.prompt.first_column + self.start

    @property
    def embeds(self) -> Tensor:
        """float[n, D]"""
        return self.prompt.embeds[self.start : self.start + self.num_rows]


@dataclass(slots=True, eq=False)
class PrefillQueue:
    """Prompts in the order of their requests, an image before its forks."""

    layout: SlotLayout
    num_rows: int = 0
    """Rows of steps that wait."""
    _prompts: deque[Prompt] = field(default_factory=deque)
    _ready: list[Search] = field(default_factory=list)

    def add(self, prompts: Sequence[Prompt], searches: Sequence[Search]) -> None:
        """Queue the prompts of new searches; those that have none are ready at once."""
        for prompt in prompts:
            self._prompts.append(prompt)
            self.num_rows += self.layout.step_rows(prompt.num_left)
            for search in prompt.readers:
                search.num_prompts_left += 1
        self._ready += [search for search in searches if not search.num_prompts_left]

    def take(self) -> tuple[list[Chunk], list[Search]]:
        """Return the rows of the next step, and the searches that begin to decode in it."""
        chunks: list[Chunk] = []
        used = 0
        while self._prompts and (num_rows := self._fitting(self._prompts[0], self.layout.prompt_rows - used)):
            prompt = self._prompts[0]
            chunks.append(Chunk(prompt, prompt.num_done, num_rows, used))
            prompt.num_done += num_rows
            used += self.layout.step_rows(num_rows)
            if not prompt.num_left:
                self._finish(self._prompts.popleft())
        self.num_rows -= used
        ready, self._ready = self._ready, []
        return chunks, ready

    def _fitting(self, prompt: Prompt, room: int) -> int:
        """Return how many rows of a prompt fit: whole blocks, or all that are left."""
        if self.layout.step_rows(prompt.num_left) <= room:
            return prompt.num_left
        return room // self.layout.blocks.num_rows * self.layout.blocks.num_rows

    def _finish(self, prompt: Prompt) -> None:
        for search in prompt.readers:
            search.num_prompts_left -= 1
            if not search.num_prompts_left:
                self._ready.append(search)


def prompts_of(job: Job, prefix: Tensor, layout: SlotLayout) -> list[Prompt]:
    """Return the prompts of a request, the image's first: all tokens but the last of each fork, which is a decode row.

    prefix: float[P, D]"""
    image, shared_len = prefix[:-1], layout.shared_len
    if layout.stores_prefixes:
        prompts = [Prompt(image, shared_len, job.searches, is_shared=True)]
        embeds, first_column = [tail[:-1] for tail in job.tails], shared_len + len(image)
    else:
        prompts = []
        embeds, first_column = [torch.cat([image, tail[:-1]]) for tail in job.tails], shared_len
    prompts += [Prompt(own, first_column, job.searches_of(f), is_shared=False) for f, own in enumerate(embeds)]
    return [prompt for prompt in prompts if len(prompt.embeds)]
