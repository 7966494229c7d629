"""How many images may fail before the job does."""

from contextlib import nullcontext

import pytest

from captioner.captioning.failure_limit import FailureLimit
from captioner.errors import JobError


def test_a_job_goes_on_until_more_have_failed_than_may() -> None:
    limit = FailureLimit(share=0.1, num_images=100, num_failed_before=4)
    limit.check({"corrupt": 4, "missing": 2})
    with pytest.raises(JobError, match=r"11 of 100 images failed \(5 corrupt, 2 missing, 4 in earlier runs\)"):
        limit.check({"missing": 2, "corrupt": 5})


def test_without_a_number_of_images_only_the_end_can_tell() -> None:
    limit = FailureLimit(share=0.1, num_images=None, num_failed_before=0)
    limit.check({"corrupt": 1000})
    with pytest.raises(JobError, match="1,000 of 9,999 images failed"):
        limit.check({"corrupt": 1000}, 9999)


def test_by_default_everything_may_fail_and_with_zero_nothing() -> None:
    FailureLimit(share=1.0, num_images=10, num_failed_before=10).check({})
    FailureLimit(share=0.0, num_images=10, num_failed_before=0).check({})
    with pytest.raises(JobError, match="--max-failed-share is 0\\."):
        FailureLimit(share=0.0, num_images=10, num_failed_before=0).check({"empty": 1})


@pytest.mark.parametrize("num_failed", [0, 1, 2, 3])
@pytest.mark.parametrize("num_images", [None, 4])
def test_a_number_of_failures_is_too_large_just_when_a_check_of_them_fails(
    num_failed: int, num_images: int | None
) -> None:
    limit = FailureLimit(share=0.5, num_images=num_images, num_failed_before=1)
    with pytest.raises(JobError) if limit.is_exceeded(num_failed) else nullcontext():
        limit.check({"corrupt": num_failed})
