"""When a store is out of reach as a whole, told from images that are."""

from collections.abc import Iterable

import pyarrow as pa
import pytest

from captioner.errors import JobError
from captioner.inputs import OutageDetector
from captioner.schema import Reject, RejectReason, row_key, source_schema

FORBIDDEN = Reject(RejectReason.FORBIDDEN, "HTTP 403, InvalidAccessKeyId")
FAILED = Reject(RejectReason.FETCH_FAILED, "ClientConnectorError: connection refused")
MISSING = Reject(RejectReason.MISSING, "HTTP 404")


def see(outages: OutageDetector, seen: Iterable[tuple[str | None, object]], unit: int = 0, attempt: int = 1) -> None:
    pairs = list(seen)
    rows = [
        {"key": row_key(unit, place), "image_id": "", "attempt": attempt, "uri": uri}
        for place, (uri, _) in enumerate(pairs)
    ]
    outages.record(pa.Table.from_pylist(rows, source_schema()), [found for _, found in pairs])


@pytest.mark.parametrize("reject", [FORBIDDEN, FAILED])
def test_a_store_that_gives_nothing_ends_the_job_with_its_reason(reject: Reject) -> None:
    outages = OutageDetector("s3://bucket/photos")
    see(outages, ((f"s3://bucket/photos/{n}.jpg", reject) for n in range(255)))
    with pytest.raises(JobError, match=f"256 images in a row .* none arrived before; .*{reject.detail}.*again"):
        see(outages, [("s3://bucket/photos/last.jpg", reject)])


def test_credentials_that_are_lost_midway_end_the_job() -> None:
    outages = OutageDetector("s3://bucket/photos")
    see(outages, (("s3://bucket/photos/1.jpg", None) for _ in range(1000)))
    with pytest.raises(JobError, match="since some arrived before"):
        see(outages, (("s3://bucket/photos/2.jpg", FORBIDDEN) for _ in range(256)))


def test_refusals_of_images_are_recorded_while_one_that_arrived_before_still_arrives() -> None:
    asked: list[str] = []
    outages = OutageDetector("s3://bucket/photos", asked.append)
    see(outages, [("s3://bucket/photos/1.jpg", None), ("s3://bucket/photos/2.jpg", MISSING)])
    see(outages, ((f"s3://bucket/archived/{n}.jpg", FORBIDDEN) for n in range(1000)))
    assert asked == ["s3://bucket/photos/1.jpg"] * 3, "once in 256"


def test_refusals_end_the_job_once_what_arrived_before_is_refused_too() -> None:
    outages = OutageDetector("s3://bucket/photos", lambda uri: FORBIDDEN)
    see(outages, [("s3://bucket/photos/1.jpg", None)])
    with pytest.raises(JobError, match="256 images in a row"):
        see(outages, ((f"s3://bucket/archived/{n}.jpg", FORBIDDEN) for n in range(1000)))


def test_archived_objects_are_recorded_though_nothing_has_arrived() -> None:
    archived = Reject(RejectReason.FORBIDDEN, "InvalidObjectState: the storage class of the object")
    see(OutageDetector("s3://bucket"), ((f"s3://bucket/{n}.jpg", archived) for n in range(1000)))


def test_what_arrived_from_one_store_says_nothing_of_another() -> None:
    outages = OutageDetector("/list.txt", lambda uri: None)
    see(outages, [("hdfs://nn1/1.jpg", None)])
    with pytest.raises(JobError, match="256 images in a row"):
        see(outages, ((f"hdfs://nn2/{n}.jpg", FORBIDDEN) for n in range(256)))


def test_an_image_that_arrives_and_one_that_the_store_does_not_have_prove_that_there_is_access() -> None:
    outages = OutageDetector("s3://bucket/photos")
    for answer in (None, MISSING):
        for _ in range(3):
            see(outages, (("s3://bucket/photos/1.jpg", FORBIDDEN) for _ in range(255)))
            see(outages, [("s3://bucket/photos/2.jpg", answer)])


