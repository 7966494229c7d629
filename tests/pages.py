"""The pages of prose of this repository, and the commands that stand in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "jobs" / "guide"
PAGES = [ROOT / "README.md", *(page for room in ("jobs", "captioner", "tests") for page in (ROOT / room).rglob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def shell_blocks(text: str) -> list[str]:
    """Return the blocks that are typed as they stand."""
    return re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command in blocks and between backticks that begins with `python`, `pytest` or `ray`.

    Of a submission the command that is submitted is yielded."""
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:python|pytest) [^`]+)`", without_blocks(text))
    for line in [*"\n".join(blocks).splitlines(), *(" ".join(command.split()) for command in inline)]:
        for command in line.split("&&"):
            words = shlex.split(command.partition(" -- ")[2] or command, comments=True)
            if words and words[0] in ("python", "pytest", "ray"):
                yield words
