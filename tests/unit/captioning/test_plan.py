"""The plan of a job: what is left, what is refused, what a dry run leaves behind."""

import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.captioning.job import DEMO_MODEL, resolve
from captioner.captioning.plan import Plan, plan_job
from captioner.config import CaptionJobConfig, DecodingConfig, InputConfig, ModelConfig, ResourceConfig
from captioner.errors import BundleError, CaptionerError, ConfigError, InputError, OutputError
from captioner.inputs import Limits, Unit
from captioner.inputs.blocks import positions_left
from captioner.inputs.slices import BLOCK_ROWS, cut, listing_rows
from captioner.schema import RejectReason, captioned_schema, row_key
from captioner.storage import LocalStore
from captioner.storage.faults import Fault, StoreError
from captioner.tables import CaptionTable, KeySet, Lease, Stamp, audit
from captioner.tables.lease_file import encoded as encoded_lease
from captioner.tables.lease_file import new_holder
from tests.bundles import save_tiny_bundle
from tests.sample_images import encoded


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def config(tmp_path: Path, bundle: str) -> CaptionJobConfig:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(600):
        (images / f"{number:04d}.jpg").touch()
    return CaptionJobConfig(input_path=str(images), output=str(tmp_path / "out"), model=ModelConfig(model=bundle))


def test_only_the_demo_images_have_a_model_by_default(config: CaptionJobConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model is missing; expected a bundle or a LLaVA checkpoint") as error:
        plan_job(replace(config, model=ModelConfig()))
    assert "the demo model knows only drawn shapes: what it says of any other image is wrong" in str(error.value)
    assert not (tmp_path / "out").exists()
    demo = plan_job(CaptionJobConfig(output=str(tmp_path / "demo"), dry_run=True))
    assert not any(line.startswith("beware") for line in demo.lines())
    assert "prompt    '<|begin_of_text|>' <image>" in list(demo.lines()), "token by token"


def test_the_demo_model_is_told_of_before_it_captions_other_images(config: CaptionJobConfig) -> None:
    plan = plan_job(replace(config, model=ModelConfig(model="demo"), dry_run=True))
    assert f"beware    {DEMO_MODEL}" in list(plan.lines())


def finish(plan: Plan, keys: range, reason: str | None = None, attempt: int = 1) -> None:
    """Write rows as a run would: captions, or failures of one reason."""
    caption = {"caption": "x", "num_tokens": 1, "finish_reason": "stop", "mean_logprob": 0.0, "min_logprob": 0.0}
    caption["is_repetitive"] = False
    size = {"width": 1, "height": 1, "size_bytes": 1}
    outcome = {**caption, **size} if reason is None else {"reason": reason, "detail": "why"}
    rows = [{"key": key, "image_id": str(key), "attempt": attempt, **outcome} for key in keys]
    plan.table.write(pa.Table.from_pylist(rows, captioned_schema()), Stamp(f"run-{attempt}", plan.table.digest))


@contextmanager
def unreadable(*names: str, reason: RejectReason = RejectReason.FORBIDDEN) -> Iterator[None]:
    """Within the block, the store refuses to open files of these names."""
    open_file = LocalStore.open_unbuffered

    def refuse(store: LocalStore, url: str) -> Any:
        if Path(url).name in names:
            raise StoreError(Fault(reason, "refused", is_transient=reason == RejectReason.FETCH_FAILED))
        return open_file(store, url)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "open_unbuffered", refuse)
        yield


def left(plan: Plan) -> list[int]:
    """Positions that the plan's slices read, in the (one) unit of the input."""
    read = [table.column("key").to_pylist() for piece in plan.slices for table in plan.reader.read(piece)]
    return [key for keys in read for key in keys]


def test_a_new_job_reads_every_image_once_in_slices_of_one_decode_call(config: CaptionJobConfig) -> None:
    plan = plan_job(config)
    assert [piece.num_left for piece in plan.slices] == [256, 256, 88]
    assert left(plan) == list(range(600))
    assert (plan.num_left, plan.num_skipped) == (600, 0)


def test_a_slash_behind_a_local_folder_makes_no_other_input(config: CaptionJobConfig) -> None:
    finish(plan_job(config), range(300))
    assert plan_job(replace(config, input_path=config.input_path + "/")).num_skipped == 300


