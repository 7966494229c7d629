"""The command line of every job: dataclass -> flags, `--config` file, exit code, JSON.

Knows tyro and nothing of captions, nor what a file holds. A job is a function from its config to a summary that can be
written as JSON. Lines for people go to stderr; stdout has data and nothing else: the summary, where it is no
terminal or `--json` asks for it. Exit 0 done, 1 failed, 2 wrong use, 130 ended by a signal. A job is named as
`package.module:name` and imported once the command line is right, so that a wrong flag and `--help` cost no import of
torch, Ray or Arrow.
"""

import contextlib
import importlib
import json
import logging
import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from captioner.config_file import merged, with_recipe
from captioner.errors import CaptionerError, ConfigError, UsageError
from captioner.terminal import say, visible_lines

__all__ = ["INTERRUPTED", "parse", "run"]

INTERRUPTED = 130
"""Exit code of a job that a signal has ended: 128 and SIGINT, as shells say it."""

Config = TypeVar("Config")
_HELP = frozenset({"-h", "--help"})


def run(
    config_type: type[Config],
    job: str | Callable[[Config], Mapping[str, Any]],
    arguments: Sequence[str] | None = None,
    *,
    continues: bool = True,
    details: Sequence[str] = (),
    program: str | None = None,
) -> int:
    """Parse the flags, call `job`, print its summary as JSON where that is asked for, and return the exit code.

    A summary whose `ok` is false is that of a job that ran and found something wrong: exit 1. job: a function, or its
    name as `package.module:name`. continues: whether the same command continues where an interrupted one stopped, or
    starts over. details: names of functions, as of `job`; the help ends with the texts that they return. program: what
    the help page calls the command, by default the script.
    """
    logging.basicConfig(level=logging.INFO, handlers=[_log_handler()])
    given, words = _split_switch("--json", sys.argv[1:] if arguments is None else arguments)
    try:
        config = parse(config_type, words, details, program)
        if given and getattr(config, "prints_rows", False):
            raise ConfigError("--json is given; expected --format json for rows: --json is for a summary")
        function = _named(job) if isinstance(job, str) else job
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a spot node's notice ends a job as Ctrl-C does
        if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGINT, signal.default_int_handler)
        summary = function(config)
    except CaptionerError as error:
        print(f"error: {visible_lines(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt as error:
        what_next = "continues where this one stopped" if continues else "starts over; nothing was written"
        what_came = [str(word) for word in error.args]
        say([f"interrupted: {'; '.join([*what_came, f'the same command {what_next}'])}"])
        return INTERRUPTED
    if summary and (given or not sys.stdout.isatty()):  # empty for a job whose data went to stdout
        print(json.dumps(_finite(summary), allow_nan=False), flush=True)
    return 0 if summary.get("ok", True) else 1


def _log_handler() -> logging.Handler:
    """Return a handler for stderr, in whose lines no name of a file commands the terminal."""

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return visible_lines(super().format(record))

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(asctime)s %(name)s %(message)s"))
    return handler


def _named(name: str) -> Callable[..., Any]:
    """Return the function that `package.module:name` names."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _finite(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse(
    config_type: type[Config], arguments: Sequence[str], details: Sequence[str] = (), program: str | None = None
) -> Config:
    """Return the config that `arguments` describe; flags win over the `--config` file, which wins over the defaults.

    Raises ConfigError for a bad value, SystemExit(2) for an unknown flag, SystemExit(0) after `--help`."""
    files, arguments = _split_config_flag(arguments)
    if files:
        arguments = merged(config_type, files[0], arguments)
    arguments = with_recipe(config_type, arguments)
    if _HELP.isdisjoint(arguments):
        return _parse(config_type, arguments, program=program)
    texts = [_named(name)() for name in details]
    return _parse(config_type, ["--help"], _defaults(config_type, arguments), texts, program)


def _defaults(config_type: type[Config], arguments: Sequence[str]) -> Config | None:
    """Return what a help page shows as the defaults: the other settings, where they are right."""
    try:
        return _parse(config_type, [word for word in arguments if word not in _HELP])
    except ConfigError:
        return None


def _parse(
    config_type: type[Config],
    arguments: Sequence[str],
    default: Config | None = None,
    details: Sequence[str] = (),
    program: str | None = None,
) -> Config:
    return tyro.cli(
        config_type,
        prog=program,
        args=list(arguments),
        default=tyro.MISSING_NONPROP if default is None else default,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        registry=_registry(),
        description="\n\n".join(
            [
                str(config_type.__doc__),
                *details,
                "--config FILE.yaml sets any of the flags below; a flag given here wins. --json prints the summary on"
                " stdout as JSON, also on a terminal; elsewhere that is where it goes. --version prints the version.",
            ]
        ),
    )


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Return tyro's rules and two of ours: a tuple of strings is `a,b` or a JSON list, a mapping is JSON."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def comma_separated(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if info.type != tuple[str, ...]:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="A,B",
            instance_from_str=lambda words: _texts(words[0]),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [json.dumps(value) if "," in "".join(value) else ",".join(value)],
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


def _texts(text: str) -> tuple[str, ...]:
    """Return the texts in `a,b`, or in a JSON list, where a text may have a comma."""
    if text.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(text)
            if all(isinstance(value, str) for value in values):
                return tuple(values)
    return tuple(part.strip() or part for part in text.split(",")) if text else ()


def _mapping(text: str) -> dict[str, object]:
    """Return the JSON object in `text`. The text itself stays out of the error: it may hold a secret."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError('expected a JSON object, such as {"anon": true}')
    return value


def _split_switch(name: str, arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Return whether a switch is among the arguments, and the others."""
    rest = [word for word in arguments if word != name]
    return len(rest) < len(arguments), rest


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
