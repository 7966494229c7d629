"""How many images may fail before the job fails. Arithmetic; knows no table."""

from collections.abc import Mapping
from dataclasses import dataclass

from captioner.errors import JobError

__all__ = ["FailureLimit"]


@dataclass(frozen=True, kw_only=True)
class FailureLimit:
    """The largest share of the requested images that may fail, in this run or for good in earlier ones."""

    share: float
    num_images: int | None
    """Images that the job is to caption; None while they are not counted."""

    num_failed_before: int

    @property
    def is_set(self) -> bool:
        """Whether there is a limit: a share of 1 is none."""
        return self.share < 1

    def is_exceeded(self, num_failed: int, num_images: int | None = None) -> bool:
        """Return True if so many failures in this run are too many. num_images: as of `check`."""
        total = self.num_images if num_images is None else num_images
        return total is not None and self.num_failed_before + num_failed > self.share * total

    def check(self, failed_by_reason: Mapping[str, int], num_images: int | None = None) -> None:
        """Raise JobError when too many images have failed already, even if all others succeed.

        num_images: images of the job, where they were not counted at the start.
        """
        total = self.num_images if num_images is None else num_images
        num_failed = self.num_failed_before + sum(failed_by_reason.values())
        if total is None or not self.is_exceeded(sum(failed_by_reason.values()), total):
            return
        reasons = sorted(failed_by_reason.items(), key=lambda item: -item[1])
        counts = [f"{count:,} {reason}" for reason, count in reasons]
        before = [f"{self.num_failed_before:,} in earlier runs"] if self.num_failed_before else []
        raise JobError(
            f"{num_failed:,} of {total:,} images failed ({', '.join(counts + before)}); --max-failed-share is"
            f" {self.share:g}. Captions written so far stay: fix the common cause, then run the same"
            " command again, with --retry-failures all if they are not transient"
        )
