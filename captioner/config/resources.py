"""Flags for the workers, GPUs and output files of a job."""

from dataclasses import dataclass

from captioner.config.checks import DAY_S, check, is_count, worker_range

__all__ = ["ResourceConfig"]


@dataclass(frozen=True, kw_only=True)
class ResourceConfig:
    """How many workers, CPUs and GPUs the job uses, and how large its output files are."""

    workers: str = "auto"
    """Model workers, as `8` or `1:8` (autoscaling).
    `auto`: from 1 to the number of GPUs; 1 without a GPU."""

    gpus_per_worker: float | None = None
    """GPUs of each model worker; a fraction lets several small models share a GPU.
    By default 1 when the cluster has GPUs, else 0. Required where an autoscaler may add the first GPU."""

    cpu_workers: str = "auto"
    """Workers that fetch and decode, as `8` or `1:8`.
    `auto`: as many as the CPUs allow, up to 16 for each model worker."""

    slots: str = "auto"
    """Captions that one model worker decodes at the same time. `auto`: as many as its memory holds."""

    rows_per_part: int | None = None
    """Fewest rows of an output file; the last batch of a worker is not split.
    By default a 64th of the images, from 256 to 16,384: small files are slow to query, large ones are saved late."""

    drain_s: float = 20.0
    """Seconds in which Ctrl-C or SIGTERM lets what was begun be finished and saved.
    A spot notice leaves 30 s on Google Cloud and Azure, and 120 s on AWS."""

    def __post_init__(self) -> None:
        worker_range(self.workers, "--workers")
        worker_range(self.cpu_workers, "--cpu-workers")
        check(self.slots == "auto" or is_count(self.slots), "--slots", self.slots, "`auto` or a number from 1 up")
        check(
            self.gpus_per_worker is None or self.gpus_per_worker >= 0, "--gpus-per-worker", self.gpus_per_worker, ">= 0"
        )
        check(
            self.gpus_per_worker is None or self.gpus_per_worker <= 1 or self.gpus_per_worker % 1 == 0,
            "--gpus-per-worker",
            self.gpus_per_worker,
            "a share of one GPU, or a whole number of them",
        )
        is_time = 0 <= self.drain_s <= DAY_S
        check(is_time, "--drain-s", self.drain_s, f"0 or more, at most {DAY_S} (a day)")
        check(self.rows_per_part is None or self.rows_per_part > 0, "--rows-per-part", self.rows_per_part, "at least 1")
