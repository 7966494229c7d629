"""What a file of prompts may say, and what it is told of all else."""

import json
from pathlib import Path

import duckdb
import pytest

from captioner.config import DecodingConfig
from captioner.errors import ConfigError
from captioner.prompts import Prompt, read_prompts
from captioner.prompts.sql_words import SQL_WORDS
from captioner.prompts.text import Segment

TAKEN = frozenset({"key", "image_id", "caption", "num_tokens"})


def read(tmp_path: Path, text: str, decoding: DecodingConfig | None = None) -> tuple[Prompt, ...]:
    file = tmp_path / "prompts.yaml"
    file.write_text(text)
    return read_prompts(file, decoding or DecodingConfig(), TAKEN)


def test_a_prompt_is_a_text_or_says_what_it_changes_of_the_decoding(tmp_path: Path) -> None:
    caption, tags = read(
        tmp_path,
        "caption: Describe the image.\n"
        "tags: {text: List., system: You tag., max_new_tokens: 12, stop: [;], do_sample: true, temperature: 0.5}\n",
        DecodingConfig(min_new_tokens=3),
    )
    assert (caption.name, caption.texts[0].text.fill({}), caption.system) == (
        "caption",
        [Segment("Describe the image.")],
        None,
    )
    assert caption.decoding == DecodingConfig(min_new_tokens=3)
    assert tags.system is not None
    assert tags.system.text == "You tag."
    assert tags.decoding == DecodingConfig(
        min_new_tokens=3, max_new_tokens=12, stop=(";",), do_sample=True, temperature=0.5
    )


def test_yes_and_no_are_texts(tmp_path: Path) -> None:
    [prompt] = read(tmp_path, "is_photo: {text: 'A photograph?', choice: [yes, no]}")
    assert prompt.constraint == {"choice": ["yes", "no"]}


def test_texts_have_weights_and_columns(tmp_path: Path) -> None:
    [prompt] = read(
        tmp_path, "style:\n  texts: ['Describe {alt}.', {text: Name it., weight: 2.5}]\n  system: 'By {author}.'"
    )
    assert [one.weight for one in prompt.texts] == [1.0, 2.5]
    assert prompt.columns == {"alt", "author"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no `name: prompt` lines; expected one for each column"),
        ("[a]", "holds no `name: prompt` lines"),
        ("a: [", "is not YAML: expected the node content, but found '<stream end>', line 1"),
        ("Tags: x", "a prompt is named 'Tags'; expected a-z, 0-9 and _, beginning with a letter"),
        ("1: x", "a prompt is named 1; expected"),
        ("image_id: x", "image_id is a column that every table has; expected another name"),
        ("order: x", "order is a word of SQL; expected another name, such as order_1"),
        ("a_details: x", "a_details ends as the details of prompts do; expected another name"),
        ("a: x\nb: y\na: z", "is not YAML: a stands twice, line 3"),
        ("a: {text: x, text: y}", "is not YAML: text stands twice, line 1"),
        (
            "a: {text: x, choice: [b, c], num_beams: 3}",
            "a: num_beams is 3; expected num_beams: 1 in a prompt with a con",
        ),
        ("a: {text: x, regex: b, min_new_tokens: 2}", "a: min_new_tokens is 2; expected min_new_tokens: 0 in a prompt"),
        ("a: {text: x, regex: b, stop: ['.']}", r"a: stop is \[\".\"\]; expected stop: \[\] in a prompt with a con"),
        ("a: 3", "a is 3; expected a text, or text: and what else it says"),
        ("a: {txt: x}", "a: unknown setting txt; did you mean text?"),
        ("a: {seed: 1, text: x}", "a: unknown setting seed; expected one of text, texts"),
        ("a: {system: x}", "a has no text; expected one of the two"),
        ("a: {text: x, texts: [y]}", "a has both text and texts; expected one of the two"),
        ("a: {text: ' '}", "a: text is ' '; expected a text"),
        ("a: {texts: []}", r"a: texts is \[\]; expected a list of texts"),
        ("a: {texts: [{weight: 1}]}", 'a: texts is {"weight": 1}; expected texts, or {text: ..., weight: ...}'),
        ("a: {texts: [{text: x, weight: 0}]}", "a: weight is 0; expected a number above 0"),
        ("a: {text: x, weight: 2}", "a: unknown setting weight"),
        ("a: {text: x, system: 3}", "a: system is 3; expected a text"),
        ("a: {text: x, max_new_tokens: 0}", "a: --max-new-tokens is 0; expected at least 1"),
        ("a: {text: x, max_new_tokens: many}", "a: max_new_tokens is 'many'; expected a whole number"),
        ("a: {text: x, do_sample: yes}", "a: do_sample is 'yes'; expected true or false"),
        (
            "a: {text: x, temperature: 0.5}",
            "a: --temperature is 0.5; expected --do-sample or --redraw-repetitive with it",
        ),
        ("a: {text: x, stop: 3}", "a: stop is 3; expected texts"),
        ("a: {text: x, max_value_tokens: true}", "a: max_value_tokens is true; expected 1 or more"),
        ("a: {text: x, choice: [b]}", r"a: choice is \[\"b\"\]; expected a list of two texts or more"),
        ("a: {text: x, choice: [b, b]}", "expected texts that differ"),
        ("a: {text: x, choice: [1, 2]}", r"a: choice is \[1, 2\]; expected a list of two texts or more"),
        ("a: {text: x, regex: '('}", "a: regex is '\\('.*; expected a regular expression"),
        ("a: {text: x, json_schema: object}", "a: json_schema is 'object'; expected a JSON schema, as a mapping"),
        ("a: {text: x, regex: b, choice: [c, d]}", "a: choice and regex is 'given'; expected one of them"),
        ("a: {text: 'x {alt'}", "a: a { without its pair; expected {column}, or {{ and }} for braces"),
        ("a: {text: '{image} {image}'}", "expected {image} once, or not at all"),
        ("!!python/object/apply:os.system ['true']", "is not YAML: could not determine a constructor"),
    ],
)
def test_what_no_prompt_may_say_is_refused_naming_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("{", r"\{").replace("}", r"\}")):
        read(tmp_path, text)


