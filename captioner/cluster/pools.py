"""The pools of workers that Ray Data feeds. The pool that decodes serves caption jobs and fits alike."""

from collections.abc import Mapping
from typing import Any

from ray.data import ActorPoolStrategy, Dataset
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from captioner.captioning.decode_worker import DecodeWorker
from captioner.captioning.resources import Allocation
from captioner.cluster.session import OFF_MODEL_SELECTOR
from captioner.cluster.supervision import RETRIES, supervised
from captioner.errors import ConfigError
from captioner.images import Preprocessing
from captioner.inputs.slices import BLOCK_ROWS

__all__ = ["check_device", "decoded", "rows_per_block", "worker_pool"]

_DECODE_CALLS = 2  # one fetches while the other decodes


def rows_per_block(preprocessing: Mapping[str, Any]) -> int:
    """Return how many images are decoded, and captioned, by one call: fewer where they come in tiles."""
    return min(BLOCK_ROWS, Preprocessing.from_config(preprocessing).rows_per_block or BLOCK_ROWS)


def decoded(
    rows: Dataset, decoder: Mapping[str, Any], allocation: Allocation, registry: Any, node: str | None = None
) -> Dataset:
    """Return the stream of decoded rows, not yet running.

    decoder: arguments of each DecodeWorker. node: on which all of them are; by default any but those for the model."""
    anywhere = {"label_selector": OFF_MODEL_SELECTOR}
    place = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)} if node else anywhere
    stage: Dataset = rows.map_batches(
        supervised(DecodeWorker),
        fn_constructor_kwargs={"registry": registry, **decoder},
        batch_size=rows_per_block(decoder["preprocessing"]),
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=worker_pool(allocation.decoders, _DECODE_CALLS),
        num_cpus=allocation.decoder_cpus,
        **place,
        **RETRIES,
    )
    return stage


def worker_pool(size: tuple[int, int], calls: int) -> ActorPoolStrategy:
    """Return a pool of (min, max) actors, each of which serves `calls` calls at once."""
    return ActorPoolStrategy(
        min_size=size[0],
        max_size=size[1],
        max_concurrent_calls_per_actor=calls,
        max_tasks_in_flight_per_actor=2 * calls,  # a pool grows only when twice as many wait as run
        enable_true_multi_threading=True,
    )


def check_device(device: str, allocation: Allocation) -> None:
    """Raise ConfigError when a GPU is asked for and no worker gets one."""
    if device.startswith("cuda") and not allocation.worker_gpus:
        raise ConfigError(
            f"--device is {device}, but the workers get no GPU: there is none in the cluster, or --gpus-per-worker is"
            " 0; expected auto or cpu"
        )
