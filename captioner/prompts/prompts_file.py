"""`--prompts FILE`: YAML with a prompt under each name.

    caption: Describe the image in one sentence.
    tags:
      text: "List five tags. {?alt_text: The page says: {alt_text}.}"
      max_new_tokens: 40
    style:
      texts: [{text: Describe its style., weight: 3}, {text: Name the artist., weight: 1}]
    is_photo:
      text: Is it a photograph?
      choice: [yes, no]

A plain word is a text where a text is expected: `yes` and `no` too. Knows YAML and what a prompt may say; the columns
of the input and the model are checked by who knows them.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from captioner.config import DecodingConfig
from captioner.errors import ConfigError
from captioner.prompts.answer_columns import CAPTION, details_name, is_prompt_name
from captioner.prompts.spec import Prompt, WeightedText
from captioner.prompts.sql_words import SQL_WORDS
from captioner.prompts.text import PromptText

__all__ = ["read_prompts"]

_DECODING = {field.name: field for field in dataclasses.fields(DecodingConfig) if field.name != "seed"}
_CONSTRAINTS = ("choice", "regex", "json_schema")
_KEYS = ("text", "texts", "system", "max_value_tokens", *_CONSTRAINTS, *_DECODING)
_NEVER_TRIMMED = "none in a prompt with a constraint, whose answers are whole or null"
_MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML 1.2's words: `yes`, `no`, `on` and `off` are texts. No key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping. Raises ConstructorError for a key that it has twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:str" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_prompts(file: Path, decoding: DecodingConfig, taken: frozenset[str]) -> tuple[Prompt, ...]:
    """Return the prompts of a file, in its order. decoding: what a prompt does not change. taken: names of columns that
    a table has already.

    Raises ConfigError for a file that is none, and for what no prompt may say.
    """
    found = _load(file)
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"--prompts {file} holds no `name: prompt` lines; expected one for each column")
    return tuple(
        _prompt(f"{file}: {name}", _name(file, name, taken), content, decoding) for name, content in found.items()
    )


def _load(file: Path) -> Any:
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"--prompts {file} has more than {_MAX_BYTES:,} bytes; expected a file of prompts")
        return yaml.load(file.read_text("utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"--prompts {file}: {error.strerror}; expected a YAML file of prompts") from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(
            f"--prompts {file} is not YAML: {type(error).__name__}; expected a file of prompts"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"--prompts {file} is not YAML: {getattr(error, 'problem', error)}{where}") from error


def _name(file: Path, name: Any, taken: frozenset[str]) -> str:
    if isinstance(name, str) and name.endswith(details_name("")):
        raise ConfigError(f"--prompts {file}: {name} ends as the details of prompts do; expected another name")
    if not isinstance(name, str) or not is_prompt_name(name):
        raise ConfigError(
            f"--prompts {file}: a prompt is named {name!r}; expected a-z, 0-9 and _, beginning with a letter"
        )
    if name in taken - {CAPTION}:
        raise ConfigError(f"--prompts {file}: {name} is a column that every table has; expected another name")
    if name in SQL_WORDS:
        raise ConfigError(f"--prompts {file}: {name} is a word of SQL; expected another name, such as {name}_1")
    return name


def _prompt(where: str, name: str, content: Any, decoding: DecodingConfig) -> Prompt:
    said: Mapping[str, Any] = {"text": content} if isinstance(content, str) else content
    if not isinstance(said, dict):
        raise ConfigError(f"{where} is {_shown(content)}; expected a text, or text: and what else it says")
    for key in said:
        if key not in _KEYS:
            close = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(_KEYS)}"
            raise ConfigError(f"{where}: unknown setting {key}; {hint}")
    limit = said.get("max_value_tokens", Prompt.max_value_tokens)
    _require(
        isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1,
        where,
        "max_value_tokens",
        limit,
        "1 or more",
    )
    constraint, own = _constraint(where, said), _decoding(where, said, decoding)
    if constraint:
        _check_takes_constraint(where, own)
        _require(said.get("trim_to_sentence") is not True, where, "trim_to_sentence", True, _NEVER_TRIMMED)
        own = replace(own, trim_to_sentence=False)
    system = said.get("system")
    _require(system is None or isinstance(system, str), where, "system", system, "a text")
    return Prompt(
        name=name,
        texts=_texts(where, said),
        system=None if system is None else _parsed(where, system),
        decoding=own,
        max_value_tokens=limit,
        constraint=constraint,
    )


def _texts(where: str, said: Mapping[str, Any]) -> tuple[WeightedText, ...]:
    if ("text" in said) == ("texts" in said):
        raise ConfigError(
            f"{where} has {'both text and texts' if 'text' in said else 'no text'}; expected one of the two"
        )
    if "text" in said:
        _require(isinstance(said["text"], str) and bool(said["text"].strip()), where, "text", said["text"], "a text")
        return (WeightedText(_parsed(where, said["text"])),)
    choices = said["texts"]
    _require(isinstance(choices, list) and bool(choices), where, "texts", choices, "a list of texts")
    return tuple(_weighted(where, choice) for choice in choices)


def _weighted(where: str, choice: Any) -> WeightedText:
    found = {"text": choice} if isinstance(choice, str) else choice
    is_well = isinstance(found, dict) and isinstance(found.get("text"), str) and set(found) <= {"text", "weight"}
    _require(is_well, where, "texts", choice, "texts, or {text: ..., weight: ...}")
    weight = found.get("weight", 1)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < float("inf")
    _require(is_number, where, "weight", weight, "a number above 0")
    return WeightedText(_parsed(where, found["text"]), float(weight))


def _parsed(where: str, text: str) -> PromptText:
    found = PromptText.parse(text.replace("<image>", "{image}"), where)  # as model cards write it
    _require(found.num_images <= 1, where, "text", text, "{image} once, or not at all")
    return found


def _decoding(where: str, said: Mapping[str, Any], decoding: DecodingConfig) -> DecodingConfig:
    changed = {key: _value(where, key, said[key]) for key in _DECODING if key in said}
    try:
        return replace(decoding, **changed)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _value(where: str, key: str, value: Any) -> Any:
    """Return a setting of the decoding in its type."""
    kind = _DECODING[key].type
    if key == "stop":
        stops = [value] if isinstance(value, str) else value
        _require(isinstance(stops, list) and all(isinstance(stop, str) for stop in stops), where, key, value, "texts")
        return tuple(stops)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        _require(isinstance(value, bool), where, key, value, "true or false")
    elif kind is int:
        _require(is_number and isinstance(value, int), where, key, value, "a whole number")
    else:
        _require(is_number, where, key, value, "a number")
        return float(value)
    return value


def _constraint(where: str, said: Mapping[str, Any]) -> dict[str, Any] | None:
    given = [key for key in _CONSTRAINTS if key in said]
    if not given:
        return None
    _require(len(given) == 1, where, " and ".join(given), "given", "one of them")
    key, value = given[0], said[given[0]]
    if key == "choice":
        is_well = isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) and one for one in value)
        _require(is_well, where, key, value, "a list of two texts or more")
        _require(len(set(value)) == len(value), where, key, value, "texts that differ")
    elif key == "regex":
        _require(isinstance(value, str) and bool(value), where, key, value, "a regular expression")
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"{where}: regex is {value!r}: {error}; expected a regular expression") from error
    else:
        _require(isinstance(value, dict), where, key, value, "a JSON schema, as a mapping")
        value = json.loads(json.dumps(value, default=str))  # in YAML a key may be a number
    return {key: value}


def _check_takes_constraint(where: str, decoding: DecodingConfig) -> None:
    for key in ("num_beams", "min_new_tokens", "stop"):
        value, default = getattr(decoding, key), getattr(DecodingConfig, key)
        shown = list(value) if isinstance(value, tuple) else value
        remedy = f"{key}: {list(default) if isinstance(default, tuple) else default} in a prompt with a constraint"
        _require(value == default, where, key, shown, remedy)


def _require(holds: bool, where: str, key: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{where}: {key} is {_shown(value)}; expected {expected}")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text[:80]) if isinstance(value, str) else text[:80]