def test_rows_in_the_table_are_left_out_and_whole_slices_are_not_read(config: CaptionJobConfig) -> None:
    finish(plan_job(config), range(300))
    plan = plan_job(config)
    assert [(piece.start, piece.stop) for piece in plan.slices] == [(256, 512), (512, 600)]
    assert left(plan) == list(range(300, 600))
    assert (plan.num_left, plan.num_skipped) == (300, 300)


def test_a_finished_job_has_nothing_left(config: CaptionJobConfig) -> None:
    finish(plan_job(config), range(600))
    plan = plan_job(config)
    assert (plan.slices, plan.num_left, plan.num_skipped) == ([], 0, 600)


@pytest.mark.parametrize(
    ("retry", "reason", "expected"),
    [
        ("transient", "fetch_failed", 10),
        ("transient", "corrupt", 0),
        ("all", "corrupt", 10),
        ("none", "fetch_failed", 0),
        ("corrupt,missing", "corrupt", 10),
        ("corrupt,missing", "fetch_failed", 0),
    ],
)
def test_failures_are_tried_again_as_asked_and_say_which_attempt_it_is(
    config: CaptionJobConfig, retry: str, reason: str, expected: int
) -> None:
    first = plan_job(config)
    finish(first, range(590))
    finish(first, range(590, 600), reason=reason)
    plan = plan_job(replace(config, retry_failures=retry))
    tables = [table for piece in plan.slices for table in plan.reader.read(piece)]
    attempts = [attempt for table in tables for attempt in table.column("attempt").to_pylist()]
    assert attempts == [2] * expected


def test_tasks_over_a_listing_grow_with_the_job_up_to_a_bound() -> None:
    blocks = {num: listing_rows(num) // BLOCK_ROWS for num in (0, 600, 255_999, 256_000, 1_000_000, 10**7, 10**10)}
    assert list(blocks.values()) == [1, 1, 1, 2, 7, 8, 8]
    unit = Unit(ordinal=0, kind="listing", path="x", name="x", num_rows=1_000_000, size_bytes=None)
    finished = np.zeros(1_000_000, bool)
    step = listing_rows(1_000_000)
    finished[: step - 1], finished[step : 3 * step] = True, True
    slices = list(cut(unit, 1_000_000, lambda start, stop: finished[start:stop], {step - 1: 1, 3 * step: 2}, step))
    assert [piece.start for piece in slices[:3]] == [0, 3 * step, 4 * step]
    assert [dict(piece.attempts) for piece in slices[:3]] == [{step - 1: 1}, {3 * step: 2}, {}]
    assert sum(piece.num_left or 0 for piece in slices) == 1_000_000 - (step - 1) - 2 * step


def test_a_larger_job_has_larger_slices_and_a_limit_makes_it_smaller(config: CaptionJobConfig, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"s3://bucket/{number}.jpg\n" for number in range(256_000)))
    config = replace(config, input_path=str(tmp_path / "list.txt"))
    assert max(piece.num_left or 0 for piece in plan_job(config).slices) == 512
    assert [piece.num_left for piece in plan_job(replace(config, input=InputConfig(limit=300))).slices] == [256, 44]


def test_the_attempts_of_a_unit_are_gone_through_once_for_all_of_its_slices() -> None:
    class Counted(dict[int, int]):
        num_reads = 0

        def items(self) -> Any:
            Counted.num_reads += 1
            return super().items()

        __iter__ = None  # type: ignore[assignment]

    unit = Unit(ordinal=0, kind="listing", path="x", name="x", num_rows=1000, size_bytes=None)
    attempts = Counted({0: 1, 255: 2, 256: 3, 999: 4})
    slices = list(cut(unit, 1000, lambda start, stop: np.zeros(stop - start, bool), attempts))
    assert [dict(piece.attempts) for piece in slices] == [{0: 1, 255: 2}, {256: 3}, {}, {999: 4}]
    assert Counted.num_reads == 1


def test_an_unknown_reason_to_retry_is_refused(config: CaptionJobConfig) -> None:
    with pytest.raises(ConfigError, match="--retry-failures names corupt; expected transient, all, none, or some of"):
        plan_job(replace(config, retry_failures="corupt"))


