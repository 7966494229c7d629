"""The README and the guide: commands as a new user types them, tables and numbers against the code."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from captioner import demo
from captioner.config import FitConfig
from captioner.query.views import VIEWS
from captioner.schema import CAPTIONS, FAILURES, TRANSIENT_REASONS, RejectReason
from captioner.tables import lease
from tests.conftest import JobHere
from tests.pages import GUIDE, PAGES, ROOT, shell_blocks
from tests.sample_images import encoded

README = (ROOT / "README.md").read_text()
PROSE = "".join(page.read_text() for page in PAGES)
MAX_LINES = 150
NUM_IMAGES = len(list(demo.images_path().iterdir()))
Run = Callable[..., dict[str, object]]


class Done(NamedTuple):
    """A job that has ended well: its log, its summary, and what its folder held then."""

    log: str
    summary: dict[str, object]
    written: list[str]


def run_job(script: str, *arguments: str, folder: Path) -> Done:
    """Run a job of this repository in a folder, as a user does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / script, *arguments],
        cwd=folder,
        env={**environment, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Done(done.stderr, json.loads(done.stdout.splitlines()[-1]), [f"./{path.name}" for path in folder.iterdir()])


@pytest.fixture
def run_here(first_run: Done, folder: Path, job_here: JobHere, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a job of this repository in the folder of the first run, in this process; returns its summary."""
    monkeypatch.chdir(folder)

    def run(script: str, *arguments: str) -> dict[str, object]:
        done = job_here(script, *arguments)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("first-run")


@pytest.fixture(scope="module")
def first_run(folder: Path) -> Done:
    """The README's first command, in an empty folder."""
    return run_job("caption.py", folder=folder)


def test_the_readme_is_a_door_whose_first_command_is_seen_at_once() -> None:
    assert len(README.splitlines()) <= MAX_LINES
    assert README.splitlines().index("```sh") < 20
    assert shell_blocks(README)[0].strip() == "pip install -c constraints.txt . && python jobs/caption.py"


def test_the_second_block_installs_what_tests_need_and_runs_them() -> None:
    assert shell_blocks(README)[1].strip() == "pip install -c constraints.txt '.[test]' && pytest -n 2 --dist loadfile"


def test_the_first_run_writes_the_folder_that_the_readme_names_and_nothing_else(first_run: Done) -> None:
    assert first_run.written == re.findall(r"^It writes `(.*?)`", README, re.MULTILINE)


def test_the_first_run_captions_every_demo_image(first_run: Done, folder: Path) -> None:
    summary = first_run.summary
    assert (summary["read"], summary["captioned"], summary["failed"]) == (NUM_IMAGES, NUM_IMAGES, 0)
    captions = pd.read_parquet(folder / "captions-demo" / "captions")
    assert sorted(captions["image_id"].str.rpartition("/")[2]) == sorted(p.name for p in demo.images_path().iterdir())


def test_the_first_run_shows_five_captions_beside_their_names_and_says_what_is_next(first_run: Done) -> None:
    assert len(re.findall(r"^  (scene-\S+)\s+(\w.*)$", first_run.log, re.MULTILINE)) == 5
    output = first_run.summary["output"]
    assert f"next      python {ROOT}/jobs/gallery.py {output}" in first_run.log
    assert f"          python {ROOT}/jobs/verify.py {output}" in first_run.log


def test_the_first_command_given_again_says_that_nothing_was_left_and_changes_no_file(
    first_run: Done, folder: Path
) -> None:
    before = files(folder)
    assert any("/captions/part-" in name for name in before)
    again = run_job("caption.py", folder=folder)
    assert f"nothing was left to do: {NUM_IMAGES} images were done already, and no part was changed" in again.log
    assert (again.summary["read"], again.summary["skipped_done"]) == (0, NUM_IMAGES)
    assert files(folder) == before


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Name, time of the last change and bytes of each file."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_the_table_of_the_first_run_is_proven_whole(run_here: Run) -> None:
    assert run_here("verify.py", "captions-demo")["ok"]


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        ([], "captioned", NUM_IMAGES),
        (
            [
                "captions-demo",
                "SELECT count(*) AS n FROM captions WHERE NOT is_repetitive AND clip_score IS NULL",
                "--format",
                "json",
            ],
            "n",
            NUM_IMAGES,
        ),
        (["captions-demo", "--review", "3"], "pictures", 3),
    ],
    ids=["summary", "SQL", "review"],
)
def test_the_table_of_the_first_run_is_summarised_queried_and_reviewed(
    run_here: Run, arguments: list[str], name: str, expected: int
) -> None:
    assert run_here("query.py", *arguments)[name] == expected


