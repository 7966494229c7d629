"""The engines that answer named prompts: one for all prompts whose decoding can share a step.

What the model reads of an image is computed once for all prompts of an engine whose tokens before the image are equal.
"""

import threading
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from captioner.captioning.caption_text import CaptionText, decodings_of
from captioner.captioning.questions import Question, Questions, check_prompts, common_start
from captioner.decoding import (
    AllowedTokens,
    Engine,
    EngineThread,
    Fork,
    Generation,
    Hypothesis,
    Request,
    engine_key,
)
from captioner.model import cuda_graphs
from captioner.model.caption_model import CaptionModel
from captioner.model.constraints import Constraint
from captioner.model.image_encoder import ImageEncoder
from captioner.prompts import Prompt

__all__ = ["PendingAnswer", "PromptEngines"]


class PendingAnswer(NamedTuple):
    """An answer that an engine writes."""

    question: Question
    future: Future[Generation]
    fork: int
    text: CaptionText
    """What becomes of its tokens."""

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """Wait for the answer; return its captions, the most probable first."""
        return self.future.result().forks[self.fork]


ForkOf = Callable[[Question, Tensor], Fork]
"""From a question and its tokens after the image, float[Q, D], to what an engine writes."""


class _Asked(NamedTuple):
    """What one engine is asked about one image in one request: prompts with the same tokens before the image."""

    questions: list[Question]
    parts: list[Sequence[int] | Tensor]
    """Tokens between the common start and the image, and the image."""


class PromptEngines:
    """The engines of a captioner with named prompts."""

    def __init__(
        self,
        model: CaptionModel,
        prompts: Sequence[Prompt],
        slots: str,
        recorder_for: Callable[[], cuda_graphs.Recorder | None],
    ) -> None:
        """Take the memory that the slots need. Raises ConfigError for prompts that the model cannot be given."""
        writer = model.prompt_writer
        check_prompts(prompts, writer, num_image_tokens=model.num_image_tokens, context_length=model.context_length)
        self._order = [prompt.name for prompt in prompts]
        start = common_start(prompts, writer)
        self._groups = [Questions(group, writer, start) for group in _grouped(prompts)]
        constraints = {one.name: _constraint(model, one) for one in prompts if one.constraint is not None}
        self._texts = {one.name: CaptionText(model.text, one.decoding, constraints.get(one.name)) for one in prompts}
        self._forks = [_forks(model, group, constraints, self._texts) for group in self._groups]
        engines = [
            _engine(model, group, slots, recorder_for(), memory_share=1 / (len(self._groups) - number))
            for number, group in enumerate(self._groups)
        ]
        self.num_slots = sum(engine.num_slots for engine in engines)
        self.threads = [EngineThread(engine) for engine in engines]
        self._counter = _ImageCounter()

    @property
    def num_busy(self) -> int:
        """Slots of all engines in which an answer is being written."""
        return sum(thread.num_busy for thread in self.threads)

    @property
    def idle_s(self) -> float:
        """Seconds in which the engine that rested least had no request."""
        return min(thread.idle_s for thread in self.threads)

    @property
    def num_finished(self) -> int:
        """Images whose answers are complete."""
        return self._counter.num_finished

    def questions(
        self,
        image_ids: Sequence[str],
        values: Sequence[Mapping[str, object]],
        asked: Sequence[Collection[str]] | None = None,
    ) -> list[list[list[Question]]]:
        """Return what each engine asks about each image. asked: the prompts of each; None for all of every image."""
        names = asked or [self._order] * len(image_ids)
        return [
            [group.about(image_id, of_image, of_names) for group in self._groups]
            for image_id, of_image, of_names in zip(image_ids, values, names, strict=True)
        ]

    def submit(
        self,
        image_ids: Sequence[str],
        embeds: Sequence[Tensor],
        questions: Sequence[Sequence[Sequence[Question]]],
        encoder: ImageEncoder,
    ) -> list[list[PendingAnswer]]:
        """Queue the prompts of some images; return their answers, in the order of the prompts. Blocks and raises as
        `EngineThread.submit` does.

        embeds: float[k, D] of each image. questions: as `questions` returns them."""
        pending: list[list[PendingAnswer]] = [[] for _ in image_ids]
        for number, (group, thread) in enumerate(zip(self._groups, self.threads, strict=True)):
            asked = [
                (image, one)
                for image, of_image in enumerate(questions)
                for one in _by_start(of_image[number], embeds[image], len(group.start))
            ]
            forks_of = self._forks[number]
            requests = _requests([image_ids[image] for image, _ in asked], [one for _, one in asked], encoder, forks_of)
            futures = thread.submit(requests)
            for (image, one), future in zip(asked, futures, strict=True):
                pending[image] += [
                    PendingAnswer(question, future, fork, self._texts[question.prompt.name])
                    for fork, question in enumerate(one.questions)
                ]
        for of_image in pending:
            self._counter.watch(list({id(one.future): one.future for one in of_image}.values()))
            of_image.sort(key=lambda one: self._order.index(one.question.prompt.name))
        return pending

    def close(self) -> None:
        """End the engines' threads."""
        for thread in self.threads:
            thread.close()


