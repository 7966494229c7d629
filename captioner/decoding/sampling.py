"""From logits to tokens: penalties, cuts and draws, in the order and meaning of transformers' logits processors.

Pure functions of a slot's own row, so that a caption never depends on its neighbours. Nothing is copied from the GPU
to the CPU.

A draw takes one uniform number, computed from (seed of the image, number of tokens so far) by a counter-based
generator, which has no state. The distribution function is inverted over the few candidates that remain, which avoids
sorting or normalising 128,256 words as a full sort before `multinomial` would.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from captioner.config import DecodingConfig

_CHUNK = 32
_NUCLEUS_CANDIDATES = 256
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class ScorePenalties:
    """Changes to scores that every strategy applies: repetition_penalty, then no end token before min_new_tokens.

    temperature, top_k, top_p and min_p belong to `sample`."""

    def __init__(self, decoding: DecodingConfig, eos_token_ids: Tensor) -> None:
        self._penalty = decoding.repetition_penalty
        self._min_new_tokens = decoding.min_new_tokens if len(eos_token_ids) else 0
        self._eos_token_ids = eos_token_ids
        self.needs_history = self._penalty != 1.0
        self.changes_scores = self.needs_history or self._min_new_tokens > 0

    def __call__(self, scores: Tensor, num_generated: Tensor, history: Tensor) -> Tensor:
        """Return the changed scores, float32[R, V]; the argument does not change.

        num_generated: int64[R]. history: int64[R, n], unused entries repeating the first token."""
        if self.needs_history:
            seen = scores.gather(1, history)
            penalised = torch.where(seen < 0, seen * self._penalty, seen / self._penalty)
            scores = scores.scatter(1, history, torch.where(num_generated[:, None] > 0, penalised, seen))
        if self._min_new_tokens:
            ends = scores[:, self._eos_token_ids]
            is_early = num_generated[:, None] < self._min_new_tokens
            scores = scores.index_copy(1, self._eos_token_ids, ends.masked_fill(is_early, -math.inf))
        return scores


def greedy(scores: Tensor) -> Tensor:
    """Return the most probable token of each row, int64[R]; of equal ones the lowest. Faster than `argmax`."""
    chunks = _chunked(scores, -math.inf)
    best = chunks.amax(-1).argmax(-1)
    inside = chunks.gather(1, best[:, None, None].expand(-1, -1, _CHUNK))[:, 0].argmax(-1)
    return best * _CHUNK + inside


def sample(
    scores: Tensor, uniforms: Tensor, decoding: DecodingConfig, *, looks_at_all: bool = False
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row: int64[R], and bool[R] true if no token with positive probability was left out.

    scores: float32[R, V]. uniforms: float64[R] in (0, 1). In transformers' order: temperature, top_k, top_p, min_p.
    With top_k off, top_p and min_p are applied to the best candidates first; where these do not suffice, the second
    result is false, and a call with `looks_at_all` sorts the whole vocabulary."""
    vocabulary = scores.shape[-1]
    limit = decoding.top_k or (vocabulary if looks_at_all else _NUCLEUS_CANDIDATES)
    if decoding.top_k:  # dividing keeps the order, so that only the candidates need it
        values, token_ids = top_candidates(scores, min(limit, vocabulary))
        values = values / decoding.temperature
    elif decoding.top_p == 1 and decoding.min_p == 0:
        return _draw_from_all(scores / decoding.temperature, uniforms), torch.ones_like(uniforms, dtype=torch.bool)
    else:
        scores = torch.log_softmax(scores / decoding.temperature, -1)
        values, token_ids = top_candidates(scores, min(limit, vocabulary))
    probabilities = _cut(values, decoding)
    drawn, _ = _invert(probabilities, uniforms)
    is_complete = decoding.top_k > 0 or limit >= vocabulary
    return token_ids.gather(1, drawn[:, None])[:, 0], is_complete | (probabilities[:, -1] == 0)


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """Return float64[R] in (0, 1), a hash of each (seed, counter): splitmix64 twice, its upper 52 bits."""
    bits = (_mix(_mix(seeds) ^ counters) >> 12) & ((1 << 52) - 1)
    return (bits.double() + 0.5) * 2.0**-52


def candidate_seed(seed: int, candidate: int) -> int:
    """Return the seed of an image's n-th caption, as a signed 64-bit number; the first has the image's own seed."""
    mixed = (seed + candidate * _GOLDEN) & _MASK
    return mixed - (1 << 64) if mixed >> 63 else mixed


def top_candidates(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k greatest of each row in descending order, values and int64 indices. Faster than `torch.topk`.

    The k greatest are in the k chunks with the greatest maxima, and maxima are cheap to find."""
    vocabulary = scores.shape[-1]
    if k * _CHUNK * 2 > vocabulary:
        return torch.topk(scores, k)
    chunks = _chunked(scores, -math.inf)
    best = chunks.amax(-1).topk(k, sorted=False).indices
    values, inside = chunks.gather(1, best[:, :, None].expand(-1, -1, _CHUNK)).flatten(1).topk(k)
    return values, best.gather(1, inside // _CHUNK) * _CHUNK + inside % _CHUNK


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-probability of one token of each row, float32[R]."""
    return torch.log_softmax(logits, -1).gather(1, token_ids[:, None])[:, 0]


def _cut(values: Tensor, decoding: DecodingConfig) -> Tensor:
    """Return float64[R, k] probabilities of the candidates, 0 for those cut by top_p or min_p; they need not sum to 1.

    values: their log-probabilities, or with top_k their logits; descending, so that the kept ones come first."""
    probabilities = torch.softmax(values.double(), -1) if decoding.top_k else values.double().exp()
    before = probabilities.cumsum(-1) - probabilities
    is_kept = before < decoding.top_p
    if decoding.min_p > 0:
        is_kept &= values >= values[:, :1] + math.log(decoding.min_p)
    is_kept[:, 0] = True
    return probabilities * is_kept


def _draw_from_all(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from the whole softmax: first a chunk of the vocabulary, then a token in it. Returns int64[R]."""
    chunks = _chunked(torch.softmax(scores, -1), 0.0)
    chunk, rest = _invert(chunks.sum(-1, dtype=torch.float64), uniforms)
    inside = chunks.gather(1, chunk[:, None, None].expand(-1, -1, _CHUNK))[:, 0].double()
    return chunk * _CHUNK + _invert(inside, rest)[0]


def _invert(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index where the cumulated mass passes uniform * sum, int64[R], and how far into its mass, in [0, 1).

    masses: float64[R, k]. Never returns an index without mass: the target stays below the sum."""
    cumulated = masses.cumsum(-1)
    total = cumulated[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulated, target, right=True)
    mass = masses.gather(1, index)
    return index[:, 0], ((target - cumulated.gather(1, index) + mass) / mass)[:, 0]


def _chunked(rows: Tensor, filler: float) -> Tensor:
    """View float[R, V] as float[R, V / chunk, chunk], padded where V does not divide."""
    missing = -rows.shape[-1] % _CHUNK
    return (pad(rows, (0, missing), value=filler) if missing else rows).view(len(rows), -1, _CHUNK)


def _mix(bits: Tensor) -> Tensor:
    """Return splitmix64's finaliser of int64, which wraps; the masks make its arithmetic shifts logical."""
    bits = bits - 0x61C8864680B583EB
    bits = (bits ^ ((bits >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    bits = (bits ^ ((bits >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))
