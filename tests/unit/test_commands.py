"""`captioner NAME` and `python jobs/NAME.py`: the same commands, their names, Ctrl-C in the first second."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import captioner
from captioner.commands import COMMANDS, main

ROOT = Path(captioner.__file__).parents[1]


def test_every_command_is_a_job_and_every_job_a_command() -> None:
    scripts = {path.stem: path.read_text() for path in (ROOT / "jobs").glob("*.py")}
    assert set(scripts) == set(COMMANDS)
    assert all(f'main("{name}")' in text for name, text in scripts.items())


def test_the_installed_command_is_this_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"captioner": "captioner.commands:main"}


def test_without_a_name_all_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(None, []) == main(None, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown and command.purpose in shown for name, command in COMMANDS.items())


@pytest.mark.parametrize(("name", "words"), [(None, ["--version"]), ("caption", ["--version"])])
def test_the_version_is_told(name: str | None, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(name, words) == 0
    assert capsys.readouterr().out == f"captioner {captioner.__version__}\n"


def test_a_command_that_is_none_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(None, ["captoin", "photos"]) == 2
    assert main(None, ["--photos"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: captoin is no command; did you mean caption?",
        f"error: --photos is no command; expected one of {', '.join(COMMANDS)}",
    ]


def test_a_command_is_called_by_its_name_on_its_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(None, ["fit-projector", "--help"])
    assert "usage: captioner fit_projector" in capsys.readouterr().out


def test_a_summary_is_json_where_stdout_is_no_terminal_or_where_asked_for(tmp_path: Path) -> None:
    for on_terminal, flags, is_json in [(False, [], True), (True, [], False), (True, ["--json"], True)]:
        out = run_in_terminal(tmp_path, flags) if on_terminal else run_in_pipe(tmp_path, flags)
        assert is_object(out) == is_json, (on_terminal, flags, out)


DRY_RUN = ["-W", "error", str(ROOT / "jobs" / "caption.py"), "demo", "out", "--dry-run"]


def run_in_pipe(folder: Path, flags: list[str]) -> bytes:
    return subprocess.run([sys.executable, *DRY_RUN, *flags], cwd=folder, capture_output=True, check=True).stdout


def run_in_terminal(folder: Path, flags: list[str]) -> bytes:
    """Return what a terminal is given on stdout."""
    ours, theirs = os.openpty()
    with subprocess.Popen([sys.executable, *DRY_RUN, *flags], cwd=folder, stdout=theirs, stderr=subprocess.PIPE) as job:
        assert b"images    24 in 1 units" in job.communicate()[1]
    os.write(theirs, b"end")
    shown = b""
    while not shown.endswith(b"end"):
        shown += os.read(ours, 1 << 16)
    for file in (ours, theirs):
        os.close(file)
    return shown.removesuffix(b"end")


def is_object(out: bytes) -> bool:
    """Return whether stdout holds one JSON object and nothing else."""
    return bool(out.strip()) and isinstance(json.loads(out), dict)


def test_json_of_rows_is_asked_for_by_their_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("query", ["table", "SELECT 1", "--json"]) == 2
    assert "error: --json is given; expected --format json for rows" in capsys.readouterr().err


CTRL_C_AT_AN_IMPORT = """
import builtins, os, signal, sys
from captioner.commands import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # behind `nohup` in a script the tests ignore it
imported = builtins.__import__

def interrupting(name, *rest):
    if name == NAME:
        os.kill(os.getpid(), signal.SIGINT)
    return imported(name, *rest)

builtins.__import__ = interrupting
sys.exit(main("caption", ["demo", "out"]))
"""


@pytest.mark.parametrize("name", ["tyro", "captioner.captioning.plan", "pyarrow"])
def test_ctrl_c_while_python_imports_ends_with_a_line_and_no_traceback(tmp_path: Path, name: str) -> None:
    code = CTRL_C_AT_AN_IMPORT.replace("NAME", repr(name))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted: nothing had begun")
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_is_ended_says_what_came_and_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    from captioner.command_line import run
    from captioner.config import CaptionJobConfig

    def interrupted(config: CaptionJobConfig) -> dict[str, object]:
        raise KeyboardInterrupt("312 captioned, none failed, all of them saved, 88 are left")

    assert run(CaptionJobConfig, interrupted, []) == 130
    assert capsys.readouterr().err == (
        "interrupted: 312 captioned, none failed, all of them saved, 88 are left; the same command continues where this"
        " one stopped\n"
    )


@pytest.fixture(autouse=True)
def signals() -> object:
    """Leave the signal handlers as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["captioner", "ver"], ["verify"]),
        (["captioner", "verify", "--rep"], ["--repair"]),
        (["captioner", "fit-projector", "--max-st"], ["--max-steps"]),
        (["captioner", "caption", "pho"], []),  # the shell's own: names of files
    ],
)
def test_a_shell_completes_commands_and_flags(
    typed: list[str], completed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(None, ["completion"]) == 0
    script = capsys.readouterr().out
    words = " ".join(typed)
    code = f'{script}\nCOMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _captioner; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == completed
