import os
import shutil
import time
from pathlib import Path

import pytest

from captioner.storage.local_cache import make_once


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAPTIONER_CACHE", str(tmp_path))
    return tmp_path


def write(text: str):
    return lambda path: path.write_text(text)


def test_a_thing_is_made_once():
    assert make_once("kind", "a.npy", write("first")).read_text() == "first"
    assert make_once("kind", "a.npy", write("second")).read_text() == "first"


def test_a_thing_that_fails_halfway_is_not_there_and_is_made_from_what_is_left(cache: Path):
    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("no space left")

    def finish(partial: Path) -> None:
        partial.write_text(partial.read_text() + " and half")

    with pytest.raises(OSError, match="no space"):
        make_once("kind", "a", fail)
    assert not (cache / "kind" / "a").exists()
    assert make_once("kind", "a", finish).read_text() == "half and half"


def test_what_was_not_asked_for_in_time_is_removed_when_another_is_made():
    old, asked_for = make_once("kind", "old", write("")), make_once("kind", "asked for", write(""))
    other_kind = make_once("other kind", "old", write(""))
    for made in (old, asked_for, other_kind):
        os.utime(made, (time.time() - 100,) * 2)
    make_once("kind", "asked for", write(""), keep_s=50)
    make_once("kind", "new", write(""), keep_s=50)
    assert (old.exists(), asked_for.exists(), other_kind.exists()) == (False, True, True)


def write_folder(partial: Path) -> None:
    partial.mkdir(exist_ok=True)
    (partial / "weights-1.5.bin").write_text("weights")


def test_folders_that_were_not_asked_for_in_time_are_removed_when_another_is_made(cache: Path):
    names = ["llava-1.5-old", "another", "asked-for"]
    made = [make_once("models", name, write_folder, keep_s=50) for name in names]
    interrupted = cache / "models" / "cut.partial"
    half_removed = cache / "models" / ".removed-x"
    for path in (interrupted, half_removed):
        write_folder(path)
    for path in (*made, interrupted):
        os.utime(path, (time.time() - 100,) * 2)
    make_once("models", "asked-for", write_folder, keep_s=50)
    new = make_once("models", "new", write_folder, keep_s=50)
    left = {path for path in (cache / "models").iterdir() if path.suffix != ".lock"}
    assert left == {made[2], new}


def test_a_folder_that_is_removed_as_it_is_asked_for_is_made_again(monkeypatch: pytest.MonkeyPatch):
    folder = make_once("models", "a", write_folder, keep_s=50)
    touch = os.utime

    def remove_first(path: Path) -> None:
        monkeypatch.setattr(os, "utime", touch)
        shutil.rmtree(path)
        touch(path)

    monkeypatch.setattr(os, "utime", remove_first)
    assert make_once("models", "a", write_folder, keep_s=50) == folder
    assert list(folder.iterdir())


def test_all_is_kept_without_a_time():
    old = make_once("kind", "old", write(""))
    os.utime(old, (0, 0))
    make_once("kind", "new", write(""))
    assert old.exists()