@pytest.mark.parametrize("limit", [1, 256, 300, 600, 5000])
def test_a_limit_takes_the_first_images_and_a_later_run_the_others(config: CaptionJobConfig, limit: int) -> None:
    plan = plan_job(replace(config, input=InputConfig(limit=limit)))
    taken = min(limit, 600)
    assert left(plan) == list(range(taken))
    finish(plan, range(taken))
    assert plan_job(replace(config, input=InputConfig(limit=limit))).num_left == 0
    assert left(plan_job(config)) == list(range(taken, 600))


def test_a_dry_run_of_a_new_job_writes_nothing(config: CaptionJobConfig) -> None:
    plan = plan_job(replace(config, dry_run=True))
    assert plan.num_left == 600
    assert "images    600 in 1 units" in list(plan.lines())
    assert not Path(config.output).exists()


def test_a_wrong_input_leaves_nothing_behind(config: CaptionJobConfig, tmp_path: Path) -> None:
    with ExitStack() as held, pytest.raises(InputError, match="does not exist"):
        plan_job(
            replace(config, input_path=str(tmp_path / "nowhere")),
            take_lease=lambda table: held.enter_context(table.take_lease("caption")),
        )
    assert not Path(config.output).exists()
    assert plan_job(config).num_left == 600


def test_a_wrong_model_is_refused_before_the_input_is_listed(config: CaptionJobConfig, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no model at"):
        plan_job(replace(config, model=ModelConfig(model=str(tmp_path / "nowhere"))))
    assert not Path(config.output).exists()


def test_a_caption_that_cannot_fit_the_context_is_refused_with_the_sum(config: CaptionJobConfig) -> None:
    with pytest.raises(
        ConfigError, match=r"--max-new-tokens is 511; .* reads 512 tokens, .* take 2: expected at most 510"
    ):
        plan_job(replace(config, decoding=DecodingConfig(max_new_tokens=511)))


def test_slots_that_hold_less_than_one_image_are_refused(config: CaptionJobConfig) -> None:
    with pytest.raises(ConfigError, match="--slots is 2; expected at least 4, the beams or captions of one image"):
        replace(config, decoding=DecodingConfig(num_beams=4), resources=ResourceConfig(slots="2"))


def test_another_input_into_the_same_output_is_refused_and_keeps_the_listing(
    config: CaptionJobConfig, tmp_path: Path
) -> None:
    plan_job(config)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.jpg").touch()
    with pytest.raises(OutputError, match=f"input: {config.input_path} there, {other} now"):
        plan_job(replace(config, input_path=str(other)))
    assert plan_job(config).num_left == 600


def test_options_of_a_store_stay_out_of_what_is_written_down(config: CaptionJobConfig) -> None:
    plan_job(replace(config, input=InputConfig(storage_options={"secret": "hunter2"})))
    written = b"".join(path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file())
    assert b"hunter2" not in written


@pytest.mark.parametrize(
    ("input_path", "output", "expected"),
    [
        ("s3://a/in", "s3://a/out", {"key": "k"}),
        ("/in", "s3://a/out", {"key": "k"}),
        ("s3://a/in", "/out", {}),
        ("s3://a/in", "gs://b/out", {}),
    ],
)
def test_the_output_uses_the_inputs_options_where_they_can_be_meant_for_it(
    input_path: str, output: str, expected: dict[str, object]
) -> None:
    access = InputConfig(storage_options={"key": "k"})
    job = resolve(CaptionJobConfig(input_path=input_path, output=output, input=access))
    assert job.output.storage_options == expected
    other = replace(access, output_storage_options={"key": "other"})
    job = resolve(CaptionJobConfig(input_path=input_path, output=output, input=other))
    assert job.output.storage_options == {"key": "other"}


def test_a_part_is_a_64th_of_the_work_within_limits(config: CaptionJobConfig) -> None:
    assert plan_job(config).rows_per_part == 256
    assert plan_job(replace(config, resources=ResourceConfig(rows_per_part=7))).rows_per_part == 7


def test_a_part_of_uncounted_tars_is_a_64th_of_what_their_size_suggests(
    config: CaptionJobConfig, tmp_path: Path
) -> None:
    tar_of_images(tmp_path / "0.tar", num_images=4)
    plan = plan_job(replace(config, input_path=str(tmp_path / "0.tar")))
    assert plan.rows_per_part == 256
    [piece] = plan.slices
    large = replace(piece, unit=replace(piece.unit, size_bytes=4 << 30))
    assert replace(plan, slices=[large]).rows_per_part == 1024
    assert replace(plan, slices=[large, large]).rows_per_part == 2048
    unknown = replace(piece, unit=replace(piece.unit, size_bytes=None))
    assert replace(plan, slices=[unknown] * 8).rows_per_part == 2048
    assert replace(plan, slices=[unknown] * 1000).rows_per_part == 16_384


def tar_of_images(path: Path, num_images: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(num_images):
            info = tarfile.TarInfo(f"{number:04d}.jpg")
            info.size = 1
            tar.addfile(info, BytesIO(b"x"))


def test_a_limit_counts_into_uncounted_tars(config: CaptionJobConfig, tmp_path: Path) -> None:
    for shard in range(3):
        tar_of_images(tmp_path / f"{shard}.tar", num_images=4)
    plan = plan_job(replace(config, input_path=str(tmp_path / "{0..2}.tar"), input=InputConfig(limit=6)))
    assert [(piece.unit.ordinal, piece.stop) for piece in plan.slices] == [(0, 4), (1, 2)]
    assert plan.num_left == 6


def test_a_tar_is_counted_when_it_was_read_to_its_end_and_not_before(config: CaptionJobConfig, tmp_path: Path) -> None:
    tar_of_images(tmp_path / "0.tar", num_images=2 * BLOCK_ROWS + 2)
    config = replace(config, input_path=str(tmp_path / "0.tar"))
    plan = plan_job(config)
    assert plan.num_left is None
    tables = plan.reader.read(plan.slices[0])
    assert next(tables).num_rows == BLOCK_ROWS
    finish(plan, range(BLOCK_ROWS))
    assert plan_job(config).num_left is None
    list(tables)
    assert plan_job(config).num_left == BLOCK_ROWS + 2


def test_a_store_that_drops_a_tar_that_is_half_done_leaves_the_rest_of_it_for_another_run(
    config: CaptionJobConfig, tmp_path: Path
) -> None:
    tar_of_images(tmp_path / "0.tar", num_images=10)
    config = replace(config, input_path=str(tmp_path / "0.tar"))
    finish(plan_job(config), range(5))

    with unreadable("0.tar", reason=RejectReason.FETCH_FAILED):
        assert left(plan_job(config)) == [5]
    plan = plan_job(config)
    assert plan.num_left is None
    assert left(plan) == [5, 6, 7, 8, 9]
    with unreadable("0.tar", reason=RejectReason.FETCH_FAILED):
        assert left(plan_job(config)) == [5, 6, 7, 8, 9]  # by now it is known how many there are


def test_a_run_that_is_to_stop_reads_no_further_and_the_next_one_does(config: CaptionJobConfig) -> None:
    with ExitStack() as held:
        plan = plan_job(config, take_lease=lambda table: held.enter_context(table.take_lease("caption")))
        assert plan.stop_file is not None
        tables = plan.reader.read(plan.slices[0])
        next(tables)
        plan.stop_file.write()
        assert list(tables) == left(plan) == []
    assert len(left(plan_job(config))) == 600


def images_in(folder: Path, *seeds: int) -> str:
    folder.mkdir()
    for seed in seeds:
        (folder / f"{seed}.jpg").write_bytes(encoded(seed=seed))
    return str(folder)


def run_folder_of(config: CaptionJobConfig) -> dict[str, bytes]:
    files = (path for path in Path(config.output, "_run").rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in files if path.parent.name != "lease"}


def test_a_job_that_waited_for_the_lease_changes_nothing_of_another_input_that_was_frozen_meanwhile(
    config: CaptionJobConfig, tmp_path: Path
) -> None:
    ours = replace(config, input_path=images_in(tmp_path / "a", 1))
    theirs = replace(config, input_path=images_in(tmp_path / "b", 2, 3))
    with ExitStack() as held:

        def take(table: CaptionTable) -> Lease:  # the other job comes and goes while this one's lease is on its way
            with table.take_lease("caption") as other:
                plan_job(theirs, take_lease=lambda _: other)
            return held.enter_context(table.take_lease("caption"))

        before: dict[str, bytes] = {}
        with pytest.raises(OutputError, match="holds captions of another job"):
            plan_job(ours, take_lease=lambda table: (take(table), before.update(run_folder_of(config)))[0])
        assert run_folder_of(config) == before
    assert plan_job(theirs).num_left == 2


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_job_that_loses_its_lease_while_it_freezes_its_input_publishes_nothing_more(
    config: CaptionJobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    ours = replace(config, input_path=images_in(tmp_path / "a", 1))
    theirs = replace(config, input_path=images_in(tmp_path / "b", 2, 3))
    checks: list[dict[str, bytes]] = []
    check = Lease.check

    def lose_it(lease: Lease) -> None:
        if len(checks) == at - 1:
            other = Lease(lease.store, lease.run_folder, lease.url.replace("000001", "000002"), new_holder("caption"))
            lease.store.write_atomic(other.url, encoded_lease(other.holder))
            plan_job(theirs, take_lease=lambda _: other)
        checks.append(run_folder_of(config))
        check(lease)

    monkeypatch.setattr(Lease, "check", lambda lease: lose_it(lease) if lease.url.endswith("1.json") else check(lease))
    with ExitStack() as held, pytest.raises(CaptionerError, match=r"another job took over|captions of another job"):
        plan_job(ours, take_lease=lambda table: held.enter_context(table.take_lease("caption")))
    assert len(checks) == at
    final = {name: data for name, data in run_folder_of(config).items() if not name.endswith(".tmp")}
    assert final == {name: data for name, data in checks[-1].items() if not name.endswith(".tmp")}


def test_parts_whose_frozen_input_is_gone_are_not_continued_with_another(config: CaptionJobConfig) -> None:
    finish(plan_job(config), range(5))
    Path(config.output, "_run", "units.parquet").unlink()
    with pytest.raises(OutputError, match=r"1 parts but no _run/units.parquet, which says what their keys mean"):
        plan_job(config)


def test_a_limit_counts_a_tar_once(config: CaptionJobConfig, tmp_path: Path) -> None:
    tar_of_images(tmp_path / "0.tar", num_images=4)
    config = replace(config, input_path=str(tmp_path / "0.tar"), input=InputConfig(limit=2))
    assert plan_job(config).num_left == 2
    with unreadable("0.tar"):
        assert plan_job(config).num_left == 2


def test_a_limit_over_a_tar_that_the_store_drops_counts_nothing(config: CaptionJobConfig, tmp_path: Path) -> None:
    tar_of_images(tmp_path / "0.tar", num_images=4)
    config = replace(config, input_path=str(tmp_path / "0.tar"))
    plan_job(config)
    limited = replace(config, input=InputConfig(limit=3))
    (tmp_path / "0.tar").rename(tmp_path / "away.tar")
    assert plan_job(limited).num_left == 1
    (tmp_path / "away.tar").rename(tmp_path / "0.tar")
    assert plan_job(limited).num_left == 3


def test_an_uncounted_tar_is_expected_to_hold_what_its_bytes_can(config: CaptionJobConfig, tmp_path: Path) -> None:
    tar_of_images(tmp_path / "0.tar", num_images=4)
    tar_of_images(tmp_path / "1.tar", num_images=4)
    config = replace(config, input_path=str(tmp_path / "{0..1}.tar"))
    plan = plan_job(config)
    size_bytes = (tmp_path / "0.tar").stat().st_size
    assert plan.num_expected(size_bytes / 8) == 16
    assert plan.num_expected(1e9) == 2  # a tar has one at least
    list(plan.reader.read(plan.slices[0]))
    assert plan_job(config).num_expected(size_bytes / 8) == 4 + 8


def test_a_dry_run_can_be_read_from_the_folder_that_it_was_given(config: CaptionJobConfig, tmp_path: Path) -> None:
    plan = plan_job(replace(config, dry_run=True), scratch=str(tmp_path / "scratch"))
    assert left(plan) == list(range(600))
    assert not (tmp_path / "out").exists()


def test_finished_units_are_not_read_again_even_where_they_are_gone(config: CaptionJobConfig, tmp_path: Path) -> None:
    for shard in range(3):
        pq.write_table(pa.table({"image": [b"x"] * 4}), tmp_path / f"{shard}.parquet")
    config = replace(config, input_path=str(tmp_path / "{0..2}.parquet"))
    finish(plan_job(config), range(4))
    finish(plan_job(config), range(row_key(2, 0), row_key(2, 4)))
    (tmp_path / "0.parquet").unlink()
    (tmp_path / "2.parquet").write_bytes(b"another file")
    plan = plan_job(config)
    assert left(plan) == list(range(row_key(1, 0), row_key(1, 4)))
    assert plan.num_skipped == 8


def test_finished_tars_are_neither_opened_nor_counted_again(config: CaptionJobConfig, tmp_path: Path) -> None:
    tar_of_images(tmp_path / "0.tar", num_images=4)
    tar_of_images(tmp_path / "1.tar", num_images=2)
    config = replace(config, input_path=str(tmp_path / "{0..1}.tar"))
    plan = plan_job(config)
    list(plan.reader.read(plan.slices[0]))
    finish(plan, range(4))
    (tmp_path / "0.tar").unlink()
    for limited in (config, replace(config, input=InputConfig(limit=5))):
        assert [piece.unit.ordinal for piece in plan_job(limited).slices] == [1]


def test_planning_a_finished_job_again_changes_no_file_of_the_table(config: CaptionJobConfig) -> None:
    finish(plan_job(config), range(590))
    finish(plan_job(config), range(590, 600), reason="corrupt")

    def state() -> dict[str, tuple[int, bytes]]:
        files = (path for path in Path(config.output).rglob("*") if path.is_file())
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    assert plan_job(config).slices == []
    assert state() == before


def test_rows_that_stand_twice_are_dropped_by_the_run_that_finds_them(config: CaptionJobConfig) -> None:
    plan = plan_job(config)
    finish(plan, range(300))
    finish(plan, range(200, 400))
    assert plan_job(replace(config, dry_run=True)).done.num_duplicates == 100
    with ExitStack() as held:
        again = plan_job(config, take_lease=lambda table: held.enter_context(table.take_lease("caption")))
    assert (again.done.num_duplicates, again.done.num_captioned) == (0, 400)
    assert sum(pq.read_metadata(part).num_rows for part in again.table.parts("captions")) == 400


def test_attempts_are_counted_over_several_runs_and_a_success_ends_them(config: CaptionJobConfig) -> None:
    def attempt_of(plan: Plan) -> list[int]:
        tables = [table for piece in plan.slices for table in plan.reader.read(piece)]
        return [attempt for table in tables for attempt in table.column("attempt").to_pylist()]

    finish(plan_job(config), range(599))
    for attempt in (1, 2, 3):
        plan = plan_job(config)
        assert attempt_of(plan) == [attempt]
        finish(plan, range(599, 600), reason="fetch_failed", attempt=attempt)
    assert plan_job(replace(config, retry_failures="none")).slices == []
    plan = plan_job(config)
    assert attempt_of(plan) == [4]
    finish(plan, range(599, 600), attempt=4)
    assert attempt_of(plan_job(replace(config, retry_failures="all"))) == []
    for attempt in (1, 2, 3, 4):
        plan.table.record(f"run-{attempt}", {})
    found, _ = audit(plan.table, plan.frozen)
    assert (found.is_whole, found.captioned, found.failed) == (True, 600, 0)
    assert sum(pq.read_metadata(part).num_rows for part in plan.table.parts("failures")) == 3


def test_a_refresh_captions_what_is_new_and_says_so(config: CaptionJobConfig) -> None:
    finish(plan_job(config), range(600))
    (Path(config.input_path) / "0000-new.jpg").touch()
    assert plan_job(config).slices == []
    dry = plan_job(replace(config, refresh=True, dry_run=True))
    assert dry.num_left == 1
    plan = plan_job(replace(config, refresh=True))
    assert "refresh   1 new images" in list(plan.lines())
    assert left(plan) == [row_key(1, 0)]
    assert left(plan_job(config)) == [row_key(1, 0)]


def rows_of(path: Path, num_rows: int) -> None:
    pq.write_table(pa.table({"image": [b"x"] * num_rows}), path)


@pytest.mark.parametrize("is_refreshed", [False, True])
def test_a_parquet_file_that_was_forbidden_gives_its_rows_once_it_is_allowed(
    config: CaptionJobConfig, tmp_path: Path, is_refreshed: bool
) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    for name, num_rows in (("a", 3), ("b", 4), ("c", 0), ("d", 2)):
        rows_of(tables / f"{name}.parquet", num_rows)
    config = replace(config, input_path=str(tables), input=InputConfig(image_column="image"))
    with unreadable("b.parquet", "c.parquet"):
        first = plan_job(config)
        assert left(first) == [0, 1, 2, row_key(1, 0), row_key(2, 0), row_key(3, 0), row_key(3, 1)]
    first.table.record("run-1", {})
    finish(first, range(3))
    finish(first, range(row_key(3, 0), row_key(3, 2)))
    for unit in (1, 2):
        finish(first, range(row_key(unit, 0), row_key(unit, 1)), "forbidden")
    with unreadable("b.parquet", "c.parquet"):
        assert left(plan_job(config)) == [row_key(1, 0), row_key(2, 0)], "what is still forbidden is tried again"

    assert plan_job(replace(config, dry_run=True)).num_left == 5
    second = plan_job(replace(config, refresh=is_refreshed))
    assert left(second) == [*range(row_key(1, 0), row_key(1, 4)), row_key(2, 0)]
    [table, empty] = [table for piece in second.slices for table in second.reader.read(piece)]
    assert table.column("attempt").to_pylist() == [2, 1, 1, 1]
    assert (empty.column("attempt").to_pylist(), empty.column("reason").to_pylist()) == ([2], ["empty"])
    second.table.record("run-2", {})
    finish(second, range(row_key(1, 0), row_key(1, 4)), attempt=2)
    finish(second, range(row_key(2, 0), row_key(2, 1)), "empty", attempt=2)
    third = plan_job(config)
    assert (third.num_left, third.frozen.num_images) == (0, 10)
    proof, _ = audit(third.table, third.frozen)
    assert (proof.is_whole, proof.captioned, proof.failed_by_reason) == (True, 9, {"empty": 1})


@pytest.mark.parametrize(
    ("later", "reason"),
    [
        (pa.table({"image": [b"x"], "note": [1]}), "unsupported"),
        (pa.table({"photo": [b"x"], "note": ["one"]}), "unsupported"),
        (b"no Parquet", "corrupt"),
    ],
)
def test_a_file_that_is_allowed_at_last_and_does_not_fit_stays_one_row_with_the_reason(
    config: CaptionJobConfig, tmp_path: Path, later: pa.Table | bytes, reason: str
) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    pq.write_table(pa.table({"image": [b"x"], "note": ["one"]}), tables / "a.parquet")
    (tables / "b.parquet").touch()
    config = replace(config, input_path=str(tables), input=InputConfig(image_column="image", keep_columns=("note",)))
    with unreadable("b.parquet"):
        first = plan_job(config)
    finish(first, range(row_key(1, 0), row_key(1, 1)), "forbidden")
    if isinstance(later, bytes):
        (tables / "b.parquet").write_bytes(later)
    else:
        pq.write_table(later, tables / "b.parquet")
    second = plan_job(config)
    read = [table for piece in second.slices for table in second.reader.read(piece)]
    assert [reason for table in read for reason in table.column("reason").to_pylist()] == [None, reason]
    assert left(second) == [0, row_key(1, 0)]


def test_a_file_that_says_it_has_billions_of_rows_takes_little_memory_to_plan_and_to_read() -> None:
    """A byte a row here and eight in each read task were 18 GB."""
    num_rows, keys = 1 << 31, KeySet()
    unit = Unit(ordinal=0, kind="parquet", path="x", name="x", num_rows=num_rows, size_bytes=743)
    keys.add(np.array([5, num_rows - 1]))
    tracemalloc.start()
    slices = list(cut(unit, num_rows, lambda start, stop: keys.positions(0, stop, start), {}))
    last = slices[-1]
    left = positions_left(num_rows, last.done, Limits(start_at=last.start, stop_at=last.stop))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(slices), left[0], left[-1]) == (500, last.start, num_rows - 2)
    assert peak < 100 << 20


def test_a_row_that_no_tar_can_have_is_refused(config: CaptionJobConfig, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    config = replace(config, input_path=str(tmp_path / "s.tar"))
    finish(plan_job(config), range((1 << 32) - 1, 1 << 32), reason="corrupt")
    with pytest.raises(OutputError, match=r"row 4,294,967,295 of s.tar; expected at most 67,108,864 rows of a tar"):
        plan_job(config)
