"""What the pages of prose name exists: paths, links, modules, functions, commands and flags."""

import ast
import importlib
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import captioner.config
from captioner import command_line
from captioner.commands import COMMANDS
from tests.pages import PAGES, ROOT, commands, name_of, without_blocks
from tests.unit.test_house import ROOMS

every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
FOREIGN = {"--help", "--config", "--json", "--version"}
"""Flags that every job takes beside those of its config."""

FILE_ENDINGS = (".py", ".json", ".yaml", ".md")


@every_page
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"(?<![\w/.-])(?:jobs|captioner|tests|\.ci)/[\w./-]*\w", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


@every_page
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []


@every_page
def test_every_name_with_dots_that_begins_with_a_room_exists(page: Path) -> None:
    at_root = {path.stem for path in (ROOT / "captioner").iterdir()}
    prose = without_blocks(page.read_text())
    dotted = [name.removeprefix("captioner.") for name in re.findall(r"`([a-z]\w*(?:\.\w+)+)(?:\(.*?\))?`", prose)]
    ours = [name for name in dotted if name.partition(".")[0] in at_root and not name.endswith(FILE_ENDINGS)]
    missing = [name for name in ours if not exists(f"captioner.{name}")]
    assert not missing, missing


def exists(name: str) -> bool:
    """Return whether a module, or what one module defines at any depth, has this name."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(words[:length]))
        except ModuleNotFoundError:
            continue
        for word in words[length:]:
            if word not in {*dir(found), *getattr(found, "__annotations__", {})}:
                return False
            found = getattr(found, word, ModuleType(word))
        return True
    return False


@every_page
def test_every_command_of_a_job_parses(page: Path) -> None:
    for _, script, *arguments in (words for words in commands(page.read_text()) if words[1:] and "jobs/" in words[1]):
        config_type = config_of(ROOT / script)
        if "..." not in arguments and "--help" not in arguments:
            assert isinstance(command_line.parse(config_type, arguments), config_type)


def config_of(script: Path) -> type:
    """Return the config of the command that a job runs."""
    assert script.exists(), script
    return getattr(captioner.config, COMMANDS[script.stem].config)


@every_page
def test_every_module_that_a_page_runs_exists_and_takes_the_flags_given(page: Path) -> None:
    for words in commands(page.read_text()):
        if words[:2] == ["python", "-m"]:
            module = ROOT / words[2].replace(".", "/")
            files = [module.with_suffix(".py")] if module.with_suffix(".py").exists() else list(module.glob("*.py"))
            assert files, words
            source = "".join(file.read_text() for file in files)
            assert [word for word in words[3:] if word.startswith("--") and f'"{word}"' not in source] == [], words


@every_page
def test_every_test_command_names_marks_and_folders_that_exist(page: Path) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    marks = {entry.partition(":")[0] for entry in settings["markers"]} | {"not", "and", "or"}
    for words in commands(page.read_text()):
        if words[0] == "pytest" and "-m" in words:
            assert set(re.findall(r"\w+", words[words.index("-m") + 1])) <= marks, words


@every_page
def test_every_flag_that_a_page_names_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = r"^ray .*?( -- |$)|`?\b(?:python -m|pytest|pip|coverage) [^`\n]*"  # flags of other programs
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", re.sub(others, "", page.read_text(), flags=re.MULTILINE)))
    assert named - FOREIGN - flags_of_jobs(capsys) == set()


def flags_of_jobs(capsys: pytest.CaptureFixture[str]) -> set[str]:
    for script in (ROOT / "jobs").glob("*.py"):
        with pytest.raises(SystemExit):
            command_line.parse(config_of(script), ["--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))


def test_every_room_is_listed_on_the_page_of_the_package_in_the_order_of_imports() -> None:
    page = (ROOT / "captioner" / "README.md").read_text()
    rooms = [room for room in ROOMS if (ROOT / "captioner" / room).is_dir()]
    assert re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE) == rooms


def test_every_job_is_listed_with_the_config_and_the_function_that_it_calls() -> None:
    page = (ROOT / "captioner" / "README.md").read_text()
    listed = re.findall(r"^\| `(jobs/\w+\.py)` \| `config\.(\w+)` \| `([\w.]+)\.(\w+)` \|", page, re.MULTILINE)
    assert sorted(row[0] for row in listed) == sorted(f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py"))
    for script, config, module, function in listed:
        name = Path(script).stem
        assert f'main("{name}")' in (ROOT / script).read_text()
        assert (COMMANDS[name].config, COMMANDS[name].job) == (config, f"captioner.{module}:{function}")
        assert callable(getattr(importlib.import_module(f"captioner.{module}"), function))


def test_every_benchmark_is_listed_on_the_page_of_the_tests() -> None:
    page = (ROOT / "tests" / "README.md").read_text()
    folder = ROOT / "tests" / "bench"
    benchmarks = {path.stem for path in folder.glob("*.py") if has_a_main(path)} | {
        path.parent.name for path in folder.glob("*/__main__.py")
    }
    assert set(re.findall(r"`python -m tests\.bench\.(\w+)", page)) == benchmarks


def has_a_main(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text()).body)
