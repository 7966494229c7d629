"""The README: its first command as a new user types it, and its claims against the code."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from captioner import demo
from captioner.config import CaptionJobConfig
from captioner.rows import CAPTIONS, FAILURES, TRANSIENT_REASONS, RejectReason

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def shell_blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_first_command_stands_in_the_first_twenty_lines() -> None:
    assert README.splitlines().index("```sh") < 20
    assert shell_blocks()[0].strip() == "pip install -c constraints.txt . && python jobs/caption.py"


def test_the_second_block_installs_what_tests_need_and_runs_them() -> None:
    assert shell_blocks()[1].strip() == "pip install -c constraints.txt '.[test]' && pytest"


def first_command(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, ROOT / "jobs" / "caption.py"],
        cwd=folder,
        env={**environment, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("first-run")
    return folder, first_command(folder)


def test_the_first_run_captions_every_demo_image(
    demo_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = demo_run
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    num_images = len(list(demo.images_path().iterdir()))
    assert (summary["read"], summary["captioned"], summary["failed"]) == (num_images, num_images, 0)
    captions = pd.read_parquet(folder / "captions-demo" / "captions")
    assert sorted(captions["image_id"].str.rpartition("/")[2]) == sorted(p.name for p in demo.images_path().iterdir())


def test_the_first_run_shows_five_captions_beside_their_names_and_says_what_is_next(
    demo_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = demo_run
    shown = re.findall(r"^  (scene-\S+)\s+(\w.*)$", done.stderr, re.MULTILINE)
    assert len(shown) == 5
    assert "next      python jobs/verify.py" in done.stderr


def test_the_first_command_given_again_says_that_nothing_was_left_and_changes_no_file(
    demo_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, first = demo_run
    before = files(folder)
    assert any("/captions/part-" in name for name in before)
    again = first_command(folder)
    assert again.returncode == 0, again.stderr
    num_images = json.loads(first.stdout.splitlines()[-1])["read"]
    assert f"nothing was left to do: {num_images} images were done already, and no part was changed" in again.stderr
    summary = json.loads(again.stdout.splitlines()[-1])
    assert (summary["read"], summary["skipped_done"]) == (0, num_images)
    assert files(folder) == before


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Name, time of the last change and bytes of each file."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_the_table_of_the_first_run_is_proven_whole(
    demo_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = demo_run
    command = [sys.executable, ROOT / "jobs" / "verify.py", "captions-demo"]
    proof = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert proof.returncode == 0, proof.stderr
    assert json.loads(proof.stdout)["ok"]


def test_the_table_of_the_first_run_is_summarised_queried_and_reviewed(
    demo_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = demo_run
    num_images = len(list(demo.images_path().iterdir()))
    sql = "SELECT count(*) AS n FROM captions WHERE NOT is_repetitive AND clip_score IS NULL"
    for arguments, name, expected in (
        ([], "captioned", num_images),
        (["captions-demo", sql, "--format", "json"], "n", num_images),
        (["captions-demo", "--review", "3"], "pictures", 3),
    ):
        command = [sys.executable, ROOT / "jobs" / "query.py", *arguments]
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])[name] == expected
    assert (folder / "review.html").stat().st_size > 10_000


def test_the_captions_of_the_first_run_are_measured_against_the_demo_references(
    demo_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = demo_run
    command = [sys.executable, ROOT / "jobs" / "evaluate.py", "--min-cider", "3"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["images"], summary["matched_by"]) == (len(list(demo.images_path().iterdir())), "name")


def test_the_captions_of_the_first_run_become_a_page_with_every_picture(
    demo_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = demo_run
    command = [sys.executable, ROOT / "jobs" / "gallery.py"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["pictures"] == len(list(demo.images_path().iterdir()))
    assert (folder / "captions-demo.html").stat().st_size == summary["size_bytes"]
    sql = "SELECT * FROM captions WHERE num_tokens < 60 ORDER BY mean_logprob"
    for flags in (["--query", sql], ["--compare", "captions-demo"]):
        arguments = ["captions-demo", "page.html", *flags]
        done = subprocess.run(
            [*command, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["pictures"] == summary["pictures"]


def flags_of_the_help_pages() -> set[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pages = [
        subprocess.run([sys.executable, job, "--help"], env=environment, capture_output=True, text=True, check=True)
        for job in sorted((ROOT / "jobs").glob("*.py"))
    ]
    return set(re.findall(r"--[a-z][a-z0-9-]+", "".join(page.stdout for page in pages)))


def test_every_flag_that_the_readme_names_exists() -> None:
    ours = re.sub(r"^ray .*?( -- |$)", "", README, flags=re.MULTILINE)  # what stands before is Ray's
    named = set(re.findall(r"--[a-z][a-z0-9-]+", ours)) - {"--help"}
    assert named - flags_of_the_help_pages() == set()


def rows_of_tables() -> Iterator[list[str]]:
    for line in README.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_every_reason_is_listed_with_whether_it_is_tried_again() -> None:
    listed = {cells[0].strip("` "): cells[-1] for cells in rows_of_tables() if cells[-1] in ("yes", "no")}
    assert listed == {reason: "yes" if reason in TRANSIENT_REASONS else "no" for reason in RejectReason}


def test_every_field_of_the_summary_is_listed(demo_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = demo_run
    table = README[README.index("| field | meaning |") : README.index("Exit code 0")]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", "".join(first_cells))) == set(json.loads(done.stdout.splitlines()[-1]))


def test_the_columns_of_both_tables_are_listed_in_their_order() -> None:
    layout = README[README.index("OUTPUT/captions/part-") : README.index("OUTPUT/_run/")]
    words = re.findall(r"[a-z_]+", layout.replace("the kept columns", ""))
    fixed = [name for name in words if name in {*CAPTIONS.names, *FAILURES.names}]
    assert fixed == [*CAPTIONS.names, *FAILURES.names]


def test_every_path_that_the_readme_names_exists() -> None:
    for path in re.findall(r"(?:jobs|captioner|tests)/[\w./]+\w", README):
        assert (ROOT / path).exists(), path


def test_the_readme_names_the_default_output() -> None:
    assert CaptionJobConfig().output == "captions-demo"
