"""Recorded steps against steps that run as they come. On a CPU a list of operations stands in for a CUDA graph: it has
the same law, since it repeats the same work on the same memory whatever Python would now do."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captioner.config import DecodingConfig
from captioner.decoding import Request
from captioner.decoding.recording import CudaGraphs, Recording
from tests.unit.decoding_models import captions, engine_of, random_prefixes, tiny_llama, token_ids

STRATEGIES = [
    {},
    {"min_new_tokens": 3, "repetition_penalty": 1.2},
    {"do_sample": True, "num_captions": 2},
    {"do_sample": True, "top_k": 0, "top_p": 0.9, "min_p": 0.01},
    {"num_beams": 3, "repetition_penalty": 1.2},
]


class Operations(TorchDispatchMode):
    """Notes every operation with the very tensors it reads and makes, and does them again."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.num_replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.noted.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, made in self.noted:
            again = func(*args, **kwargs)
            given = {leaf.untyped_storage().data_ptr() for leaf in tensors((args, kwargs))}
            for old, new in zip(tensors(made), tensors(again), strict=True):
                if old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Notebook:
    """A recorder that keeps what it has recorded."""

    def __init__(self) -> None:
        self.operations: list[Operations] = []

    def __call__(self, work: Callable[[], Tensor]) -> Recording:
        with Operations() as operations:
            result = work()
        self.operations.append(operations)
        return Recording(operations.replay, result)


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.mark.parametrize("prefix_len", [1, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recorded_steps_write_the_captions_of_steps_that_run_as_they_come(llama, strategy, prefix_len):
    images = random_prefixes(llama, 24, prefix_len)
    decoding, recorder = DecodingConfig(max_new_tokens=12, **strategy), Notebook()
    recorded = captions(llama, images, decoding, recorder=recorder, slots=20)
    assert sum(operations.num_replays for operations in recorder.operations) > 5
    assert token_ids(recorded) == token_ids(captions(llama, images, decoding, slots=20))


def test_a_recording_is_made_for_every_shape_before_the_first_request(llama):
    recorder = Notebook()
    engine = engine_of(llama, DecodingConfig(max_new_tokens=40), recorder=recorder, prefix_len=3, slots=6)
    num_windows, num_prompt_counts = 3, 5  # 16, 32 and 48 columns; 0, 1, 2, 4 and 6 fresh prefixes
    assert len(recorder.operations) == num_windows * num_prompt_counts
    images = random_prefixes(llama, 30, 3)
    assert len(list(engine.generate(Request(i, image) for i, image in enumerate(images)))) == 30
    assert len(recorder.operations) == num_windows * num_prompt_counts


@pytest.mark.gpu
@pytest.mark.parametrize("prefix_len", [1, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cuda_graphs_write_the_captions_of_eager_steps(strategy, prefix_len):
    llama = tiny_llama().cuda()
    images = [image.cuda() for image in random_prefixes(llama, 40, prefix_len)]
    decoding = DecodingConfig(max_new_tokens=20, **strategy)
    graphs = captions(llama, images, decoding, recorder=CudaGraphs(), slots=20)
    assert token_ids(graphs) == token_ids(captions(llama, images, decoding, slots=20))
