"""The prompt of a published checkpoint: by its chat template as transformers renders it, else as its family writes."""

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from captioner.config import DecodingConfig, ModelConfig
from captioner.errors import BundleError, ConfigError
from captioner.model.bundle import describe, load
from captioner.model.chat_templates import render
from tests.unit.model.tiny_models import edit_json, language_config, llama3_tokenizer, save_llava, write_json

OF_LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
OF_PARTS = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ADDS_ITS_OWN = (
    "{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '|' }}{% set messages = messages[1:] %}"
    "{% endif %}{{ '<|eot_id|><image><|eot_id|>' + messages[0]['content'].replace('<image>', '').lstrip() }}\n"
    "{%- if add_generation_prompt %}{% generation %}{{ '=' }}{% endgeneration %}{% endif %}"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava") / "llava")


@pytest.fixture
def llava(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "llava"))


def test_the_template_of_the_tokenizer_is_taken_and_adds_one_start_token(llava: Path) -> None:
    before = describe(str(llava)).fingerprint
    edit_json(llava / "tokenizer_config.json", chat_template=OF_LLAMA_3)
    assert describe(str(llava)).fingerprint == before, "the family's turn is that of LLaMA-3-Instruct's own template"
    told = describe(str(llava), prompt="How many?", system_prompt="Be brief.").template
    assert told == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n{image}\nHow many?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_template_that_reads_parts_of_a_message_gets_them(llava: Path) -> None:
    write_json(llava / "chat_template.json", {"chat_template": OF_PARTS})
    assert describe(str(llava), prompt="Why?").template == "<|begin_of_text|>USER: {image}\nWhy? ASSISTANT:"
    told = describe(str(llava), prompt="Why?", system_prompt="Be brief.").template
    assert told == "<|begin_of_text|>SYSTEM: Be brief. USER: {image}\nWhy? ASSISTANT:"


def test_a_template_that_adds_the_image_itself_gets_the_question_alone(llava: Path) -> None:
    (llava / "chat_template.jinja").write_text(ADDS_ITS_OWN)
    told = describe(str(llava), prompt="Why?", system_prompt="S").template
    assert told == "<|begin_of_text|>S|<|eot_id|>{image}<|eot_id|>Why?="


@pytest.mark.parametrize("template", [OF_LLAMA_3, OF_PARTS, ADDS_ITS_OWN])
def test_templates_are_rendered_as_transformers_does(template: str) -> None:
    tokenizer: PreTrainedTokenizerFast = llama3_tokenizer()
    for content in ("<image>\nWhy?", [{"type": "image"}, {"type": "text", "text": "Why?"}]):
        messages = [{"role": "user", "content": content}]
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        try:
            theirs = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception:
            with pytest.raises(BundleError, match="the chat template in here cannot write this conversation"):
                render(template, messages, tokens, where="here")
            continue
        assert render(template, messages, tokens, where="here") == theirs


def test_the_day_in_a_template_is_the_same_every_day() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}", [], {}, where="here") == "26 Jul 2024"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{% if %}",
    ],
)
def test_a_template_reaches_nothing_but_the_conversation(template: str) -> None:
    with pytest.raises(BundleError, match="cannot write this conversation"):
        render(template, [], {}, where="here")


def test_a_template_that_names_no_image_is_refused(llava: Path) -> None:
    edit_json(llava / "tokenizer_config.json", chat_template="Hello")
    with pytest.raises(BundleError, match=r"writes no prompt with one <image> and the question; give the whole"):
        describe(str(llava))


def test_a_whole_prompt_takes_no_system_prompt(llava: Path) -> None:
    with pytest.raises(ConfigError, match=r"--system-prompt is 'S', but --prompt '\{image\} is' is a whole prompt"):
        describe(str(llava), prompt="{image} is", system_prompt="S")


@pytest.mark.parametrize(
    ("kind", "extra", "expected"),
    [
        ("llama", ("<s>",), "<s>A chat between a curious user and .* questions. USER: {image}\nWhy? ASSISTANT:"),
        ("mistral", ("<s>",), "<s>[INST] {image}\nWhy? [/INST]"),
        (
            "qwen2",
            ("<|im_start|>", "<|im_end|>"),
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n{image}\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_without_a_template_a_turn_is_written_as_the_family_does(
    tmp_path: Path, kind: str, extra: tuple[str, ...], expected: str
) -> None:
    tokenizer = llama3_tokenizer(
        num_special=2, extra=(*extra, *(f"<|{n}|>" for n in range(14 - len(extra))), "<image>")
    )
    folder = str(save_llava(tmp_path, language=language_config(kind), tokenizer=tokenizer))
    found = describe(folder, prompt="Why?")
    start, _, end = expected.partition(".*")
    assert found.template.startswith(start)
    assert found.template.endswith(end)
    assert "Be brief." in describe(folder, prompt="Why?", system_prompt="Be brief.").template
    assert (len(found.eos_token_ids) > 1) == (kind == "qwen2"), "<|im_end|> ends a caption"


def test_a_tokenizer_without_the_image_token_is_refused_with_both_sides(tmp_path: Path) -> None:
    folder = str(save_llava(tmp_path, tokenizer=llama3_tokenizer()))
    with pytest.raises(
        BundleError,
        match=r"config.json has image_token_index 272, but the tokenizer in \S+ has 272 tokens and no <image> among",
    ):
        describe(folder)


def test_the_tokens_around_an_image_are_those_of_the_whole_text(llava: Path) -> None:
    model = load(str(llava), device="cpu", prompt="<|begin_of_text|>USER: {image}\nWhy? ASSISTANT:")
    ids = model.tokenizer("USER: <image>\nWhy? ASSISTANT:").input_ids
    assert ids == [*model.template.prefix_ids, 272, *model.template.suffix_ids]


def test_the_resolved_prompt_is_shown_token_by_token(llava: Path) -> None:
    tokens = describe(str(llava), prompt="<|begin_of_text|>é{image}\n.").prompt_tokens
    assert tokens == ("'<|begin_of_text|>'", "'Ã'", "'©'", "<image> x 16", r"'\n'", "'.'")


def test_what_is_typed_for_a_line_break_is_one() -> None:
    config = ModelConfig(prompt=r"USER: {image}\nWhy?\tASSISTANT:", system_prompt=r"a\nb")
    assert (config.prompt, config.system_prompt) == ("USER: {image}\nWhy?\tASSISTANT:", "a\nb")
    assert DecodingConfig(stop=(r"\n", r"\t.")).stop == ("\n", "\t.")
