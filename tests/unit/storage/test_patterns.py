import pytest

from captioner.storage import patterns


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("{0008..0011}.tar", ["0008.tar", "0009.tar", "0010.tar", "0011.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{,x}y", ["y", "xy"]),
        ("no braces", ["no braces"]),
    ],
)
def test_braces_expand_as_webdataset_expands_them(path, expanded):
    assert patterns.expand_braces(path) == expanded


@pytest.mark.parametrize("path", ["{}", "{one}", "{1..}", "{", "a}b{", "{1...3}"])
def test_braces_without_a_range_or_a_comma_mean_themselves(path):
    assert patterns.expand_braces(path) == [path]
    assert not patterns.has_braces(path)


def test_a_glob_crosses_folders_only_with_two_stars():
    assert patterns.glob_pattern("s3://b/*/x?.jpg").match("s3://b/one/x1.jpg")
    assert not patterns.glob_pattern("s3://b/*/x?.jpg").match("s3://b/one/two/x1.jpg")
    assert patterns.glob_pattern("s3://b/**/*.jpg").match("s3://b/one/two/x1.jpg")
    assert patterns.glob_prefix("s3://b/pre*/x") == "s3://b/pre"


def test_a_question_mark_in_a_web_address_is_no_wildcard():
    assert patterns.has_glob("/data/x?.jpg")
    assert not patterns.has_glob("https://h/x?.jpg")
