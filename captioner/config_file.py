"""A `--config` file and the words of a command line as one command line, which is parsed once.

A scalar in the file means what it means after its flag: it is the text that stands there, `1:8` and `no` too. An empty
one and null leave the default. Options that a flag takes as JSON have JSON's values. A config may have recipes: named
settings, which `--recipe` puts below both. Knows YAML and the fields of a config; checks no value.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from tyro.conf import Positional, UseAppendAction

from captioner.errors import ConfigError

__all__ = ["flag_names", "merged", "with_recipe"]

_POSITIONAL, _APPENDED = (get_args(marker[str])[1] for marker in (Positional, UseAppendAction))
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class _Field:
    """A setting: its field in the config and what its flag takes."""

    kind: Any
    default: Any
    marks: tuple[Any, ...] = ()

    @property
    def is_positional(self) -> bool:
        return _POSITIONAL in self.marks

    @property
    def is_appended(self) -> bool:
        return _APPENDED in self.marks

    @property
    def takes_json(self) -> bool:
        return dict in (get_origin(self.kind), *map(get_origin, get_args(self.kind)))


def merged(config_type: type, file: Path, arguments: Sequence[str]) -> list[str]:
    """Return the command line of a file's settings and of `arguments`, which win.

    Words without a flag are those that the file leaves open, in their order; where there are more of them, or it leaves
    none open, they are the first ones. Raises ConfigError for a file that is none, or names an unknown setting."""
    fields = dict(_fields(config_type))
    settings = {name: _words(file, name, fields[name], node) for name, node in _read(file, fields).items()}
    given, flags, free = _sorted(arguments, fields)
    from_file = [
        word
        for name, words in settings.items()
        if not fields[name].is_positional and (fields[name].is_appended or name not in given)
        for word in words
    ]
    return [*from_file, *flags, *_positionals(fields, settings, free)]


def with_recipe(config_type: type, arguments: Sequence[str]) -> list[str]:
    """Return the command line with the settings of its `--recipe`, where it has one, that it does not set itself."""
    recipes = getattr(config_type, "recipes", {})
    given, flags, _ = _sorted(arguments, dict(_fields(config_type)) if recipes else {})
    named = [value for flag, value in _valued(flags) if flag == "--recipe"]
    if not named or named[-1] not in recipes:  # an unknown one is refused with the other flags
        return list(arguments)
    settings = recipes[named[-1]].settings
    filled = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name not in given]
    return [*filled, *arguments]


def flag_names(config_type: type) -> list[str]:
    """Return the flags of a config, in their order, for a shell that completes them."""
    return ["--" + name.replace("_", "-") for name, field in _fields(config_type) if not field.is_positional]


def _fields(config_type: Any) -> Iterator[tuple[str, _Field]]:
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(field.type):
            yield from _fields(field.type)
        else:
            kind, *marks = get_args(field.type) if hasattr(field.type, "__metadata__") else [field.type]
            yield field.name, _Field(kind, field.default, tuple(getattr(field.type, "__metadata__", marks)))


# The words of the command line


def _sorted(arguments: Sequence[str], fields: Mapping[str, _Field]) -> tuple[set[str], list[str], list[str]]:
    """Return the settings that flags name, these flags with their values, and the words without a flag."""
    given, flags, free = set(), [], []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-") or word == "-":
            free.append(word)
            continue
        flags.append(word)
        name, equals, _ = word.lstrip("-").replace("-", "_").partition("=")
        is_switch = name not in fields or fields[name].kind is bool
        given.add(name.removeprefix("no_") if name not in fields else name)
        if not equals and not is_switch:
            flags += [value for value in [next(words, None)] if value is not None]
    return given, flags, free


def _valued(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each flag with the word that follows it, or what stands behind its equals sign."""
    for place, word in enumerate(flags):
        name, equals, value = word.partition("=")
        yield name, value if equals else next(iter(flags[place + 1 : place + 2]), "")


def _positionals(fields: Mapping[str, _Field], settings: Mapping[str, list[str]], free: list[str]) -> list[str]:
    names = [name for name, field in fields.items() if field.is_positional]
    left_open = [name for name in names if name not in settings]
    places = left_open if len(free) <= len(left_open) else names
    found = {name: settings[name][0] for name in names if name in settings}
    found |= dict(zip(places, free, strict=False))
    last = max((place for place, name in enumerate(names, 1) if name in found), default=0)
    return [str(found.get(name, fields[name].default)) for name in names[:last]] + free[len(places) :]


# The file


def _read(file: Path, fields: Mapping[str, _Field]) -> dict[str, yaml.Node]:
    """Return the settings of a file that are no null."""
    root = _root(file)
    if root is None or _is_null(root):
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"--config {file} holds a {_kind(root)}; expected `name: value` lines")
    found: dict[str, yaml.Node] = {}
    for key, node in root.value:
        name = str(key.value).replace("-", "_")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(fields))}"
            raise ConfigError(f"{file}: unknown setting {name}; {hint}")
        if name in found:
            raise ConfigError(f"{file}, line {key.start_mark.line + 1}: {name} is set twice; expected once")
        found[name] = node
    return {name: node for name, node in found.items() if not _is_null(node)}


def _root(file: Path) -> yaml.Node | None:
    try:
        root: yaml.Node | None = yaml.compose(file.read_text("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}; expected a YAML file of settings") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {file} is not YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"--config {file} is nested too deep; expected `name: value` lines") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file} is not YAML: {_problem(error)}") from error
    return root


def _problem(error: yaml.YAMLError) -> str:
    """Return what is wrong with a file, and in which line. Quotes nothing of it: it may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or type(error).__name__}{where}"


def _words(file: Path, name: str, field: _Field, node: yaml.Node) -> list[str]:
    """Return the flag with its value; of a setting without a flag the value alone. Quotes no value of JSON options."""
    where = f"{file}, line {node.start_mark.line + 1}: {name}"
    flag = "--" + name.replace("_", "-")
    if field.takes_json and isinstance(node, yaml.MappingNode):
        return [f"{flag}={json.dumps(_json_value(node, where))}"]
    if isinstance(node, yaml.SequenceNode) and get_origin(field.kind) in (list, tuple):
        texts = [_text(item, where, "a list of texts") for item in node.value]
        return [f"{flag}={text}" for text in texts] if field.is_appended else [f"{flag}={json.dumps(texts)}"]
    text = _text(node, where, "a mapping" if field.takes_json else "one value")
    if field.is_positional:
        return [text]
    return [_switch(flag, text, where)] if field.kind is bool else [f"{flag}={text}"]


def _text(node: yaml.Node, where: str, expected: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{where} holds a {_kind(node)}; expected {expected}")
    return str(node.value)


def _switch(flag: str, text: str, where: str) -> str:
    if text.lower() not in _TRUE + _FALSE:
        raise ConfigError(f"{where} is {text}; expected true or false")
    return flag if text.lower() in _TRUE else "--no-" + flag.removeprefix("--")


def _json_value(node: yaml.Node, where: str) -> Any:
    """Return a value of options as JSON has it: only a plain word can be a number, true, false or null."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: _json_value(item, f"{where}.{key.value}") for key, item in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_json_value(item, where) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)
    if node.style is not None:
        return node.value
    if node.value.lower() in ("yes", "no", "on", "off"):
        raise ConfigError(f"{where} is {node.value}; expected true or false, or quotes around a text")
    try:
        return None if _is_null(node) else json.loads(node.value.lower() if node.value.istitle() else node.value)
    except ValueError:
        return node.value


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "text"
    return "list" if isinstance(node, yaml.SequenceNode) else "mapping"
