import pickle
import uuid

import pytest

from captioner.errors import InputError
from captioner.schema import RejectReason
from captioner.storage import PAGE_SIZE, Store, open_store, pause_s
from captioner.storage.faults import Fault, StoreError


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def _all(store, prefix):
    return [entry.url.removeprefix(prefix) for page in store.pages(prefix) for entry in page]


def test_what_is_written_is_read_back(folder):
    store = open_store(folder)
    store.write_atomic(f"{folder}/a/b.bin", b"bytes")
    store.write_atomic(f"{folder}/a/b.bin", b"other")
    assert store.read_bytes(f"{folder}/a/b.bin") == b"other"
    assert store.names(f"{folder}/a") == ["b.bin"]
    assert store.info(f"{folder}/a/b.bin").size_bytes == 5
    assert store.info(f"{folder}/a").is_folder
    store.remove(f"{folder}/a/b.bin")
    store.remove(f"{folder}/a/b.bin")
    assert store.info(f"{folder}/a/b.bin") is None
    assert store.read_or_none(f"{folder}/a/b.bin") is None
    assert store.names(f"{folder}/nowhere") == []


def test_a_file_that_may_be_missing_is_asked_for_no_more_often_than_any_other(monkeypatch):
    monkeypatch.setattr("captioner.storage.fsspec_store.pause_s", lambda *_: 0)
    store, asked = open_store(f"memory://{uuid.uuid4().hex}"), []

    def drop(path):
        asked.append(path)
        raise ConnectionResetError("dropped")

    monkeypatch.setattr(store.fs, "cat_file", drop)
    nums_asked = []
    for read in (store.read_bytes, store.read_or_none):
        asked.clear()
        with pytest.raises(StoreError, match="dropped"):
            read("memory://x")
        nums_asked.append(len(asked))
    assert nums_asked[0] == nums_asked[1] > 1


def _ignores_the_condition(store, place, data):
    store.fs.pipe_file(store.path(place), data)
    return True


def _refuses_each_condition(store, place, data):
    return False  # HTTP 412


def _knows_no_condition(store, place, data):
    raise StoreError(Fault(RejectReason.FETCH_FAILED, "HTTP 501"))


@pytest.mark.parametrize("answer", [None, _ignores_the_condition, _refuses_each_condition, _knows_no_condition])
def test_a_new_file_replaces_none_on_a_store_without_conditional_writes_either(folder, answer, monkeypatch):
    if answer and folder.startswith("memory"):
        monkeypatch.setattr(Store, "_create_once", answer)
    store = open_store(folder)
    store.write_atomic(f"{folder}/a.txt", b"mine")
    assert not store.write_new(f"{folder}/a.txt", b"theirs")
    assert store.read_bytes(f"{folder}/a.txt") == b"mine"
    assert [store.write_new(f"{folder}/b.txt", data) for data in (b"one", b"one", b"two")] == [True, True, False]
    assert store.read_bytes(f"{folder}/b.txt") == b"one"


def test_a_listing_is_recursive_and_in_the_order_of_the_whole_names(folder):
    store = open_store(folder)
    names = ["b/2", "a", "b.x", "b/1/z", "b-", "c/ü %#?*{x}[1]"]
    for name in names:
        store.write_atomic(f"{folder}/{name}", b"x")
    assert _all(store, f"{folder}/") == sorted(names)
    assert _all(store, f"{folder}/b") == ["-", ".x", "/1/z", "/2"]
    assert [len(page) for page in store.pages(f"{folder}/")] == [6]


def test_a_listing_comes_in_pages(tmp_path):
    for number in range(PAGE_SIZE + 1):
        (tmp_path / f"{number:05d}").touch()
    pages = list(open_store(str(tmp_path)).pages(f"{tmp_path}/"))
    assert [len(page) for page in pages] == [PAGE_SIZE, 1]


def test_links_to_files_are_followed_and_a_link_to_a_folder_above_ends(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "real.jpg").touch()
    (tmp_path / "in/link.jpg").symlink_to(tmp_path / "real.jpg")
    (tmp_path / "in/broken.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    assert _all(open_store(str(tmp_path)), f"{tmp_path}/in/") == ["broken.jpg", "link.jpg"]


def test_a_ring_of_links_is_a_file_that_cannot_be_read_and_hides_no_other(tmp_path):
    (tmp_path / "ring.jpg").symlink_to(tmp_path / "ring.jpg")
    (tmp_path / "good.jpg").touch()
    assert _all(open_store(str(tmp_path)), f"{tmp_path}/") == ["good.jpg", "ring.jpg"]


def test_a_write_below_a_file_is_a_store_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="Not a directory"):
        open_store(str(tmp_path)).write_atomic(f"{tmp_path}/file/below/a", b"x")


def test_a_failed_write_leaves_neither_the_file_nor_a_part_of_it(tmp_path):
    store = open_store(str(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").mkdir()  # a folder stands where the file should be renamed to
    with pytest.raises(StoreError, match="Is a directory"):
        store.write_atomic(f"{tmp_path}/out/a", b"x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_a_pause_is_as_long_as_the_server_asks_for_up_to_thirty_seconds():
    assert [pause_s(0, wanted) for wanted in (5.0, 30.0, 31.0, 1e9)] == [5.0, 30.0, 30.0, 30.0]
    assert all(4 <= pause_s(99) <= 12 for _ in range(100))


def test_a_store_can_be_sent_to_another_process(folder):
    store = open_store(folder)
    store.write_atomic(f"{folder}/x", b"1")
    assert pickle.loads(pickle.dumps(store)).read_bytes(f"{folder}/x") == b"1"


def test_a_reader_seeks_and_ends_as_a_file_does(folder):
    store = open_store(folder)
    store.write_atomic(f"{folder}/x", b"0123456789")
    with store.open(f"{folder}/x") as file:
        assert (file.read(3), file.seek(-2, 2), file.read(), file.read()) == (b"012", 8, b"89", b"")


def test_a_reader_goes_on_where_the_store_dropped_it(tmp_path, monkeypatch):
    monkeypatch.setattr("captioner.storage.fsspec_store.pause_s", lambda *_: 0)
    store = open_store(str(tmp_path))
    store.write_atomic(f"{tmp_path}/x", bytes(range(256)) * 100)
    opened = []

    class Dropping:
        def __init__(self, file):
            self.file, self.num_reads = file, 0
            opened.append(self)

        def seek(self, *args):
            return self.file.seek(*args)

        def close(self):
            self.file.close()

        def read(self, size):
            self.num_reads += 1
            if self.num_reads == 2:
                self.file.close()
                raise ConnectionResetError("dropped")
            return self.file.read(size)

    plain = store._reader
    monkeypatch.setattr(store, "_reader", lambda url: Dropping(plain(url)))
    with store.open_unbuffered(f"{tmp_path}/x") as file:
        assert b"".join(iter(lambda: file.read(5000), b"")) == bytes(range(256)) * 100
    assert len(opened) > 3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/x", r"gs:// needs the package gcsfs: .*'\.\[gcs\]'"),
        ("az://c/x", r"az:// needs the package adlfs: .*'\.\[azure\]'"),
        ("nonsense://x", "nonsense:// cannot be opened.*expected a local path or one of s3"),
    ],
)
def test_a_store_without_its_package_says_what_to_install(url, message):
    with pytest.raises(InputError, match=message):
        open_store(url)
