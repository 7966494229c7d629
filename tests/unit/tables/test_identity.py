"""What a table, a fit or a cache was made with: settings by name, and what differs."""

from captioner.tables.identity import flatten, refusal, settings_that_differ, to_json

BEFORE = {"model": {"name": "demo", "decoding": {"num_beams": 1}}, "seed": 0}
NOW = {"model": {"name": "demo", "decoding": {"num_beams": 4}}, "limit": 3}


def test_settings_are_named_by_the_path_to_them() -> None:
    assert flatten(BEFORE) == {"model.name": "demo", "model.decoding.num_beams": 1, "seed": 0}


def test_what_differs_is_named_with_both_values() -> None:
    assert settings_that_differ(BEFORE, NOW) == [
        ("model.decoding.num_beams", 1, 4),
        ("seed", 0, None),
        ("limit", None, 3),
    ]


def test_a_refusal_names_each_difference_and_what_to_do() -> None:
    assert refusal("s3://user:secret@bucket/out", "another fit", BEFORE, NOW, output="OUTPUT").splitlines() == [
        "s3://***@bucket/out holds another fit; expected the same settings as before. These differ:",
        "  limit: None there, 3 now",
        "  model.decoding.num_beams: 1 there, 4 now",
        "  seed: 0 there, None now",
        "Choose another OUTPUT, or repeat the earlier settings to continue it.",
    ]


def test_equal_settings_have_equal_bytes_in_any_order() -> None:
    assert to_json({"a": 1, "b": "é"}) == to_json({"b": "é", "a": 1}) == '{\n  "a": 1,\n  "b": "é"\n}\n'.encode()
