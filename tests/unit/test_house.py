"""The rules of the house: who imports whom, what no file is called, what an import costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import captioner
from captioner import errors

PACKAGE = Path(captioner.__file__).parent
ORDER = [
    {"errors"},
    {"config", "repetition", "rows", "telemetry"},
    {"command_line", "demo", "tracebacks", "waiting"},
    {"keys", "machine", "resources", "restarts", "sources", "images", "model"},
    {"making_room", "stopping", "vigil"},
    {
        *("decoding", "metrics", "tables", "failure_limit", "slices", "prediction", "decode_worker"),
        *("caption_files", "same_pictures", "splits"),
    },
    {"table_images"},
    {"evaluation", "verification", "demo.train", "label_files"},
    {"fitting", "gallery", "plan", "worker", "labels", "features"},
    {"progress", "rehearsal", "summary", "feature_plan"},
    {"examples", "feature_worker", "fit_plan", "query"},
    {"caption_tokens"},
    {"fit_report", "fit_worker", "gallery_job"},
    {"caption_pipeline"},
    {"feature_pipeline"},
    {"projector_training"},
]
"""Rooms from left to right: a module imports only its own room and those that stand further left."""

BANNED = {"utils", "base", "manager", "helpers", "factory", "misc", "common"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    place = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return place if place == "demo.train" else place.split(".")[0]


def imported(path: Path) -> Iterator[str]:
    """Names of the modules that a file imports at any depth, in full."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rank(room: str) -> int:
    return next(place for place, rooms in enumerate(ORDER) if room in rooms)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_left_of_it(path: Path) -> None:
    if path.name == "__init__.py" and path.parent == PACKAGE:
        assert not list(imported(path))
        return
    room = room_of(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "captioner" and len(parts) > 1 and parts[1] not in {room.split(".")[0], "__version__"}:
            assert rank(parts[1]) < rank(room), f"{room} imports {parts[1]}"


def test_ray_is_imported_by_three_modules_at_most() -> None:
    users = {room_of(path) for path in modules() if any(name.split(".")[0] == "ray" for name in imported(path))}
    assert users <= {"caption_pipeline", "feature_pipeline", "projector_training"}


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert not [path for path in modules() if path.stem in BANNED]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("captioner", {"torch", "ray", "transformers", "PIL"}),
        ("captioner.command_line", {"torch", "ray"}),
        ("captioner.sources", {"torch", "ray", "PIL"}),
        ("captioner.decode_worker", {"torch", "ray"}),
        ("captioner.evaluation", {"torch", "ray"}),
        ("captioner.gallery_job", {"torch", "ray"}),
        ("captioner.query", {"torch", "ray"}),
        ("captioner.caption_pipeline", {"torch"}),  # read and write tasks import it
        ("captioner.feature_pipeline", {"torch"}),
        ("captioner.labels", {"torch", "ray"}),
    ],
)
def test_an_import_brings_only_what_it_needs(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({absent!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_every_error_is_drawn_in_the_tree_and_exported() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == set(errors.__all__)
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in defined)
