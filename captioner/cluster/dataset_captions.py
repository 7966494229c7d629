"""`captioner.caption`: the captions of a Ray Dataset of one's own, as columns beside its own.

    import captioner, ray

    dataset = ray.data.read_parquet("s3://bucket/photos")
    captioner.caption(dataset, column="image", model="./bundle", num_beams=3).write_parquet("s3://bucket/captioned")

Lazy, as datasets are: nothing runs before its rows are asked for. What a job gives beside - resuming, one row an image
whatever dies, a table with a lease - it does not give.
"""

from typing import Any

import ray
from ray.data import Dataset

from captioner.captioning.dataset_worker import DatasetCaptioner, DatasetOptions, check_columns
from captioner.captioning.resources import GPU_CALLS
from captioner.cluster.pools import worker_pool
from captioner.config import DecodingConfig, ImageConfig, ModelConfig, ScoringConfig, with_options
from captioner.errors import ConfigError
from captioner.inputs.slices import BLOCK_ROWS

__all__ = ["caption"]


def caption(
    dataset: Dataset,
    *,
    column: str = "image",
    model: str | ModelConfig,
    id_column: str | None = None,
    workers: int = 1,
    gpus_per_worker: float | None = None,
    storage_options: dict[str, object] | None = None,
    **options: Any,
) -> Dataset:
    """Return the dataset with a caption of each row, its scores, and the reason where a row has none.

    column: the images, as bytes, Hugging Face's struct<bytes, path>, URIs, or arrays as `ray.data.read_images` gives
    them. id_column: what the draws of sampled captions depend on; by default the image itself. workers: model workers.
    gpus_per_worker: by default 1 on a cluster with GPUs, else 0. storage_options: of the stores that URIs lead to.
    options: any flag of a caption job for decoding, scoring, images or the model, by its name in Python.
    Raises ConfigError for an option that is none, InputError for a dataset without these columns.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}; expected at least 1")
    named = ModelConfig(model=model) if isinstance(model, str) else model
    decoding, scoring, image, named = with_options(options, DecodingConfig(), ScoringConfig(), ImageConfig(), named)
    asked = DatasetOptions(
        column=column,
        id_column=id_column,
        model=named,
        decoding=decoding,
        scoring=scoring,
        image=image,
        storage_options=storage_options or {},
    )
    schema = dataset.schema(fetch_if_missing=False)
    if schema is not None:
        check_columns(schema.names, asked)
    gpus = _gpus() if gpus_per_worker is None else gpus_per_worker
    captioned: Dataset = dataset.map_batches(
        DatasetCaptioner,
        fn_constructor_args=[asked],
        batch_size=BLOCK_ROWS,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=worker_pool((workers, workers), GPU_CALLS if gpus else 1),
        num_cpus=0 if gpus else 1,
        num_gpus=gpus,
    )
    return captioned


def _gpus() -> float:
    if not ray.is_initialized():
        return 0.0
    return 1.0 if ray.cluster_resources().get("GPU") else 0.0  # type: ignore[no-untyped-call]
