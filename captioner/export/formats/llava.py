"""`llava`: conversations as LLaVA's training reads them: the prompt that was asked, and the caption as its answer.

Of several captions of an image each is a conversation of its own.
"""

import re
from collections.abc import Iterator
from typing import IO, Any

from captioner.export.formats.documents import encoded, write_members
from captioner.export.request import ExportFormat, Request, Shard

__all__ = ["LLAVA", "question"]

_IMAGE = "<image>"
_ROLE = r"<\|start_header_id\|>\w*<\|end_header_id\|>"  # `user` and `assistant` are no words of the prompt
_SPECIAL = re.compile(rf"{_ROLE}|<\|[^|<>\s]*\|>|\{{image\}}")


def question(prompt: str) -> str:
    """Return what the human says: the prompt without the tokens of a template, below the mark of the image."""
    words = _SPECIAL.sub("", prompt).replace(_IMAGE, "").strip()
    return f"{_IMAGE}\n{words}" if words else _IMAGE


def _write(shard: Shard) -> None:
    def write(file: IO[bytes]) -> None:
        write_members(file, _conversations(shard), b"[", b"]\n")

    shard.publish(LLAVA.file_of(shard.number), write)


def _conversations(shard: Shard) -> Iterator[bytes]:
    for batch in shard.rows:
        for row in batch.to_pylist():
            asked = question(_prompt(shard.request, row["run_id"]))
            for number, text in enumerate(row["texts"]):
                name = str(row["key"]) if not number else f"{row['key']}-{number}"
                yield encoded(_conversation(name, row["image_id"], asked, text))


def _prompt(request: Request, run_id: str) -> str:
    return request.config.prompt if request.config.prompt is not None else request.prompts.get(run_id, "")


def _conversation(name: str, image: str, asked: str, text: str) -> dict[str, Any]:
    says = [{"from": "human", "value": asked}, {"from": "gpt", "value": text}]
    return {"id": name, "image": image, "conversations": says}


LLAVA = ExportFormat(
    name="llava",
    help="LLaVA's conversations, with the prompt that was asked",
    columns=lambda request: {"image_id": "image_id", "run_id": "run_id", "texts": request.texts},
    write=_write,
    file="captions-{:05d}.json",
    has_several=True,
    needs_prompts=True,
)
