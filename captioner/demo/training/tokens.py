"""The demo bundle's two tokenizers, fitted on its captions: CLIP's layout and Llama-3's. Used by `train` alone."""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
)
"""In the order of their ids."""


def llama_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Llama-3 has it: its split, special tokens behind the merges, start token before a text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(LLAMA3_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in LLAMA3_SPECIAL])
    start = LLAMA3_SPECIAL[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{start} $A",
                pair=f"{start} $A {start}:1 $B:1",
                special_tokens=[(start, tokenizer.token_to_id(start))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token="<|end_of_text|>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def clip_tokenizer(texts: Iterable[str], num_merges: int, max_length: int) -> CLIPTokenizer:
    """Lower-case BPE as CLIP has it: bytes, bytes that end a word, merges, then the two special tokens."""
    learned = CLIPTokenizer(vocab={"<|endoftext|>": 0, "<|startoftext|>": 1}, merges=[]).backend_tokenizer
    bare = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bare.normalizer = normalizers.Lowercase()
    bare.pre_tokenizer = learned.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    units = alphabet + [f"{byte}</w>" for byte in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=len(units) + num_merges, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bare.train_from_iterator(texts, trainer)
    merges = [(left, right) for left, right in json.loads(bare.to_str())["model"]["merges"]]
    vocab = [*units, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: row for row, token in enumerate(vocab)},
        merges=merges,  # type: ignore[arg-type]  # pairs are what its backend takes
        model_max_length=max_length,
    )
