"""The workers that fit one projector together: this process alone, or all of a torch process group."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed

__all__ = ["WorkerGroup"]


@dataclass(frozen=True)
class WorkerGroup:
    """The rank of this worker, and the number of workers."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_torch(cls) -> "WorkerGroup":
        """Return torch's default process group, or this process alone if there is none."""
        if not distributed.is_available() or not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up the tensors of all workers in place, and return the sum."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def gather(self, part: list[Any]) -> list[Any]:
        """Return the lists of all workers, one after another by rank."""
        if self.size == 1:
            return part
        parts: list[Any] = [None] * self.size
        distributed.all_gather_object(parts, part)
        return [item for part in parts for item in part]
