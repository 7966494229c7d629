"""How many of a job's images may fail before the job does. Arithmetic; knows no table."""

from collections.abc import Mapping
from dataclasses import dataclass

from captioner.errors import JobError

__all__ = ["FailureLimit"]


@dataclass(frozen=True, kw_only=True)
class FailureLimit:
    """The greatest share of the images asked for that may have failed, in this run or for good in earlier ones."""

    share: float
    num_images: int | None
    """Images that the job was asked for; None while nobody has counted them."""

    num_failed_before: int

    @property
    def is_set(self) -> bool:
        """False when everything may fail."""
        return self.share < 1

    def check(self, failed_by_reason: Mapping[str, int], num_images: int | None = None) -> None:
        """Raise JobError when the failures of this run are too many, whatever the images still to come do.

        num_images: how many there are, where it was not known at the start.
        """
        total = self.num_images if num_images is None else num_images
        num_failed = self.num_failed_before + sum(failed_by_reason.values())
        if total is None or num_failed <= self.share * total:
            return
        reasons = sorted(failed_by_reason.items(), key=lambda item: -item[1])
        counts = [f"{count:,} {reason}" for reason, count in reasons]
        before = [f"{self.num_failed_before:,} in earlier runs"] if self.num_failed_before else []
        raise JobError(
            f"{num_failed:,} of {total:,} images failed ({', '.join(counts + before)}); --max-failed-share is"
            f" {self.share:g}. What was captioned stays: mend what the failures have in common, then give the same"
            " command again, with --retry-failures all if they are not transient"
        )
