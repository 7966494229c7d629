"""The rules of the house: which room imports which, how long a file may be, what an import costs."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import captioner
from captioner import config, errors

PACKAGE = Path(captioner.__file__).parent
ROOMS = [
    *("errors", "repetition", "caption_columns", "schema", "machine", "terminal", "demo", "config"),
    *("config_file", "command_line", "commands"),
    *("prompts", "storage", "inputs", "images", "model", "decoding", "tables", "query", "evaluation"),
    *("captioning", "training", "gallery", "export", "cluster"),
]
"""Rooms and root modules from left to right: each imports only itself and what stands further left."""

APART = {frozenset(pair) for pair in [("captioning", "training"), ("inputs", "images"), ("inputs", "model")]}
"""Pairs of rooms that do not import each other, in either direction."""

MAX_ROOT_MODULES, MAX_FILE_LINES, MAX_FUNCTION_LINES = 10, 400, 50
BANNED_NAMES = {"utils", "base", "manager", "helpers", "factory", "misc", "common"}
DEMO_BUILDER = "demo.training"  # builds the demo bundle: may import every room, is not installed


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if not name_of(path).startswith(DEMO_BUILDER))


def name_of(path: Path) -> str:
    """Return the module's name below the package: `tables.lease`; `tables` for its `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


EVERY_NAME = {name_of(path) for path in PACKAGE.rglob("*.py")}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def room_of(module: str) -> str:
    return module.split(".")[0]