def test_a_file_that_is_none_is_refused_naming_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--prompts .*nowhere.yaml: No such file or directory; expected a YAML file"):
        read_prompts(tmp_path / "nowhere.yaml", DecodingConfig(), TAKEN)


def test_beams_of_the_job_are_refused_for_a_constraint_and_taken_back_in_the_prompt(tmp_path: Path) -> None:
    text = "a: {{text: x, choice: [b, c]{more}}}"
    with pytest.raises(ConfigError, match="a: num_beams is 4; expected num_beams: 1"):
        read(tmp_path, text.format(more=""), DecodingConfig(num_beams=4))
    [prompt] = read(tmp_path, text.format(more=", num_beams: 1"), DecodingConfig(num_beams=4))
    assert prompt.decoding == DecodingConfig()


def test_the_words_that_no_prompt_is_named_by_are_those_that_duckdb_does_not_take_as_a_column() -> None:
    connection = duckdb.connect()
    words = {word for [word] in connection.execute("SELECT keyword_name FROM duckdb_keywords()").fetchall()}
    assert {word for word in words if not is_column(connection, word)} == SQL_WORDS


def is_column(connection: duckdb.DuckDBPyConnection, word: str) -> bool:
    connection.execute(f'CREATE OR REPLACE TABLE t AS SELECT 1 AS "{word}", 2 AS other')
    try:
        return connection.execute(f"SELECT other, {word} FROM t WHERE {word} = 1 ORDER BY {word}").fetchall() == [
            (2, 1)
        ]
    except duckdb.Error:
        return False


def test_an_identity_says_what_decides_on_answers_and_no_default(tmp_path: Path) -> None:
    plain, told = read(tmp_path, "a: x\nb: {texts: [y, 'z {c}'], system: s, stop: [;], max_new_tokens: 9}")
    assert plain.identity == {"text": "x", "decoding": {}}
    assert told.identity == {
        "texts": [["y", 1.0], ["z {c}", 1.0]],
        "system": "s",
        "decoding": {"max_new_tokens": 9, "stop": [";"]},
        "max_value_tokens": 256,
    }


def test_the_order_of_the_keys_of_a_schema_is_part_of_the_identity(tmp_path: Path) -> None:
    schema = "a: {{text: x, json_schema: {{type: object, properties: {{{}}}}}}}"
    first, second = (
        read(tmp_path, schema.format(order))[0].identity
        for order in ("n: {type: integer}, s: {type: string}", "s: {type: string}, n: {type: integer}")
    )
    assert json.loads(first["constraint"]) == json.loads(second["constraint"])
    assert first != second


@pytest.mark.parametrize(
    ("constraint", "text", "value"),
    [
        ("choice: [yes, no]", "yes", "yes"),
        ("regex: '[0-9]+'", "12", "12"),
        ("json_schema: {type: array}", "[1]", "[1]"),
        (
            "json_schema: {type: object, properties: {n: {type: integer}}, additionalProperties: false}",
            '{"n": 3}',
            {"n": 3},
        ),
    ],
)
def test_an_answer_that_is_not_whole_is_null(tmp_path: Path, constraint: str, text: str, value: object) -> None:
    [prompt] = read(tmp_path, f"a:\n  text: x\n  {constraint}")
    assert prompt.value(text, is_whole=True) == value
    assert prompt.value(text, is_whole=False) is None


def test_the_keys_of_a_schema_are_texts_as_in_json(tmp_path: Path) -> None:
    [prompt] = read(tmp_path, "a: {text: x, json_schema: {type: object, properties: {1: {type: string}}}}")
    assert prompt.constraint == {"json_schema": {"type": "object", "properties": {"1": {"type": "string"}}}}


def test_the_file_that_the_guide_shows_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "jobs" / "guide" / "prompts.md").read_text()
    prompts = {prompt.name: prompt for prompt in read(tmp_path, page.split("```yaml\n")[1].split("```")[0])}
    assert list(prompts) == ["caption", "detailed", "tags", "is_photo", "scene"]
    assert prompts["tags"].columns == {"alt_text"}
    place = {"num_people": 2, "place": "indoors"}
    assert prompts["scene"].value(json.dumps(place), is_whole=True) == place
