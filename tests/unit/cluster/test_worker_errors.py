"""An error of a worker is the driver's, of the same type and in the same words, though Ray hands on only its text."""

import pickle
from unittest.mock import Mock

import pytest

from captioner.cluster.fit_reports import FitReports
from captioner.cluster.restarts import Start
from captioner.cluster.worker_errors import WorkerError, reporting_errors
from captioner.cluster.worker_registry import WorkerRegistry
from captioner.errors import CaptionerError, ConfigError, EngineError, JobError, OutputError

DISK_FULL, NO_MEMORY = WorkerError("JobError", "the disk is full"), WorkerError("JobError", "no memory")


class _OwnKindOfError(ConfigError):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("--slots is 2; expected at least 4"), ConfigError),
        (OutputError("these differ:\n  model: a there, b now"), OutputError),
        (EngineError("the engine stopped"), EngineError),
        (_OwnKindOfError("not in the tree"), ConfigError),
    ],
)
def test_an_error_of_ours_keeps_its_type_and_its_words(error: CaptionerError, kind: type) -> None:
    raised = pickle.loads(pickle.dumps(WorkerError.of(error))).as_exception()
    assert type(raised) is kind
    assert str(raised) == str(error)


def test_any_other_error_becomes_a_job_error_that_names_it() -> None:
    raised = WorkerError.of(OSError("disk full")).as_exception()
    assert type(raised) is JobError
    assert str(raised) == "the job stopped: OSError: disk full"


def test_an_error_is_reported_before_it_is_raised() -> None:
    report = Mock()
    with pytest.raises(OSError, match="disk full"), reporting_errors(report):
        raise OSError("disk full")
    report.assert_called_once_with(WorkerError("JobError", "the job stopped: OSError: disk full"))


def test_the_last_error_counts_and_none_of_a_worker_that_has_started_again() -> None:
    registry = WorkerRegistry()
    assert registry.error() is None
    registry.note_error("worker 1", DISK_FULL)
    registry.note_error("worker 2", NO_MEMORY)
    assert registry.error() == NO_MEMORY
    registry.note_start("worker 2", "CaptionWorker", Start(process="1", node="n"), {})
    assert registry.error() == DISK_FULL


def test_an_error_of_a_task_is_void_once_a_later_try_of_it_has_succeeded() -> None:
    registry = WorkerRegistry()
    registry.note_error("task 1", DISK_FULL)
    registry.note_error("task 2", NO_MEMORY)
    registry.note_success("task 2")
    assert registry.error() == DISK_FULL
    registry.note_success("task 1")
    assert registry.error() is None


def test_an_error_that_all_workers_of_a_fit_meet_is_known_once_the_last_has_met_it() -> None:
    reports = FitReports()
    reports.note_shared_error(DISK_FULL, rank=0, num_workers=2)
    reports.note_shared_error(NO_MEMORY, rank=1, num_workers=2)
    assert reports.shared_error() is None
    reports.note_shared_error(DISK_FULL, rank=1, num_workers=2)
    assert reports.shared_error() == reports.error() == DISK_FULL


def test_a_worker_of_a_fit_that_starts_again_has_no_error() -> None:
    reports = FitReports()
    reports.note_error("rank 0", DISK_FULL)
    assert reports.error() == DISK_FULL
    reports.add_start("rank 0", "fit worker=0")
    assert reports.error() is None
    assert (reports.take_starts(), reports.take_starts()) == (["fit worker=0"], [])
