"""When a store is out of reach as a whole, told from images that are."""

from collections.abc import Iterable

import pyarrow as pa
import pytest

from captioner.errors import JobError
from captioner.rows import Reject, RejectReason, row_key, source_schema
from captioner.sources import Refusals

FORBIDDEN = Reject(RejectReason.FORBIDDEN, "HTTP 403, InvalidAccessKeyId")
FAILED = Reject(RejectReason.FETCH_FAILED, "ClientConnectorError: connection refused")
MISSING = Reject(RejectReason.MISSING, "HTTP 404")


def see(refusals: Refusals, seen: Iterable[tuple[str | None, object]], unit: int = 0, attempt: int = 1) -> None:
    pairs = list(seen)
    rows = [
        {"key": row_key(unit, place), "image_id": "", "attempt": attempt, "uri": uri}
        for place, (uri, _) in enumerate(pairs)
    ]
    refusals.see(pa.Table.from_pylist(rows, source_schema()), [found for _, found in pairs])


@pytest.mark.parametrize("reject", [FORBIDDEN, FAILED])
def test_a_store_that_gives_nothing_ends_the_job_with_its_reason(reject: Reject) -> None:
    refusals = Refusals("s3://bucket/photos")
    see(refusals, ((f"s3://bucket/photos/{n}.jpg", reject) for n in range(255)))
    with pytest.raises(JobError, match=f"256 images in a row .* none arrived before; .*{reject.detail}.*again"):
        see(refusals, [("s3://bucket/photos/last.jpg", reject)])


def test_credentials_that_are_lost_midway_end_the_job() -> None:
    refusals = Refusals("s3://bucket/photos")
    see(refusals, (("s3://bucket/photos/1.jpg", None) for _ in range(1000)))
    with pytest.raises(JobError, match="since some arrived before"):
        see(refusals, (("s3://bucket/photos/2.jpg", FORBIDDEN) for _ in range(256)))


def test_an_image_that_arrives_and_one_that_the_store_does_not_have_prove_that_there_is_access() -> None:
    refusals = Refusals("s3://bucket/photos")
    for answer in (None, MISSING):
        for _ in range(3):
            see(refusals, (("s3://bucket/photos/1.jpg", FORBIDDEN) for _ in range(255)))
            see(refusals, [("s3://bucket/photos/2.jpg", answer)])


def test_one_dead_web_server_among_many_is_no_reason_to_end_but_a_dead_network_is() -> None:
    refusals = Refusals("/lists/laion.parquet")
    see(refusals, ((f"http://dead.example/{n}.jpg", FAILED) for n in range(3000)))
    with pytest.raises(JobError, match="in a row did not arrive"):
        see(refusals, ((f"http://host-{n}.example/1.jpg", FAILED) for n in range(8)))


def test_web_servers_that_failed_before_an_image_arrived_are_not_counted_with_a_later_one() -> None:
    refusals = Refusals("/lists/laion.parquet")
    for host in range(8):
        see(refusals, [(f"http://host-{host}.example/1.jpg", FAILED), ("http://fine.example/1.jpg", None)])
    see(refusals, ((f"http://dead.example/{n}.jpg", FAILED) for n in range(3000)))


def test_the_web_server_that_the_input_itself_lies_on_is_a_store_like_any_other() -> None:
    refusals = Refusals("https://photos.example/all/")
    with pytest.raises(JobError, match=r"https://photos\.example/all/1\.jpg"):
        see(refusals, (("https://photos.example/all/1.jpg", FAILED) for _ in range(256)))


def test_a_secret_in_a_uri_is_not_part_of_the_complaint() -> None:
    with pytest.raises(JobError) as caught:
        see(Refusals("https://h"), (("https://h/1.jpg?X-Amz-Signature=secret", FORBIDDEN) for _ in range(256)))
    assert "secret" not in str(caught.value)


def test_one_file_of_rows_that_cannot_be_read_is_its_own_affair_and_eight_in_a_row_are_not() -> None:
    refusals = Refusals("s3://bucket/tables")
    see(refusals, ((None, FAILED) for _ in range(1000)))
    for unit in range(1, 7):
        see(refusals, [(None, FAILED)], unit=unit)
    with pytest.raises(JobError, match="input file 7"):
        see(refusals, [(None, FAILED)], unit=7)


def test_eight_tars_in_a_row_that_give_a_single_failure_each_are_enough() -> None:
    refusals = Refusals("s3://bucket/tars")
    for unit in range(7):
        see(refusals, [(None, FORBIDDEN)], unit=unit)
    see(refusals, [(None, None)])
    for unit in range(7):
        see(refusals, [(None, FORBIDDEN)], unit=unit)
    with pytest.raises(JobError, match=r"8 images in a row .* since some arrived before; the last is input file 8"):
        see(refusals, [(None, FORBIDDEN)], unit=8)


def test_what_failed_in_an_earlier_run_says_nothing_of_today() -> None:
    see(Refusals("s3://bucket"), (("s3://bucket/1.jpg", FORBIDDEN) for _ in range(1000)), attempt=2)
