import copy
import json
import logging
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from captioner.storage import Location, open_store

SIGNED = "https://me:pw@host/photos/a.jpg?X-Amz-Signature=abc&n=1"
SHOWN = "https://***@host/photos/a.jpg?X-Amz-Signature=***&n=1"
OPTIONS = {"key": "AKIA", "secret": "hush"}


@dataclass(frozen=True)
class Plan:
    output: Location


def leaks(text: str) -> bool:
    return any(secret in text for secret in ("me:pw", "abc", "AKIA", "hush"))


def test_a_location_shows_no_credentials_wherever_it_is_printed(caplog):
    signed = Location(SIGNED, OPTIONS)
    assert str(signed) == f"{signed}" == "%s" % signed == SHOWN  # noqa: UP031
    assert repr(signed) == f"Location('{SHOWN}')"
    with caplog.at_level(logging.INFO):
        logging.getLogger("test").info("output=%s plan=%s", signed, Plan(signed))
    children = [signed / "part-0.parquet", signed.parent, signed.beside("https://other/x?sig=abc")]
    texts = [
        caplog.text,
        repr(children),
        signed.name,
        repr(asdict(Plan(signed))),
        repr([signed]),
        str({signed: signed}),
    ]
    assert not any(map(leaks, texts))


def test_a_location_does_not_pass_for_a_string():
    with pytest.raises(TypeError):
        json.dumps({"output": Location(SIGNED)})
    with pytest.raises(TypeError):
        Path(Location("/data"))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        "".join([Location(SIGNED)])  # type: ignore[list-item]


def test_the_full_url_and_the_options_need_a_word():
    signed = Location(SIGNED, OPTIONS)
    assert signed.url_with_secrets == SIGNED
    assert signed.storage_options == OPTIONS


def test_a_location_compares_and_hashes_by_its_url():
    assert Location("s3a://b/x") == Location("s3://b/x", OPTIONS)
    assert len({Location("gcs://b/x"), Location("gs://b/x")}) == 1
    assert Location("s3://b/x") != Location("s3://b/y")
    assert Location("s3://b/x") != "s3://b/x"


def test_a_location_cannot_be_changed():
    place = Location("s3://b/x", OPTIONS)
    with pytest.raises(AttributeError):
        place._url = "s3://b/y"  # type: ignore[misc]
    place.storage_options["key"] = "another"
    assert place.storage_options == OPTIONS


@pytest.mark.parametrize("remade", [lambda place: pickle.loads(pickle.dumps(place)), copy.deepcopy])
def test_a_location_survives_pickling_and_copying_literally(remade):
    place = Location("/data", OPTIONS) / ".." / "x"
    assert remade(place) == place
    assert remade(place).storage_options == OPTIONS


def test_relative_and_home_paths_are_absolute_at_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert Location("a/../b").local_path == f"{tmp_path}/b"
    assert Location("~/b").local_path == "/home/me/b"
    assert Location("file:///b").local_path == "/b"


@pytest.mark.parametrize(
    ("path", "scheme", "name", "suffix", "parent"),
    [
        ("s3://b/x/a.tar.gz", "s3", "a.tar.gz", ".tar.gz", "s3://b/x"),
        ("s3://b/x/", "s3", "x", "", "s3://b"),
        ("s3://b", "s3", "b", "", "s3://b"),
        ("https://h/x?token=t", "https", "x?token=***", "", "https://h"),
        ("/data/a.JPG", "file", "a.JPG", ".jpg", "/data"),
        ("/data", "file", "data", "", "/"),
        ("/", "file", "", "", "/"),
    ],
)
def test_a_location_knows_its_scheme_name_suffix_and_parent(path, scheme, name, suffix, parent):
    place = Location(path, OPTIONS)
    assert (place.scheme, place.name, place.suffix, str(place.parent)) == (scheme, name, suffix, parent)
    assert place.is_local == (scheme == "file")
    assert place.parent.storage_options == OPTIONS


def test_a_child_is_named_literally_and_opens_with_the_same_options():
    child = Location("s3://b/x/", OPTIONS) / "a b%20#?.jpg" / "y"
    assert child.url_with_secrets == "s3://b/x/a b%20#?.jpg/y"
    assert child.storage_options == OPTIONS


def test_a_folder_is_named_without_a_slash_at_its_end():
    assert str(Location("s3://b/x/").folder) == "s3://b/x"
    assert str(Location("/").folder) == "/"


def test_another_location_gets_the_options_only_if_its_store_is_of_the_same_kind():
    place = Location("s3://b/x", OPTIONS)
    assert place.beside("s3a://other/y").storage_options == OPTIONS
    assert place.beside("/data/y").storage_options == {}


def test_a_name_that_is_not_utf8_can_be_printed():
    path = "/data/" + b"\xff.jpg".decode("utf-8", "surrogateescape")
    assert str(Location(path)) == r"/data/\xff.jpg"
    assert Location(path).local_path == path


def test_a_store_takes_a_location_wherever_it_takes_a_url(tmp_path):
    folder = Location(str(tmp_path))
    store = open_store(folder)
    store.write_atomic(folder / "a", b"abc")
    assert store.create(folder / "b", b"b")
    store.move(folder / "b", folder / "c")
    assert store.names(folder) == ["a", "c"]
    assert [entry.url for page in store.pages(folder / "a") for entry in page] == [f"{tmp_path}/a"]
    assert (store.read_bytes(folder / "a"), store.read_range(folder / "a", 1, 2)) == (b"abc", b"b")
    assert store.open(folder / "a").read() == b"abc"
    store.remove(folder / "c")
    assert store.info(folder / "c") is None


def test_a_location_opens_its_store_with_its_options():
    store = open_store(Location("memory://x", {"use_listings_cache": True, "skip_instance_cache": True}))
    assert store.fs.storage_options["use_listings_cache"]


def test_a_store_shows_neither_the_credentials_of_its_location_nor_its_options():
    assert repr(open_store(Location(SIGNED, OPTIONS))) == f"HttpStore('{SHOWN}')"
