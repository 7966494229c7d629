"""How a process of a job imports transformers: without torch's compiler and its sharded tensors.

No captioner uses these two. transformers imports both all the same, for marks on some of its functions and for types in
annotations: 870 modules with sympy, and a fourth of the time until a worker can load a model. During the import a
stand-in takes the place of the compiler, which transformers does not promise to support, and torch says that it has no
`torch.distributed`, which transformers does. A test fails at a release that does not work so; there transformers is
imported as it comes.
"""

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

__all__ = ["import_transformers"]

log = logging.getLogger("captioner")

_HEAVY = ("transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama")
"""What every captioner needs; these import all that is heavy."""


def import_transformers() -> None:
    """Import the parts of transformers that every captioner needs, where they have not been imported.

    Whatever else asks for the compiler or for sharded tensors later gets the real ones. transformers itself shards no
    model in this process any more: it asks once whether torch can."""
    if any(name in sys.modules for name in (*_STAND_INS, *_HEAVY)):
        return
    try:
        with _stand_ins():
            for name in _HEAVY:
                importlib.import_module(name)
    except (ImportError, AttributeError, TypeError) as error:
        log.warning("transformers=as_it_comes reason=%s", error)


class _Compiler(ModuleType):
    """Stands in for `torch._dynamo`: its marks leave a function as it is."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # a package

    @staticmethod
    def disable(function: Any = None, *_: Any, **__: Any) -> Any:
        """Return the function, or what returns it."""
        return function or (lambda marked: marked)

    allow_in_graph = assume_constant_result = disable


class _Vmap(ModuleType):
    """Stands in for the module of `torch._dynamo` that masks are made with; what is called is the real one."""

    @staticmethod
    def TransformGetItemToIndex() -> Any:  # noqa: N802
        """Return what the real one makes."""
        return importlib.import_module(_VMAP).TransformGetItemToIndex()


_VMAP = "torch._dynamo._trace_wrapped_higher_order_op"
_STAND_INS: dict[str, type[ModuleType]] = {"torch._dynamo": _Compiler, _VMAP: _Vmap}


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Let what is imported in the block find stand-ins, and a torch that was built for one process."""
    distributed = importlib.import_module("torch.distributed")
    sys.modules.update({name: kind(name) for name, kind in _STAND_INS.items()})
    try:
        with patch.object(distributed, "is_available", lambda: False):
            yield
    finally:
        for name in _STAND_INS:
            del sys.modules[name]
