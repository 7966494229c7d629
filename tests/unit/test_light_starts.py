"""What can be said without a model in memory is said without torch, transformers and Ray."""

import subprocess
import sys
from pathlib import Path

import pytest

import captioner
from tests.caption_tables import add_part, begin_table, caption_row, failure_row, write_images

JOBS = Path(captioner.__file__).parent.parent / "jobs"
HEAVY = {"torch", "ray", "transformers"}
"""Packages that take a second or more to import."""


@pytest.mark.parametrize("script", sorted(JOBS.glob("*.py")), ids=lambda path: path.stem)
def test_help_costs_no_import_of_torch_or_ray_or_of_a_store(script: Path) -> None:
    assert not (HEAVY | {"aiohttp", "botocore"}) & modules_after(script, ["--help"])


def test_a_wrong_flag_costs_no_import_of_torch_or_ray() -> None:
    assert not HEAVY & modules_after(JOBS / "caption.py", ["--no-such-flag"])


def test_a_plan_and_a_refusal_bring_neither_torch_nor_ray(tmp_path: Path) -> None:
    commands = [["demo", str(tmp_path / "out"), "--dry-run"], ["/nowhere", str(tmp_path / "out"), "--model", "demo"]]
    commands += [["demo", str(tmp_path / "out"), "--model", "/nowhere"], ["demo", "out", "--max-new-tokens", "1000"]]
    (prompts := tmp_path / "prompts.yaml").write_text("caption: a\nb: {text: x, choice: [y, z], max_new_tokens: 4}")
    commands.append([*commands[0], "--prompts", str(prompts)])
    for arguments in commands:
        assert not HEAVY & modules_after(JOBS / "caption.py", arguments), arguments
    assert not HEAVY & modules_after(JOBS / "plan.py", ["/nowhere", "--model", "demo"])


def test_labels_that_are_not_there_are_refused_without_torch_and_ray(tmp_path: Path) -> None:
    arguments = ["/nowhere.csv", str(tmp_path / "out"), "--model", "demo"]
    assert not HEAVY & modules_after(JOBS / "fit_projector.py", arguments)


@pytest.mark.parametrize(
    ("script", "more"),
    [("verify", []), ("query", []), ("query", ["SELECT count(*) FROM captions"]), ("gallery", ["page.html"])],
)
def test_a_job_that_reads_a_table_brings_neither_torch_nor_ray(tmp_path: Path, script: str, more: list[str]) -> None:
    url = str(tmp_path / "out")
    table, _ = begin_table(url, str(write_images(tmp_path / "images", 2)))
    add_part(table, [caption_row(0, "a", "a dog"), failure_row(1, "c", "corrupt")])
    more = [str(tmp_path / word) if word.endswith(".html") else word for word in more]
    assert not HEAVY & modules_after(JOBS / f"{script}.py", [url, *more])


def test_a_process_that_decodes_images_brings_no_pandas_no_store_and_no_flags(tmp_path: Path) -> None:
    """Each worker starts some, and pandas alone took half of a start."""
    (script := tmp_path / "decode.py").write_text(
        "import io\nfrom captioner.config import ImageConfig\n"
        "from captioner.images.child import serve\nfrom captioner.images.preprocessing import Preprocessing\n"
        "from captioner.images.reader import Decoded, decode\nfrom tests.sample_images import encoded\n"
        "for kind in ('JPEG', 'PNG'):\n"
        "    assert isinstance(decode(encoded(kind), Preprocessing(), ImageConfig()), Decoded)"
    )
    assert not (HEAVY | {"pandas", "aiohttp", "botocore", "tyro"}) & modules_after(script, [])


def test_an_actor_that_takes_reports_brings_no_torch(tmp_path: Path) -> None:
    """Each is a process; one on a class beside torch started four seconds later."""
    (script := tmp_path / "actors.py").write_text(
        "import captioner.cluster.fit_reports, captioner.cluster.worker_registry, captioner.cluster.recorder"
    )
    assert not {"torch", "transformers"} & modules_after(script, [])


def modules_after(script: Path, arguments: list[str]) -> set[str]:
    """Return the names of the modules that a job has imported when it exits."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('MODULES', *{name.split('.')[0] for name in sys.modules}, file=sys.stderr))\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    found = subprocess.run([sys.executable, "-c", code, str(script), *arguments], capture_output=True, text=True)
    [line] = [line for line in found.stderr.splitlines() if line.startswith("MODULES ")]
    return set(line.split()[1:])
