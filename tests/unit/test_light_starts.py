"""What can be said without a model in memory is said without torch, transformers and Ray."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import captioner
from tests.caption_tables import add_part, begin_table, caption_row, failure_row, write_images

JOBS = Path(captioner.__file__).parent.parent / "jobs"
HEAVY = {"torch", "ray", "transformers"}
"""Packages that take a second or more to import."""


def test_help_costs_no_import_of_torch_or_ray_or_of_a_store() -> None:
    imported = modules_after(*([script, "--help"] for script in sorted(JOBS.glob("*.py"))))
    assert "captioner" in imported
    assert not (HEAVY | {"aiohttp", "botocore"}) & imported


def test_a_wrong_flag_costs_no_import_of_torch_or_ray() -> None:
    assert not HEAVY & modules_after([JOBS / "caption.py", "--no-such-flag"])


def test_a_plan_and_a_refusal_bring_neither_torch_nor_ray(tmp_path: Path) -> None:
    commands = [["demo", tmp_path / "out", "--dry-run"], ["/nowhere", tmp_path / "out", "--model", "demo"]]
    commands += [["demo", tmp_path / "out", "--model", "/nowhere"], ["demo", "out", "--max-new-tokens", "1000"]]
    (prompts := tmp_path / "prompts.yaml").write_text("caption: a\nb: {text: x, choice: [y, z], max_new_tokens: 4}")
    commands.append([*commands[0], "--prompts", prompts])
    plan = [JOBS / "plan.py", "/nowhere", "--model", "demo"]
    assert not HEAVY & modules_after(*([JOBS / "caption.py", *arguments] for arguments in commands), plan)


def test_labels_that_are_not_there_are_refused_without_torch_and_ray(tmp_path: Path) -> None:
    arguments = ["/nowhere.csv", tmp_path / "out", "--model", "demo"]
    assert not HEAVY & modules_after([JOBS / "fit_projector.py", *arguments])


def test_a_job_that_reads_a_table_brings_neither_torch_nor_ray(tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    table, _ = begin_table(url, str(write_images(tmp_path / "images", 2)))
    add_part(table, [caption_row(0, "a", "a dog"), failure_row(1, "c", "corrupt")])
    assert not HEAVY & modules_after(
        [JOBS / "verify.py", url],
        [JOBS / "query.py", url],
        [JOBS / "query.py", url, "SELECT count(*) FROM captions"],
        [JOBS / "gallery.py", url, tmp_path / "page.html"],
    )
    assert (tmp_path / "page.html").exists()


def test_a_query_that_makes_no_array_of_python_values_brings_no_pandas(tmp_path: Path) -> None:
    """It takes half a second to import, and what tells the faults of stores a fifth."""
    table, _ = begin_table(str(tmp_path / "out"), str(write_images(tmp_path / "images", 2)))
    add_part(table, [caption_row(0, "a", "a dog")])
    query = [JOBS / "query.py", tmp_path / "out", "SELECT count(*) FROM attempts, unanswered"]  # neither has a row
    assert not {"pandas", "aiohttp", "botocore"} & modules_after(query)


def test_a_process_that_decodes_images_brings_no_pandas_no_store_and_no_flags(tmp_path: Path) -> None:
    """Each worker starts some, and pandas alone took half of a start."""
    (script := tmp_path / "decode.py").write_text(
        "import io\nfrom captioner.config import ImageConfig\n"
        "from captioner.images.child import serve\nfrom captioner.images.preprocessing import Preprocessing\n"
        "from captioner.images.reader import Decoded, decode\nfrom tests.sample_images import encoded\n"
        "for kind in ('JPEG', 'PNG'):\n"
        "    assert isinstance(decode(encoded(kind), Preprocessing(), ImageConfig()), Decoded)"
    )
    assert not (HEAVY | {"pandas", "aiohttp", "botocore", "tyro"}) & modules_after([script])


def test_an_actor_that_takes_reports_brings_no_torch(tmp_path: Path) -> None:
    """Each is a process; one on a class beside torch started four seconds later."""
    (script := tmp_path / "actors.py").write_text(
        "import captioner.cluster.fit_reports, captioner.cluster.worker_registry, captioner.cluster.recorder"
    )
    assert not {"torch", "transformers"} & modules_after([script])


def modules_after(*commands: Sequence[str | Path]) -> set[str]:
    """Return the names of the modules that one Python has imported when it has run these scripts, each as a command."""
    code = (
        "import atexit, contextlib, json, runpy, sys\n"
        "atexit.register(lambda: print('MODULES', *{name.split('.')[0] for name in sys.modules}, file=sys.stderr))\n"
        "for sys.argv in json.loads(sys.argv[1]):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = json.dumps([[str(word) for word in command] for command in commands])
    found = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, check=True)
    [line] = [line for line in found.stderr.splitlines() if line.startswith("MODULES ")]
    return set(line.split()[1:])
