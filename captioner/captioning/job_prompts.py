"""The named prompts of a job: read once, on the driver, and refused there where a worker could not be given them.

Knows the config and what is known of a model without loading it; no images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from captioner.captioning.questions import check_prompts
from captioner.config import CaptionJobConfig, DecodingConfig, InputConfig
from captioner.errors import ConfigError
from captioner.inputs.columns import RESERVED_COLUMNS
from captioner.model.constraints import Constraint
from captioner.model.description import BundleDescription
from captioner.model.template import IMAGE
from captioner.prompts import (
    CAPTION,
    Prompt,
    PromptText,
    WeightedText,
    answer_fields,
    answered_prompts,
    details_name,
    read_prompts,
)

__all__ = [
    "answers_of",
    "asked_prompts",
    "check_model_takes",
    "prompt_lines",
    "read_job_prompts",
    "with_prompt_columns",
]


def read_job_prompts(config: CaptionJobConfig) -> tuple[Prompt, ...]:
    """Return the prompts of `--prompts`, none without it. Raises ConfigError for what a job cannot ask."""
    if config.prompts is None:
        return ()
    prompts = read_prompts(Path(config.prompts), config.decoding, RESERVED_COLUMNS)
    has_caption = CAPTION in [prompt.name for prompt in prompts]
    if has_caption and config.model.prompt is not None:
        raise ConfigError(
            f"--prompt is {config.model.prompt!r}; expected none beside --prompts {config.prompts}, which has"
            f" {CAPTION}: each says what captions answer. Leave out --prompt, or {CAPTION} in the file"
        )
    decodings = [prompt.decoding for prompt in prompts] + ([] if has_caption else [config.decoding])
    needed = sum(max(decoding.num_beams, decoding.num_captions) for decoding in decodings)
    if config.resources.slots != "auto" and int(config.resources.slots) < needed:
        raise ConfigError(
            f"--slots is {config.resources.slots}; expected at least {needed}, the captions and beams of all prompts"
        )
    return prompts


def asked_prompts(prompts: Sequence[Prompt], model: BundleDescription, decoding: DecodingConfig) -> tuple[Prompt, ...]:
    """Return what is asked by name: of prompts without `caption`, the model's own prompt under that name, too."""
    if not prompts or CAPTION in [prompt.name for prompt in prompts]:
        return tuple(prompts)
    text = IMAGE.join(words.replace("{", "{{").replace("}", "}}") for words in model.own_question.split(IMAGE))
    own = WeightedText(PromptText.parse(text, CAPTION))
    return (Prompt(name=CAPTION, texts=(own,), decoding=decoding), *prompts)


def answers_of(decoding: DecodingConfig, prompts: Sequence[Prompt]) -> list[pa.Field]:
    """Return the columns that the answers to prompts, or without any the captions, add to a table."""
    named = {prompt.name: prompt.identity for prompt in prompts}
    return answer_fields(named or answered_prompts({"decoding": vars(decoding)}))


def with_prompt_columns(access: InputConfig, prompts: Sequence[Prompt], answers: Sequence[pa.Field]) -> InputConfig:
    """Return an access that keeps every column that a prompt names. answers: as `answers_of` returns them.

    Raises ConfigError for a column that would be kept under the name of one of these."""
    asked = sorted(frozenset().union(*(prompt.columns for prompt in prompts)))
    if wrong := [name for name in asked if "=" in name]:
        raise ConfigError(f"--prompts names a column {wrong[0]}; expected a name without =")
    access = replace(access, prompt_columns=tuple(asked))
    ours = {field.name for field in answers} | ({details_name(CAPTION)} if prompts else set())
    for new, old in access.kept_columns.items():
        if new.lower() in ours:
            raise ConfigError(
                f"{access.flag_of(old)} {old}: {new} is a column of the answers; rename it, as --keep-columns"
                f" {old}=input_{new.lower()}{', or the prompt' if prompts else ''}"
            )
    return access


def check_model_takes(prompts: Sequence[Prompt], model: BundleDescription) -> None:
    """Raise ConfigError for a prompt that a model cannot be given, or a constraint that llguidance does not take."""
    writer = model.prompt_writer
    check_prompts(prompts, writer, num_image_tokens=model.num_image_tokens, context_length=model.context_length)
    for prompt in prompts:
        if prompt.constraint is not None:
            where = f"the prompt {prompt.name}"
            Constraint(prompt.constraint, writer.tokenizer_json, model.eos_token_ids, where)


def prompt_lines(prompts: Sequence[Prompt], model: BundleDescription) -> Iterator[str]:
    """Yield each prompt as people read it in a plan: its tokens, and what is special in its decoding."""
    for prompt in prompts:
        before, after = model.prompt_writer.most_tokens(prompt)
        at_most = "at most " if prompt.columns else ""
        own = {name: value for name, value in prompt.identity.items() if name not in ("text", "texts", "system")}
        decoding = ", ".join(f"{name} {value}" for name, value in own.pop("decoding").items())
        constraint = next(iter(prompt.constraint)) if prompt.constraint else ""
        told = [f"{at_most}{before + after} tokens and the image", decoding, constraint]
        columns = ", ".join(f"{{{name}}}" for name in sorted(prompt.columns))
        yield f"{prompt.name}: " + "; ".join(filter(None, [*told, columns]))
