"""CUDA graphs: work on a device that is recorded once and replayed without Python.

One step of a 32-layer LLaMA takes the host some 9 ms to dispatch and an H100 about 5 ms to run, so that only replayed
work keeps the GPU busy. Recorded work reads and writes tensors at fixed addresses and never reads their values on the
host. Knows neither images nor tokens.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["CudaGraphRecorder", "Recorder", "Recording", "on_device", "recorder_for"]

Result = TypeVar("Result")

_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN's, which compiles a plan for each new shape at run time."""


class Recording(NamedTuple, Generic[Result]):
    """Recorded work: `replay` overwrites `result`, tensors at fixed addresses."""

    replay: Callable[[], None]
    result: Result


class Recorder(Protocol):
    """Records work. The recordings of one recorder may share memory and are never replayed at the same time."""

    def __call__(self, work: Callable[[], Result]) -> Recording[Result]:
        """Run `work` once and return its recording."""


def recorder_for(device: torch.device) -> Recorder | None:
    """Return a new recorder for a CUDA device, None for others. Each engine and each encoder needs its own."""
    return CudaGraphRecorder(device) if device.type == "cuda" else None


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one of the calling thread inside the block; a new thread has the first."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class CudaGraphRecorder:
    """Records work on one CUDA device as graphs that share a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with on_device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], Result]) -> Recording[Result]:
        """Return the recording of `work`; run it once before: what libraries set up at first use cannot be recorded."""
        with on_device(self._device), sdpa_kernel(_ATTENTION):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                work()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile; their calls must not invalidate the recording.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        return Recording(graph.replay, result)
