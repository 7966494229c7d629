"""What a file of prompts may say, and what it is told of all else."""

from pathlib import Path

import pytest

from captioner.config import DecodingConfig
from captioner.errors import ConfigError
from captioner.prompts import Prompt, read_prompts
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
        ("a: {text: x, temperature: 0.5}", "a: --temperature is 0.5; expected --do-sample with it"),
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
