"""What a terminal may be given: text without the characters that command it.

The author of an image, a table or a model chose its names and captions. ESC and U+009B start commands to a terminal,
bidirectional marks reorder a line. Knows nothing of where text comes from.
"""

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

__all__ = ["command", "counted", "say", "visible", "visible_lines"]

_REPLACED = "\N{REPLACEMENT CHARACTER}"
_JOINERS = "\u200c\u200d"  # Persian, Hindi and emoji are written with them


def say(lines: Iterable[str], file: TextIO | None = None) -> None:
    """Print lines for people, by default to stderr."""
    for line in lines:
        print(visible_lines(line), file=file or sys.stderr)


def command(name: str, *arguments: str) -> str:
    """Return a command of this package that can be copied, quoted for a shell.

    It is called as this process was: `captioner verify OUTPUT`, or `python jobs/verify.py OUTPUT` from a script there.
    """
    script = Path(sys.argv[0])
    is_script = script.parent.name == "jobs" and script.suffix == ".py"
    program = ["python", str(script.with_name(f"{name}.py"))] if is_script else ["captioner", name]
    return shlex.join([*program, *arguments])


def counted(count: int, noun: str) -> str:
    """Return `1 run` or `2 runs`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def visible(text: str) -> str:
    """Return `text` on one line: any white space is a space, a character that cannot be shown is U+FFFD."""
    return text if text.isprintable() else "".join(map(_shown, text))


def visible_lines(text: str) -> str:
    """Return `text` as `visible` does, with its line breaks and tabs."""
    return "".join(letter if letter in "\n\t" else _shown(letter) for letter in text)


def _shown(letter: str) -> str:
    if letter.isprintable() or letter in _JOINERS:
        return letter
    return " " if letter.isspace() and letter not in "\x1c\x1d\x1e\x1f\x85" else _REPLACED
