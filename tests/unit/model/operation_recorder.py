"""A recorder for machines without a card: a list of operations stands in for a CUDA graph. It has the same law: it
repeats the same work on the same memory whatever Python would now do."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captioner.model.cuda_graphs import Recording


class Operations(TorchDispatchMode):
    """Notes every operation with the very tensors it reads and makes, and does them again. Of those that it makes, one
    in the memory of a tensor that it reads (a view, or what it changes in place) needs no copy: it is None."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None]]] = []
        self.num_replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        given = {leaf.untyped_storage().data_ptr() for leaf in tensors((args, kwargs))}
        new = [leaf if leaf.untyped_storage().data_ptr() not in given else None for leaf in tensors(made)]
        self.noted.append((func, args, kwargs, new))
        return made

    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, made in self.noted:
            again = func(*args, **kwargs)
            for old, new in zip(made, tensors(again), strict=True):
                if old is not None:
                    old.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class OperationRecorder:
    """A recorder that keeps what it has recorded."""

    def __init__(self) -> None:
        self.operations: list[Operations] = []

    def __call__(self, work: Callable[[], Any]) -> Recording[Any]:
        with Operations() as operations:
            result = work()
        self.operations.append(operations)
        return Recording(operations.replay, result)

    @property
    def num_replays(self) -> int:
        return sum(operations.num_replays for operations in self.operations)
