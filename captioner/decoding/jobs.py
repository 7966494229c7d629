"""A request that is being decoded, and its searches. Host side; knows no slots' contents."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from captioner.decoding.request import Generation, Hypothesis, PendingHypotheses, Request


@dataclass(slots=True, eq=False)
class Search:
    """One caption, or one beam search, from its admission on."""

    job: "Job"
    fork: int
    """Which of the request's texts it writes."""

    number: int
    """Its place among the searches of its request; it does not change, whichever lane it has."""

    draw: int
    """Which caption of its text it draws."""

    num_redraws: int = 0
    lane: int = -1
    num_prompts_left: int = 0
    """Prompts that must be computed before it decodes."""


class Job:
    """A request, its image's place in the prefix store, and what has been found so far. Holds no image: once that is
    computed, its memory is free."""

    def __init__(self, request: Request, place: int, searches_of_forks: Sequence[int]) -> None:
        """searches_of_forks: how many searches each fork has."""
        self.id = request.id
        self.place = place
        self.prefix_len = len(request.prefix)
        self.tails = [_tail(request.prefix, fork.suffix) for fork in request.forks]
        """float[1 + Q, D] of each fork: the last token of the image, and the suffix."""
        self.seeds = [request.seed_of(fork) for fork in request.forks]
        owners = [(fork, draw) for fork, number in enumerate(searches_of_forks) for draw in range(number)]
        self.searches = [Search(self, fork, number, draw) for number, (fork, draw) in enumerate(owners)]
        self.redraws = [fork.redraw for fork in request.forks]
        self._searches_of_forks = searches_of_forks
        self._num_running = len(self.searches)
        self._finished: list[list[PendingHypotheses]] = [[] for _ in request.forks]

    def searches_of(self, fork: int) -> list[Search]:
        """Return the searches of one of its texts."""
        return [search for search in self.searches if search.fork == fork]

    def begins_again(self, search: Search, pending: PendingHypotheses) -> bool:
        """Return whether a search that has ended writes one more caption; take its result if it does."""
        redraw = self.redraws[search.fork]
        if redraw is None or search.num_redraws >= redraw.most or not redraw.is_wanted(pending()[0]):
            return False
        self._finished[search.fork].append(pending)
        search.num_redraws += 1
        search.draw += self._searches_of_forks[search.fork]
        return True

    def finish(self, search: Search, pending: PendingHypotheses) -> bool:
        """Take the result of a search; return whether it was the last that ran."""
        self._finished[search.fork].append(pending)
        self._num_running -= 1
        return not self._num_running

    def generation(self) -> Generation:
        """Return all hypotheses of each fork, best first, once no search is running."""
        return Generation(self.id, tuple(_ranked(pending) for pending in self._finished))


def _ranked(finished: Sequence[PendingHypotheses]) -> tuple[Hypothesis, ...]:
    hypotheses = [hypothesis for pending in finished for hypothesis in pending()]
    return tuple(sorted(hypotheses, key=attrgetter("score"), reverse=True))


def _tail(prefix: Tensor, suffix: Tensor | None) -> Tensor:
    last = prefix[-1:].clone()
    return last if suffix is None else torch.cat([last, suffix.to(last)])
