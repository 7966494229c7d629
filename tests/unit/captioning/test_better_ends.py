"""`--redraw-repetitive` and `--trim-to-sentence`: what becomes of captions that loop or were cut."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from captioner import demo
from captioner.caption_columns import Caption
from captioner.captioning.caption_text import CaptionText
from captioner.captioning.caption_worker import CaptionWorker
from captioner.captioning.captioner import Captioner
from captioner.captioning.closing import _answers
from captioner.captioning.dataset_worker import DatasetCaptioner, DatasetOptions
from captioner.captioning.decode_worker import DecodeWorker
from captioner.captioning.job import resolve
from captioner.captioning.job_prompts import answers_of
from captioner.captioning.sentences import whole_sentences
from captioner.captioning.summary import summarize
from captioner.config import CaptionJobConfig, DecodingConfig, InputConfig, ModelConfig, ScoringConfig
from captioner.decoding import Hypothesis
from captioner.errors import ConfigError, OutputError
from captioner.model.bundle import describe, load
from captioner.model.caption_model import CaptionModel
from captioner.prompts import Prompt, read_prompts
from captioner.schema import FinishReason, source_schema
from captioner.tables import CaptionTable, Stamp
from tests.sample_images import encoded

SHORT = DecodingConfig(max_new_tokens=6)
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
FILES = sorted(str(path) for path in demo.images_path().rglob("*.png"))[:5]


@pytest.fixture(scope="module")
def model() -> Any:
    return load("demo", with_text_tower=True)


def found(model: Any, decoding: DecodingConfig, files: Sequence[str] = FILES, **options: Any) -> list[Caption]:
    with Captioner(model, decoding, **options) as captioner:
        return captioner.caption(files, files)  # type: ignore[return-value]  # all are images


def texts(captions: Sequence[Caption]) -> list[str]:
    return sorted(one.caption for one in captions)


def test_a_cut_caption_is_drawn_again_and_all_tries_are_candidates(model: Any) -> None:
    greedy = found(model, SHORT)
    first, four = (
        found(model, replace(SHORT, do_sample=True, num_captions=number, temperature=1.5)) for number in (1, 4)
    )
    again = found(model, replace(SHORT, redraw_repetitive=3, temperature=1.5))
    assert {one.finish_reason for one in greedy} == {LENGTH}
    for plain, alone, drawn, one in zip(greedy, first, four, again, strict=True):
        further = texts(drawn.candidates)
        further.remove(alone.caption)
        assert texts(one.candidates) == sorted([plain.caption, *further])
        assert one.candidates[0] == replace(one, candidates=())


def test_a_caption_that_ends_by_itself_is_that_of_a_job_without_redraws(model: Any) -> None:
    long = replace(SHORT, max_new_tokens=12)
    plain, again = found(model, long), found(model, replace(long, redraw_repetitive=2))
    whole = [(one, two) for one, two in zip(plain, again, strict=True) if one.finish_reason == STOP]
    assert 0 < len(whole) < len(plain)
    assert all(one == two for one, two in whole)
    assert all(two.candidates for one, two in zip(plain, again, strict=True) if one.finish_reason == LENGTH)


def test_redraws_depend_on_the_image_and_the_seed_alone(model: Any) -> None:
    decoding = replace(SHORT, redraw_repetitive=2)
    every = found(model, decoding)
    assert [one.candidates for one in found(model, decoding, FILES[3:])] == [one.candidates for one in every[3:]]
    assert [one.candidates for one in found(model, replace(decoding, seed=1))] != [one.candidates for one in every]


def words_of(token_ids: Sequence[int]) -> str:
    return " ".join(WORDS[token] for token in token_ids)


WORDS = ["dog", "cat", "sits.", "A", "there", "\nEND"]


def written(*token_ids: int, reason: FinishReason = STOP, score: float = 0.0) -> Hypothesis:
    return Hypothesis(token_ids, reason, score, score, score)


def of_words(**decoding: Any) -> CaptionText:
    return CaptionText(words_of, DecodingConfig(**decoding))


def test_of_several_tries_whole_ones_come_first_then_cut_ones_then_loops() -> None:
    loop, cut, whole = written(0, 0, 0, score=-0.1), written(3, 1, reason=LENGTH, score=-0.2), written(3, 0, score=-2.0)
    text = of_words(redraw_repetitive=1)
    assert [one.caption for one in text.captions([loop, cut, whole])] == ["A dog", "A cat", "dog dog dog"]
    redraw = text.redraw(4)
    assert redraw is not None
    assert (redraw.decoding, redraw.most) == (4, 1)
    assert [redraw.is_wanted(one) for one in (loop, cut, whole)] == [True, True, False]
    plain = of_words()
    assert plain.redraw(4) is None
    assert [one.caption for one in plain.captions([loop, cut])] == ["dog dog dog", "A cat"]


def test_a_caption_that_was_cut_ends_at_its_last_whole_sentence_and_says_so() -> None:
    text = of_words(trim_to_sentence=True, stop=("END",))
    cut = [written(3, 0, 2, 3, 1, reason=LENGTH), written(3, 0, 2, reason=LENGTH), written(3, 0, reason=LENGTH)]
    first, whole, none = text.captions(cut)
    assert (first.caption, first.finish_reason, first.num_tokens, first.is_trimmed) == ("A dog sits.", LENGTH, 5, True)
    assert [(one.caption, one.is_trimmed) for one in (whole, none)] == [("A dog sits.", False), ("A dog", False)]
    stopped, by_string = text.captions([written(3, 0, 2, 3, 1), written(3, 0, 2, 3, 5)])
    assert [(one.caption, one.is_trimmed) for one in (stopped, by_string)] == [
        ("A dog sits. A cat", False),
        ("A dog sits. A", False),
    ]
    [as_it_is] = of_words().captions(cut[:1])
    assert as_it_is.caption == "A dog sits. A cat"


def test_every_candidate_is_trimmed_with_any_strategy(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text_of = CaptionModel.text
    monkeypatch.setattr(CaptionModel, "text", lambda self, ids: text_of(self, ids).replace(" background", "."))
    for options in ({"num_beams": 3}, {"do_sample": True}):
        decoding = DecodingConfig(max_new_tokens=10, num_captions=3, **options)  # type: ignore[arg-type]
        plain, short = found(model, decoding), found(model, replace(decoding, trim_to_sentence=True))
        pairs = [
            (one, two)
            for of_one, of_two in zip(plain, short, strict=True)
            for one, two in zip(of_one.candidates, of_two.candidates, strict=True)
        ]
        assert any(two.is_trimmed for _, two in pairs)
        for one, two in pairs:
            assert two.caption == (whole_sentences(one.caption) if one.finish_reason == LENGTH else one.caption)
            assert (two.num_tokens, two.finish_reason, two.mean_logprob) == (
                one.num_tokens,
                one.finish_reason,
                one.mean_logprob,
            )


def test_a_caption_that_loops_is_never_preferred_by_its_clip_score(model: Any) -> None:
    decoding = replace(SHORT, max_new_tokens=13, do_sample=True, num_captions=6, temperature=2.0, redraw_repetitive=1)
    ranked = found(model, decoding, scoring=ScoringConfig(rerank="clip-score"))
    for one in ranked:
        faults = [
            2 if candidate.is_repetitive else int(candidate.finish_reason == LENGTH) for candidate in one.candidates
        ]
        assert faults == sorted(faults)
        scores = [candidate.clip_score or 0.0 for candidate in one.candidates]
        for fault in set(faults):
            of_fault = [score for score, own in zip(scores, faults, strict=True) if own == fault]
            assert of_fault == sorted(of_fault, reverse=True)
    assert any(len({candidate.finish_reason for candidate in one.candidates}) == 2 for one in ranked)


NAMED = """
caption: "w1"
again: {text: "w2", redraw_repetitive: 2, temperature: 1.5}
short: {text: "w3", trim_to_sentence: true, max_new_tokens: 10}
all_of_it: {text: "w4", redraw_repetitive: 1, trim_to_sentence: true}
held: {text: "w4", choice: [a, a large red circle], max_new_tokens: 3, redraw_repetitive: 4, temperature: 9.0}
"""


def read(folder: Path, text: str, decoding: DecodingConfig = SHORT) -> tuple[Prompt, ...]:
    (folder / "prompts.yaml").write_text(text)
    return read_prompts(folder / "prompts.yaml", decoding, frozenset())


def test_each_named_prompt_has_its_own_ends(model: Any, tmp_path: Path) -> None:
    prompts = read(tmp_path, NAMED)
    size = model.image_size
    squares = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with Captioner(model, SHORT, prompts=prompts) as captioner:
        every = captioner.answer_pixels(squares, ["a", "b", "c", "d"], [(size, size)] * 4, [{}] * 4)
    assert all(not answers[0].caption.candidates for answers in every)
    assert all(len(answers[1].caption.candidates) == 3 for answers in every)
    for answers in every:
        last = answers[4].caption
        tries = last.candidates or (last,)
        assert last.is_whole == any(one.is_whole for one in tries)
        assert sum(one.is_whole for one in tries) <= 1
        assert last.is_whole or len(tries) == 5
    assert any(answers[4].caption.candidates for answers in every)
    assert any(answers[4].caption.is_whole for answers in every)


def job(folder: Path, decoding: DecodingConfig, **changes: Any) -> CaptionJobConfig:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "a.jpg").write_bytes(encoded())
    return CaptionJobConfig(
        input_path=str(folder / "images"),
        output=str(folder / "out"),
        model=ModelConfig(model="demo"),
        decoding=decoding,
        **changes,
    )


def captioned(config: CaptionJobConfig, prompts: Sequence[Prompt] = ()) -> pa.Table:
    rows = [{"key": key, "image_id": f"{key}", "attempt": 1, "data": encoded(seed=key)} for key in range(5)]
    rows[4]["data"] = b""
    decoded = DecodeWorker(config, describe("demo").preprocessing)(pa.Table.from_pylist(rows, source_schema()))
    return CaptionWorker(config, prompts=prompts)(decoded)


def claimed(config: CaptionJobConfig, prompts: Sequence[Prompt]) -> CaptionTable:
    """The table of a job."""
    table = CaptionTable(config.output)
    named = {"prompts": {prompt.name: prompt.identity for prompt in prompts}} if prompts else {}
    table.claim({"decoding": asdict(config.decoding), **named})
    return table


BOTH = replace(SHORT, redraw_repetitive=2, trim_to_sentence=True)


@pytest.mark.parametrize("is_named", [False, True], ids=["plain", "prompts"])
def test_a_table_says_how_often_a_caption_was_drawn_again_and_whether_it_was_trimmed(
    tmp_path: Path, is_named: bool
) -> None:
    prompts = read(tmp_path, 'caption: "w1"', BOTH) if is_named else ()
    config = job(tmp_path, BOTH)
    answers = answers_of(BOTH, prompts)
    assert [field.name for field in answers] == ["caption_details"]
    rows = captioned(config, prompts)
    table = claimed(config, prompts)
    assert table.answers() == answers
    summary = table.write(rows, Stamp("run-1", table.digest), families=table.families())
    details = rows.column("caption_details").to_pylist()
    assert details[4] is None
    assert all(
        one == {"text_number": 0, "num_cut_values": 0, "num_redraws": len(candidates) - 1, "is_trimmed": False}
        for one, candidates in zip(details[:4], rows.column("candidates").to_pylist()[:4], strict=True)
    )
    assert summary.answers == {"caption": {"cut": 4, "null": 0, "redrawn": 4, "trimmed": 0}}
    assert _answers(summary.answers) == "caption 4 cut, 4 redrawn"


def test_a_table_without_these_has_no_details(tmp_path: Path) -> None:
    assert answers_of(SHORT, ()) == []
    assert "caption_details" not in captioned(job(tmp_path, SHORT)).column_names


def test_trimmed_answers_are_counted_for_each_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captioner.captioning.caption_text.whole_sentences", lambda text: text[:5])
    prompts = read(tmp_path, 'caption: "w1"\nmore: {text: "w2", trim_to_sentence: false, redraw_repetitive: 0}', BOTH)
    config = job(tmp_path, BOTH)
    table = claimed(config, prompts)
    rows = captioned(config, prompts)
    summary = table.write(rows, Stamp("run-1", table.digest), families=table.families())
    assert summary.answers == {
        "caption": {"cut": 4, "null": 0, "redrawn": 4, "trimmed": 4},
        "more": {"cut": 4, "null": 0},
    }
    plan: Any = SimpleNamespace(
        done=SimpleNamespace(num_captioned=0, num_failed=0),
        num_skipped=0,
        job=SimpleNamespace(prompts=prompts),
        prompts=prompts,
        table=SimpleNamespace(location="out"),
    )
    assert summarize(plan, [summary, summary], 1.0)["prompts"]["caption"]["trimmed"] == 8


def test_the_options_are_part_of_what_a_table_is_and_an_older_one_was_made_without(tmp_path: Path) -> None:
    model = describe("demo")
    plain = resolve(job(tmp_path, SHORT)).identity(model)
    older = json.loads(json.dumps(plain))
    for name in ("redraw_repetitive", "trim_to_sentence"):
        del older["decoding"][name]
    table = CaptionTable(str(tmp_path / "out"))
    table.claim(older)
    table.refuse_other_job(plain)
    for changed, words in [
        ({"redraw_repetitive": 2}, r"decoding.redraw_repetitive: 0 there, 2 now"),
        ({"trim_to_sentence": True}, r"decoding.trim_to_sentence: False there, True now"),
    ]:
        with pytest.raises(OutputError, match=words):
            table.refuse_other_job(resolve(job(tmp_path, replace(SHORT, **changed))).identity(model))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"redraw_repetitive": -1}, r"--redraw-repetitive is -1; expected 0 \(off\) to 100"),
        ({"redraw_repetitive": 101}, r"--redraw-repetitive is 101; expected 0 \(off\) to 100"),
        ({"redraw_repetitive": 2, "num_beams": 3}, "--redraw-repetitive is 2; expected 0 with --num-beams 3"),
        ({"temperature": 0.5}, "--temperature is 0.5; expected --do-sample or --redraw-repetitive with it"),
    ],
)
def test_what_a_decoding_may_not_say_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecodingConfig(**options)


def test_a_constrained_prompt_is_never_trimmed(tmp_path: Path) -> None:
    said = 'caption: "w1"\nyes: {text: "w2", choice: [yes, no]TRIM}'
    with pytest.raises(ConfigError, match="yes: trim_to_sentence is true; expected none in a prompt with a constraint"):
        read(tmp_path, said.replace("TRIM", ", trim_to_sentence: true"))
    _, constrained = read(tmp_path, said.replace("TRIM", ""), replace(SHORT, trim_to_sentence=True))
    assert not constrained.decoding.trim_to_sentence


def test_a_prompt_with_beams_needs_redraws_off(tmp_path: Path) -> None:
    said = 'caption: "w1"\nbeams: {text: "w2", num_beams: 2OFF}'
    with pytest.raises(ConfigError, match="beams: --redraw-repetitive is 1; expected 0 with --num-beams 2"):
        read(tmp_path, said.replace("OFF", ""), replace(SHORT, redraw_repetitive=1))
    read(tmp_path, said.replace("OFF", ", redraw_repetitive: 0"), replace(SHORT, redraw_repetitive=1))


def test_a_kept_column_may_not_be_called_as_the_details(tmp_path: Path) -> None:
    kept = InputConfig(keep_columns=("x=caption_details",))
    with pytest.raises(ConfigError, match=r"caption_details is a column of the answers; rename it, as .*input_caption"):
        resolve(job(tmp_path, BOTH, input=kept))
    resolve(job(tmp_path, SHORT, input=kept))


def test_redraws_beside_a_datasets_rows_are_those_of_the_image(tmp_path: Path) -> None:
    decoding = replace(SHORT, seed=3, redraw_repetitive=2, temperature=3.0)
    options = DatasetOptions(column="image", model=ModelConfig(model="demo"), decoding=decoding)
    rows = pa.table({"image": [encoded(seed=seed) for seed in range(3)]})
    captioner = DatasetCaptioner(options)
    assert captioner(rows).column("caption").to_pylist()[2] == captioner(rows.slice(2)).column("caption")[0].as_py()