@cache
def imported_names(path: Path) -> set[str]:
    """Return the full name of each module, or of what is taken from one, that a file imports at any depth."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively: write the module's whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_modules(path: Path) -> set[str]:
    """Return the names below the package of those of its modules that a file imports."""
    below = {name.removeprefix("captioner.") for name in imported_names(path) if name.startswith("captioner.")}
    return {name if name in EVERY_NAME else name.rpartition(".")[0] for name in below} - {""}


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room_of(name_of(path)) for path in modules()} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_imports_only_rooms_that_stand_left_of_its_own(path: Path) -> None:
    name, room = name_of(path), room_of(name_of(path))
    if name == "__init__":
        assert not imported_modules(path)
        return
    for other in sorted(imported_modules(path)):
        there = room_of(other)
        assert ROOMS.index(there) <= ROOMS.index(room), (
            f"captioner/{name} imports {other}, but {room} stands left of {there}. The order is {' <- '.join(ROOMS)}:"
            f" move what is shared to {room} or further left, or let a room at the right pass it in"
        )
        assert frozenset({room, there}) not in APART, f"captioner/{name} imports {other}: {room} and {there} stay apart"


@pytest.mark.parametrize("room", ROOMS)
def test_the_files_of_a_room_import_each_other_in_one_direction(room: str) -> None:
    inside = {name_of(path): path for path in modules() if room_of(name_of(path)) == room}
    graph = {name: imported_modules(path) & set(inside) - {name} for name, path in inside.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"files of {room}/ import each other in a circle: {' -> '.join(error.args[1])}")


def test_few_modules_stand_outside_a_room() -> None:
    at_root = [path.name for path in PACKAGE.glob("*.py")]
    assert len(at_root) <= MAX_ROOT_MODULES, f"{at_root}: a new module belongs into a room"


def test_only_the_cluster_room_imports_ray() -> None:
    assert {room_of(name_of(path)) for path in modules() if "ray" in map(room_of, imported_names(path))} == {"cluster"}


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert not [path for path in modules() if path.stem in BANNED_NAMES]


def test_each_name_that_config_exports_is_found_where_it_says() -> None:
    assert all(hasattr(config, name) for name in config.__all__)


def test_every_room_says_what_it_is_and_what_it_does_not_know() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        docstring = ast.get_docstring(tree(path)) or ""
        assert len(docstring.splitlines()) >= 2, (
            f"{path.parent.name}/__init__.py needs a docstring of about three lines"
        )


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports a test file by its bare name, and refuses a second one."""
    names = Counter(path.name for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert [name for name, num in names.items() if num > 1] == []


def test_no_file_is_longer_than_400_lines() -> None:
    """Sources of any kind; data that a program wrote is no source."""
    sources = [path for kind in ("py", "js", "css", "html") for path in PACKAGE.rglob(f"*.{kind}")]
    lengths = {
        str(path.relative_to(PACKAGE.parent)): len(path.read_text().splitlines())
        for path in [*sources, *(PACKAGE.parent / "jobs").glob("*.py")]
    }
    assert {name: num for name, num in lengths.items() if num > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_50_lines() -> None:
    assert {name: num for name, num in function_lengths() if num > MAX_FUNCTION_LINES} == {}


def function_lengths() -> Iterator[tuple[str, int]]:
    """Yield each function's module and name, and its lines from `def` to its end, docstring included."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"captioner.{name_of(path)}.{node.name}", node.end_lineno - node.lineno + 1


@pytest.mark.parametrize(
    ("absent", "modules"),
    [
        ({"torch", "ray", "transformers", "PIL"}, ["captioner"]),
        ({"torch", "ray", "PIL"}, ["captioner.inputs"]),  # and storage with it
        ({"torch", "ray", "transformers", "huggingface_hub"}, ["captioner.captioning.plan"]),  # and model.bundle
        (
            {"torch", "ray"},
            [
                "captioner.command_line",
                "captioner.captioning.decode_worker",
                "captioner.evaluation",
                "captioner.training.labels.labels",
                "captioner.gallery.gallery_job",  # and query
            ],
        ),
        # and what read and write tasks import
        ({"torch"}, ["captioner.cluster.caption_pipeline", "captioner.cluster.feature_pipeline"]),
    ],
)
def test_an_import_brings_only_what_it_needs(absent: set[str], modules: list[str]) -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name); print(name, *sys.modules)"
    found = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=True)
    brought = {name: absent & set(loaded) for name, *loaded in map(str.split, found.stdout.splitlines())}
    assert brought == {name: set() for name in modules}


def test_only_the_function_that_draws_curves_imports_matplotlib() -> None:
    at_import = {
        name_of(path)
        for path in modules()
        for node in tree(path).body
        for name in ast.walk(node if isinstance(node, ast.Import | ast.ImportFrom) else ast.Pass())
        if "matplotlib" in ast.dump(name)
    }
    assert not at_import


def test_every_error_is_drawn_in_the_tree_and_exported() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == set(errors.__all__)
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in defined)


HANDLES_URLS = {
    "inputs",  # URIs of millions of images
    "tables.audit",
    "tables.compaction",
    "tables.lease",
    "tables.moved_images",
    "tables.repair",
    "tables.table",
    "tables.verification",  # files of a table, as its store lists them
    "evaluation.caption_files",
    "evaluation.clip",
    "evaluation.matching",
    "captioning.estimate",
    "captioning.job",
    "captioning.summary",  # every text of a config
    "gallery.caption_cards",
    "gallery.page",
    "gallery.references",
    "gallery.table_rows",
    "model",  # names of models as the user or a bundle wrote them, errors of their stores
    "query.views",  # paths as the user wrote them, texts that may hold one
    "training",
}
"""Rooms and modules outside storage/ that take URLs apart or redact them. All others hold a Location."""


def test_urls_are_taken_apart_and_redacted_in_few_places() -> None:
    handling = {
        name_of(path)
        for path in modules()
        if room_of(name_of(path)) != "storage"
        and re.search(r"(?<![\w.])(urls\.)?(redact|shown|scheme|absolute)\(", path.read_text())
    }
    known = {place for place in HANDLES_URLS if any(f"{name}.".startswith(f"{place}.") for name in handling)}
    strange = {name for name in handling if not any(f"{name}.".startswith(f"{place}.") for place in HANDLES_URLS)}
    assert not strange, f"{strange} handle URLs as strings; hold a Location, whose text is safe to print"
    assert known == HANDLES_URLS, f"{HANDLES_URLS - known} do so no more; take them off the list"


OPENS_PARQUET = "storage.parquet"
RUNS_CODE_OF_FILES = {
    *("read_table", "ParquetFile", "ParquetDataset", "read_metadata", "read_pandas"),  # pyarrow.parquet
    *("open_file", "open_stream", "RecordBatchFileReader", "RecordBatchStreamReader"),  # pyarrow.ipc
    *("read_feather", "read_pickle", "Unpickler", "read_schema"),
}
"""Functions that make the types, or objects, that a file names."""


def test_parquet_is_opened_and_schemas_are_read_in_one_place() -> None:
    """Elsewhere an extension type named in a file would be made, and Ray's `arrow_pickled_object` unpickled."""
    found = {
        f"{name_of(path)}: {name}"
        for path in modules()
        for name in called_names(path)
        if name.rpartition(".")[2] in RUNS_CODE_OF_FILES and name != "read_schema" and name_of(path) != OPENS_PARQUET
    }
    assert found == set(), "use captioner.storage.parquet"
    assert "pyarrow.dataset" not in {name for path in modules() for name in imported_names(path)}


def test_no_pickle_is_read_from_a_file() -> None:
    for path in modules():
        for name, arguments in calls(path):
            if name == "torch.load":
                assert arguments.get("weights_only") == "True", f"{name_of(path)}: torch.load(weights_only=True)"
            assert arguments.get("allow_pickle", "False") == "False", f"{name_of(path)}: {name}(allow_pickle=...)"
            assert name not in ("pickle.load", "pickle.loads", "cloudpickle.loads"), name_of(path)


def called_names(path: Path) -> Iterator[str]:
    return (name for name, _ in calls(path))


@cache
def calls(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Return the name of each function that a file calls, as it is written there, and its keyword arguments."""
    return [
        (ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg})
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
    ]
