"""The prompt of a published checkpoint: what the user asks for, written as its language model was trained to read it.

Knows a tokenizer, its chat template and its family's turns; of an image, its mark alone.
"""

from dataclasses import dataclass
from typing import Any

from captioner.errors import BundleError, ConfigError
from captioner.model.chat_templates import read_chat_template, render
from captioner.model.folder import Folder
from captioner.model.language.language import LanguageFamily
from captioner.model.layouts.layout import CheckpointOptions, Opener
from captioner.model.template import IMAGE, Template
from captioner.model.tokenizer import Tokenizer, read_tokenizer
from captioner.model.turns import QUESTION

__all__ = ["CheckpointTurns", "read_checkpoint_tokenizer", "read_template"]

_QUESTION = "Describe the image in one sentence."
_WHOLE = "give the whole prompt, as --prompt 'USER: {image}\\nDescribe the image. ASSISTANT:'"


def read_checkpoint_tokenizer(folder: Folder, options: CheckpointOptions, opener: Opener) -> tuple[Folder, Tokenizer]:
    """Return the tokenizer of a checkpoint, or the one that the user named, and its folder."""
    where = opener.open(options.tokenizer, folder, needs_weights=False) if options.tokenizer else folder
    if not where.has("tokenizer.json") and not options.tokenizer:
        raise BundleError(
            f"{folder.name} has no tokenizer: expected tokenizer.json, or the tokenizer of its language model by "
            "--tokenizer, a folder or a hub id"
        )
    return where, read_tokenizer(where)


@dataclass(frozen=True)
class CheckpointTurns:
    """Turns as a checkpoint's chat template or its family writes them; a question with the image is a whole prompt."""

    folder: Folder
    tokenizer: Tokenizer
    family: LanguageFamily
    image_token: str
    system: str | None = None

    def skeleton(self, system: str | None, *, has_image: bool, where: str) -> str:
        """Return a turn around the question, or the question alone where it has the image."""
        if not has_image:
            return _turn(self.folder, self.tokenizer, self.family, self.image_token, QUESTION, system)
        if system is not None:
            raise ConfigError(
                f"{where}: there is a system text beside a whole prompt, which is taken as it is; expected a question "
                "without {image}, or the system text inside"
            )
        return QUESTION

    def question_of(self, template: str) -> str:
        """Return the template, which is a whole prompt."""
        return template


def read_template(
    folder: Folder, tokenizer: Tokenizer, family: LanguageFamily, options: CheckpointOptions, image_token: str
) -> Template:
    """Return the prompt of a checkpoint whose tokenizer is in the folder.

    A prompt with `{image}` is whole. A question becomes a turn: by the chat template, else as the family writes it.
    image_token: by which the tokenizer and its chat template know an image. Raises BundleError if no prompt is known
    for the tokenizer, and ConfigError for a system prompt beside a whole one."""
    prompt = (options.prompt or _QUESTION).replace("<image>", IMAGE)  # as model cards write it
    if IMAGE not in prompt:
        prompt = _turn(folder, tokenizer, family, image_token, prompt, options.system_prompt)
    elif options.system_prompt is not None:
        raise ConfigError(
            f"--system-prompt is {options.system_prompt!r}, but --prompt {options.prompt!r} is a whole prompt, taken "
            "as it is; expected a question without {image}, or the system prompt inside"
        )
    return Template.parse(prompt, tokenizer, image_token)


def _turn(
    folder: Folder, tokenizer: Tokenizer, family: LanguageFamily, image_token: str, question: str, system: str | None
) -> str:
    chat_template = read_chat_template(folder)
    if chat_template is not None:
        return _rendered(chat_template, folder, tokenizer, image_token, question, system)
    known = tokenizer.get_added_vocab()
    turn = next((turn for turn in family.turns if turn.needs in known), None)
    if turn is None:
        raise BundleError(
            f"the tokenizer in {folder.name} has no chat template and is not one of {family.name}, which has "
            f"{' or '.join(turn.needs for turn in family.turns)}, so its prompt is not known; {_WHOLE}"
        )
    return turn.render(question, system)


def _rendered(
    chat_template: str, folder: Folder, tokenizer: Tokenizer, image_token: str, question: str, system: str | None
) -> str:
    """Return the turn that a chat template writes, with `{image}` where the image goes.

    Templates differ in how a message names its image: they add it to the first question, or read it as a part of the
    message, or take the text as it is. The first way that gives one image and the question is the template's."""
    tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    as_parts = [{"type": "image"}, {"type": "text", "text": question}]
    ways: list[tuple[Any, Any]] = [
        (question, system),
        (as_parts, system if system is None else [{"type": "text", "text": system}]),
        (as_parts, system),
        (f"{image_token}\n{question}", system),
    ]
    refusal: BundleError | None = None
    for content, told in ways:
        messages = [] if told is None else [{"role": "system", "content": told}]
        try:
            text = render(chat_template, [*messages, {"role": "user", "content": content}], tokens, where=folder.name)
        except BundleError as error:
            refusal = error
            continue
        if text.count(image_token) == 1 and question in text and (system or "") in text:
            return _start(tokenizer, text) + text.replace(image_token, IMAGE)
    raise refusal or BundleError(
        f"the chat template in {folder.name} writes no prompt with one {image_token} and the question; {_WHOLE}"
    )


def _start(tokenizer: Tokenizer, text: str) -> str:
    """Return the start token that the tokenizer itself would add to a text: never a second one."""
    adds = tokenizer("", add_special_tokens=True).input_ids[:1]
    is_added = bool(adds) and adds[0] == tokenizer.bos_token_id
    has_one = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    return str(tokenizer.bos_token) if is_added and not has_one else ""
