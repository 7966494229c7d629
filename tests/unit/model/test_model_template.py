import pytest

from captioner.errors import BundleError
from captioner.model.template import Template
from tests.unit.model.tiny_models import llama3_tokenizer

TOKENIZER = llama3_tokenizer()


def test_a_template_has_ids_before_and_after_the_image():
    template = Template.parse("<|begin_of_text|>a{image}b", TOKENIZER)
    assert TOKENIZER.convert_ids_to_tokens(template.prefix_ids) == ["<|begin_of_text|>", "a"]
    assert TOKENIZER.convert_ids_to_tokens(template.suffix_ids) == ["b"]
    assert template.num_tokens == 3


def test_no_special_token_is_ever_added():
    template = Template.parse("{image}", TOKENIZER)
    assert (template.prefix_ids, template.suffix_ids) == ((), ())
    assert TOKENIZER("a").input_ids[0] == TOKENIZER.bos_token_id, "this tokenizer does add one when asked plainly"


def test_a_literal_brace_is_only_text():
    template = Template.parse('{image}{"json": {}}', TOKENIZER)
    assert TOKENIZER.decode(template.suffix_ids) == '{"json": {}}'


@pytest.mark.parametrize(("text", "count"), [("a caption:", 0), ("{image}{image}", 2), ("{ image }", 0)])
def test_a_template_without_exactly_one_image_is_refused(text: str, count: int):
    with pytest.raises(BundleError, match=rf"has {count} \{{image\}}; expected exactly one"):
        Template.parse(text, TOKENIZER)


def test_a_special_token_that_the_tokenizer_lacks_is_refused():
    with pytest.raises(BundleError, match=r"uses <\|im_start\|>, which the tokenizer of the LLaMA does not have"):
        Template.parse("<|im_start|>{image}", TOKENIZER)