class _ImageCounter:
    """Counts images whose requests have all ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_finished = 0

    def watch(self, futures: Sequence[Future[Generation]]) -> None:
        """Count one more image when all futures have ended."""
        left = [len(futures)]

        def ended(_: Future[Generation]) -> None:
            with self._lock:
                left[0] -= 1
                self.num_finished += left[0] == 0

        for future in futures:
            future.add_done_callback(ended)


def _grouped(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Return the prompts that can share an engine, together."""
    groups: dict[Hashable, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(engine_key(prompt.decoding), []).append(prompt)
    return list(groups.values())


def _engine(
    model: CaptionModel,
    questions: Questions,
    slots: str,
    recorder: cuda_graphs.Recorder | None,
    *,
    memory_share: float,
) -> Engine:
    decodings = [prompt.decoding for prompt in questions.prompts]
    longest = max(one.max_new_tokens for one in decodings)
    num_prefix, num_suffix = questions.most_before + model.num_image_tokens, questions.most_after
    return Engine(
        model.llama,
        context_length=len(questions.start) + num_prefix + num_suffix + longest,  # `check_prompts` knows it of each
        decodings=decodings_of(decodings),
        eos_token_ids=model.eos_token_ids,
        shared_prefix=model.embed(questions.start),
        max_prefix_len=num_prefix,
        max_suffix_len=num_suffix,
        num_forks=len(decodings),
        slots_per_image=sum(max(one.num_beams, one.num_captions) for one in decodings),
        is_constrained=any(prompt.constraint for prompt in questions.prompts),
        slots="auto" if slots == "auto" else int(slots),
        memory_share=memory_share,
        recorder=recorder,
    )


def _forks(
    model: CaptionModel,
    questions: Questions,
    constraints: Mapping[str, Constraint],
    texts: Mapping[str, CaptionText],
) -> ForkOf:
    """Return what makes the forks of an engine."""
    numbers = {prompt.name: number for number, prompt in enumerate(questions.prompts)}
    again = [prompt.name for prompt in questions.prompts if prompt.decoding.redraw_repetitive]
    redraws = {name: texts[name].redraw(len(numbers) + number) for number, name in enumerate(again)}
    checks = {name: texts[name].stop_check for name in numbers}
    allowed = {name: _allowed(model, constraint) for name, constraint in constraints.items() if name in numbers}

    def fork(question: Question, suffix: Tensor) -> Fork:
        name = question.prompt.name
        return Fork(
            suffix=suffix,
            seed=question.seed,
            allowed_tokens=allowed.get(name),
            is_stopped=checks[name],
            decoding=numbers[name],
            redraw=redraws.get(name),
        )

    return fork


def _constraint(model: CaptionModel, prompt: Prompt) -> Constraint:
    """Return what the answers to a prompt may be. Raises ConfigError for a grammar that llguidance does not take."""
    assert prompt.constraint is not None
    return Constraint(
        prompt.constraint, model.prompt_writer.tokenizer_json, model.eos_token_ids, f"the prompt {prompt.name}"
    )


def _allowed(model: CaptionModel, constraint: Constraint) -> AllowedTokens:
    """Return which tokens a constrained answer may have, of all the model's words."""
    num_words = int(model.llama.config.vocab_size)

    def allowed_tokens(token_ids: Sequence[int]) -> Tensor:
        allowed = constraint.allowed_tokens(token_ids)[:num_words]
        return pad(allowed, (0, num_words - len(allowed)))

    return allowed_tokens


def _by_start(questions: Sequence[Question], image: Tensor, num_shared: int) -> list[_Asked]:
    """Return the questions about one image by their tokens before it."""
    found: dict[tuple[int, ...], _Asked] = {}
    for question in questions:
        before = question.tokens.before[num_shared:]
        found.setdefault(before, _Asked([], [before, image])).questions.append(question)
    return list(found.values())


def _requests(
    image_ids: Sequence[str], asked: Sequence[_Asked], encoder: ImageEncoder, fork_of: ForkOf
) -> list[Request]:
    suffixes = [[question.tokens.after] for one in asked for question in one.questions]
    embeds = encoder.join([*(one.parts for one in asked), *suffixes])
    prefixes, of_forks = embeds[: len(asked)], iter(embeds[len(asked) :])
    return [
        Request(
            id=image_id, prefix=prefix, forks=tuple(fork_of(question, next(of_forks)) for question in one.questions)
        )
        for image_id, prefix, one in zip(image_ids, prefixes, asked, strict=True)
    ]
