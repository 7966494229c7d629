"""Chat templates, rendered as transformers renders them: in jinja2's sandbox, with its options and functions.

Knows text alone. A template comes with a checkpoint, so nothing that it is given can be changed or called back; and
what depends on the day is the same every day, so that a caption table can be continued.
"""

import json
from collections.abc import Mapping
from typing import Any

from captioner.errors import BundleError
from captioner.model.folder import Folder

__all__ = ["read_chat_template", "render"]

Messages = list[dict[str, Any]]

_TODAY = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
"""The day on which every template is rendered: the default of LLaMA 3.1's own."""


def read_chat_template(folder: Folder) -> str | None:
    """Return the chat template of a folder, in the order in which transformers looks for it; None without one."""
    if folder.has("chat_template.jinja"):
        return folder.read("chat_template.jinja").decode("utf-8", "replace")
    for file in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = folder.read_json_if_any(file).get("chat_template")
        if isinstance(found, list):
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def render(template: str, messages: Messages, tokens: Mapping[str, str | None], *, where: str) -> str:
    """Return the text of a conversation up to the assistant's turn. tokens: as `bos_token`, for the template.

    Raises BundleError where the template refuses the conversation, or is none."""
    from jinja2 import TemplateError  # here and below, not above: most models are described without

    try:
        return str(_environment().from_string(template).render(messages=messages, add_generation_prompt=True, **tokens))
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BundleError(
            f"the chat template in {where} cannot write this conversation: {type(error).__name__}: {error}; give the "
            "whole prompt, as --prompt 'USER: {image}\\nDescribe the image. ASSISTANT:'"
        ) from error


def _environment() -> Any:
    import jinja2.ext
    from jinja2 import TemplateError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the assistant says in training data; here it is its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime}
    return environment


def _tojson(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False} | options)


def _strftime(pattern: str) -> str:
    for code, value in _TODAY.items():
        pattern = pattern.replace(code, value)
    return pattern