def test_one_dead_web_server_among_many_is_no_reason_to_end_but_a_dead_network_is() -> None:
    outages = OutageDetector("/lists/laion.parquet")
    see(outages, ((f"http://dead.example/{n}.jpg", FAILED) for n in range(3000)))
    with pytest.raises(JobError, match="in a row did not arrive"):
        see(outages, ((f"http://host-{n}.example/1.jpg", FAILED) for n in range(8)))


def test_web_servers_that_failed_before_an_image_arrived_are_not_counted_with_a_later_one() -> None:
    outages = OutageDetector("/lists/laion.parquet")
    for host in range(8):
        see(outages, [(f"http://host-{host}.example/1.jpg", FAILED), ("http://fine.example/1.jpg", None)])
    see(outages, ((f"http://dead.example/{n}.jpg", FAILED) for n in range(3000)))


def test_the_web_server_that_the_input_itself_lies_on_is_a_store_like_any_other() -> None:
    outages = OutageDetector("https://photos.example/all/")
    with pytest.raises(JobError, match=r"https://photos\.example/all/1\.jpg"):
        see(outages, (("https://photos.example/all/1.jpg", FAILED) for _ in range(256)))


def test_a_secret_in_a_uri_is_not_part_of_the_complaint() -> None:
    with pytest.raises(JobError) as caught:
        see(OutageDetector("https://h"), (("https://h/1.jpg?X-Amz-Signature=secret", FORBIDDEN) for _ in range(256)))
    assert "secret" not in str(caught.value)


def test_one_file_of_rows_that_cannot_be_read_is_its_own_affair_and_eight_in_a_row_are_not() -> None:
    outages = OutageDetector("s3://bucket/tables")
    see(outages, ((None, FAILED) for _ in range(1000)))
    for unit in range(1, 7):
        see(outages, [(None, FAILED)], unit=unit)
    with pytest.raises(JobError, match="input file 7"):
        see(outages, [(None, FAILED)], unit=7)


def test_eight_tars_in_a_row_that_give_a_single_failure_each_are_enough() -> None:
    outages = OutageDetector("s3://bucket/tars")
    for unit in range(7):
        see(outages, [(None, FORBIDDEN)], unit=unit)
    see(outages, [(None, None)])
    for unit in range(7):
        see(outages, [(None, FORBIDDEN)], unit=unit)
    with pytest.raises(JobError, match=r"8 images in a row .* since some arrived before; the last is input file 8"):
        see(outages, [(None, FORBIDDEN)], unit=8)


def test_what_failed_in_an_earlier_run_says_nothing_of_today() -> None:
    see(OutageDetector("s3://bucket"), (("s3://bucket/1.jpg", FORBIDDEN) for _ in range(1000)), attempt=2)


def test_what_an_earlier_run_captioned_is_asked_for_where_all_that_is_left_is_refused() -> None:
    """Each run of such a job ended with an error, and none wrote the rows."""
    asked: list[str] = []
    earlier = ["gs://other/1.jpg", "s3://bucket/photos/1.jpg"]
    outages = OutageDetector("s3://bucket/photos", asked.append, earlier=lambda: earlier)
    see(outages, ((f"s3://bucket/archived/{n}.jpg", FORBIDDEN) for n in range(1000)))
    assert asked == ["s3://bucket/photos/1.jpg"] * 3
    refusing = OutageDetector("s3://bucket/photos", lambda _: FORBIDDEN, earlier=lambda: earlier)
    with pytest.raises(JobError, match="256 images in a row"):
        see(refusing, ((f"s3://bucket/archived/{n}.jpg", FORBIDDEN) for n in range(1000)))


@pytest.mark.parametrize("arrived_now", [True, False])
def test_eight_refused_tars_are_recorded_while_one_that_arrived_before_still_arrives(arrived_now: bool) -> None:
    asked: list[str] = []

    def ask(url: str) -> object:
        asked.append(url)
        return Reject(RejectReason.TOO_LARGE, "1 GB, which is there")

    earlier = [] if arrived_now else ["s3://bucket/0.tar"]
    outages = OutageDetector("s3://bucket", ask, "s3://bucket/{}.tar".format, lambda: earlier)
    if arrived_now:
        see(outages, [(None, None)], unit=0)
    for unit in range(1, 20):
        see(outages, [(None, FORBIDDEN)], unit=unit)
    assert asked == ["s3://bucket/0.tar"] * 2