def test_the_captions_of_the_first_run_are_measured_against_the_demo_references(run_here: Run) -> None:
    summary = run_here("evaluate.py", "--min-cider", "3")
    assert (summary["images"], summary["matched_by"]) == (NUM_IMAGES, "name")


def test_the_captions_of_the_first_run_become_a_page_with_every_image(run_here: Run, folder: Path) -> None:
    summary = run_here("gallery.py")
    assert summary["pictures"] == NUM_IMAGES
    assert (folder / "captions-demo.html").stat().st_size == summary["size_bytes"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--query", "SELECT * FROM captions WHERE num_tokens < 60 ORDER BY mean_logprob"],
        ["--compare", "captions-demo"],
    ],
    ids=["query", "compare"],
)
def test_a_page_of_chosen_or_compared_captions_has_every_image_too(run_here: Run, flags: list[str]) -> None:
    summary = run_here("gallery.py", "captions-demo", "page.html", *flags)
    assert summary["pictures"] == NUM_IMAGES


def test_the_captioner_of_the_readme_captions_files_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one.jpg", "two.png"):
        (tmp_path / name).write_bytes(encoded("JPEG" if name.endswith("jpg") else "PNG"))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if "from_bundle" in block]
    scope: dict[str, object] = {}
    exec(block, scope)
    scope["captioner"].close()
    assert len(capsys.readouterr().out.splitlines()) == 2


def page(name: str) -> str:
    return (GUIDE / f"{name}.md").read_text()


def rows_of_tables() -> Iterator[list[str]]:
    for line in page("table").splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_every_reason_is_listed_with_whether_it_is_tried_again() -> None:
    listed = {cells[0].strip("` "): cells[-1] for cells in rows_of_tables() if cells[-1] in ("yes", "no")}
    assert listed == {reason: "yes" if reason in TRANSIENT_REASONS else "no" for reason in RejectReason}


def test_every_field_of_the_summary_is_listed(first_run: Done) -> None:
    text = page("caption")
    table = text[text.index("| field | meaning |") : text.index("Exit code 0")]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = set(re.findall(r"`(\w+)`", "".join(first_cells)))
    assert listed - {"prompts"} == set(first_run.summary), "the first run has no --prompts"


def test_the_columns_of_both_tables_are_listed_in_their_order() -> None:
    text = page("table")
    layout = text[text.index("OUTPUT/captions/part-") : text.index("OUTPUT/_run/")]
    words = re.findall(r"[a-z_]+", layout.replace("the kept columns", ""))
    fixed = [name for name in words if name in {*CAPTIONS.names, *FAILURES.names}]
    assert fixed == [*CAPTIONS.names, *FAILURES.names]


def test_every_view_of_a_query_is_listed() -> None:
    text = page("query")
    table = text[text.index("| view | one row |") : text.index("Rows come as a table")]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == VIEWS


def test_every_job_is_shown() -> None:
    shown = set(re.findall(r"python (jobs/\w+\.py)", (ROOT / "jobs" / "README.md").read_text()))
    assert shown == {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py")}


@pytest.mark.parametrize(
    ("sentence", "number"),
    [
        (r"(\d+) s after its last heartbeat", lease.EXPIRY_S),
        (r"it was watched for (\d+) s more", lease.DEFAULT_TIMING.watch_s),
        (r"([\d,]+) images of the validation\s+split", FitConfig().training.num_measured_images),
    ],
)
def test_a_number_in_the_text_is_the_one_in_the_code(sentence: str, number: float) -> None:
    [said] = re.findall(sentence, PROSE)
    assert float(said.replace(",", "")) == number


def test_as_many_lines_of_the_cluster_are_to_be_filled_in_as_the_guide_says() -> None:
    lines = [line for line in (ROOT / "cluster.yaml").read_text().splitlines() if re.search(r":.*FILL-IN.*#", line)]
    assert len(lines) == 4
    assert "Four lines marked `FILL IN` are yours" in page("cluster")
