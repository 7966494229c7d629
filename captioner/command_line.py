"""The command line of every job: dataclass -> flags, `--config` file, exit code, last line of JSON.

Knows tyro and nothing of captions. A job is a function from its config to a summary that can be written as JSON; data
goes to stdout, log and progress to stderr. Exit 0 done, 1 failed, 2 wrong use.
"""

import dataclasses
import difflib
import json
import logging
import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from captioner.errors import CaptionerError, ConfigError, UsageError

__all__ = ["parse", "run"]

Config = TypeVar("Config")
_POSITIONALS = ("input_path", "table", "labels_path", "output", "sql", "captions", "references")


def run(
    config_type: type[Config],
    job: Callable[[Config], Mapping[str, Any]],
    arguments: Sequence[str] | None = None,
    *,
    continues: bool = True,
) -> int:
    """Parse the flags, call `job`, print its summary as the last line of stdout and return the exit code.

    A summary whose `ok` is false is a job that did its work and found something wrong: exit 1. `continues` says whether
    the same command goes on where an interrupted one stopped, or begins anew.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a spot notice ends a job as Ctrl-C does
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    try:
        summary = job(parse(config_type, sys.argv[1:] if arguments is None else arguments))
    except CaptionerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        what_next = "continues where this one stopped" if continues else "begins anew; nothing was written"
        print(f"interrupted: the same command {what_next}", file=sys.stderr)
        return 1
    if summary:  # a job whose data went to stdout adds nothing to it
        print(json.dumps(_finite(summary), allow_nan=False), flush=True)
    return 0 if summary.get("ok", True) else 1


def _finite(value: Any) -> Any:
    """Return what JSON has a word for: a number that is none is null."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse(config_type: type[Config], arguments: Sequence[str]) -> Config:
    """Return the config that `arguments` describe; flags win over the `--config` file, which wins over the defaults.

    Raises ConfigError for a bad value, SystemExit(2) for an unknown flag, SystemExit(0) after `--help`."""
    files, arguments = _split_config_flag(arguments)
    default = _parse(config_type, _flags(config_type, files[0]), None) if files else None
    return _parse(config_type, arguments, default)


def _parse(config_type: type[Config], arguments: Sequence[str], default: Config | None) -> Config:
    return tyro.cli(
        config_type,
        args=list(arguments),
        default=tyro.MISSING_NONPROP if default is None else default,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        registry=_registry(),
        description=f"{config_type.__doc__}\n\n--config FILE.yaml sets any of the flags below; a flag given here wins.",
    )


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Return tyro's rules with two of ours: `a,b` is a tuple of strings, a mapping is written as JSON."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def comma_separated(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if info.type != tuple[str, ...]:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="A,B",
            instance_from_str=lambda words: (
                tuple(part.strip() or part for part in words[0].split(",")) if words[0] else ()
            ),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [",".join(value)],
        )

    @registry.primitive_rule
    def json_mapping(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if info.type not in (dict[str, object], dict[str, object] | None):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda words: _mapping(words[0]),
            is_instance=lambda value: value is None or isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(dict.fromkeys(value or {}, "..."))],  # the help page shows it
        )

    return registry


def _mapping(text: str) -> dict[str, object]:
    """Return the JSON object in `text`. The text itself stays out of the error: it may hold a secret."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError('expected a JSON object, such as {"anon": true}')
    return value


def _split_config_flag(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    files, rest, words = [], [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
        elif equals:
            files.append(Path(value))
        else:
            files.append(Path(next(words, "")))
    if len(files) > 1:
        raise ConfigError(f"--config is given {len(files)} times; expected once")
    return files, rest


def _flags(config_type: type, file: Path) -> list[str]:
    """Return the command line that says what the YAML `file` says."""
    settings = _read_yaml(file)
    known = set(_field_names(config_type))
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(known))}"
            raise ConfigError(f"{file}: unknown setting {name}; {hint}")
    positionals = [str(settings[name]) for name in _POSITIONALS if name in settings]
    return [
        word for name, value in settings.items() if name not in _POSITIONALS for word in _flag(name, value)
    ] + positionals


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}; expected a YAML file of settings") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {file} is not YAML: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file} is not YAML: {_problem(error)}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {file} holds a {type(settings).__name__}; expected `name: value` lines")
    return {str(name).replace("-", "_"): value for name, value in settings.items()}


def _problem(error: yaml.YAMLError) -> str:
    """Return what is wrong with a file, and where, but none of it: it may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or type(error).__name__}{where}"


def _flag(name: str, value: object) -> list[str]:
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    if isinstance(value, dict):
        return [f"--{dashed}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{dashed}", ",".join(map(str, value))]
    return [f"--{dashed}", str(value)]


def _field_names(config_type: Any) -> list[str]:
    names = []
    for field in dataclasses.fields(config_type):
        nested = field.type if dataclasses.is_dataclass(field.type) else None
        names += _field_names(nested) if nested else [field.name]
    return names
