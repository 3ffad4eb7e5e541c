"""The self-test: does a path apply the prefix mask, the gate and the recurrence as it must?

A path's logits, or its answers where it gives nothing else, are compared with ours in fp32. Where
they differ, they are compared with those of the model making each known mistake, and the nearest
is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from hrmtext.config.generate import GenerateConfig
from hrmtext.generate.mistakes import Mistake, mistakes
from hrmtext.generate.reference import Distance, Row, reference_logits
from hrmtext.generate.runner import TextModel
from hrmtext.generate.stop import LENGTH, STOP
from hrmtext.model import HrmLM

RIGHT, WRONG, UNDECIDED = "right", "wrong", "undecided"

PROMPTS = (
    "What is 12 + 30?",
    "Sort these words: pear, apple, fig.",
    "Reverse the word: stone",
    "Count the letters e in: seven green trees stand here",
)
RESPONSE = "The answer is 42.\nB"
"""Read behind every prompt, so that the causal part is tested too."""
MAX_NEW_TOKENS = 32

EXACT = 1e-3
"""Relative difference of two fp32 runs that needs no further look."""
MASK_MARGIN = 3.0
"""The causal mask's logits must be this many times farther than the path's."""
THIN_MARGIN = 0.1
"""Logits by which the best token leads; below it rounding may choose another."""
WHOLE = 1 << 30
"""Characters: no answer has so many."""
LOGPROB_BUDGET = 0.1
"""Nats by which a sound server's log-probabilities may differ on average."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A greedy answer of a path."""

    text: str
    finish_reason: str
    """`stop` or `length`."""
    token_texts: list[str] | None = None
    logprobs: list[float] | None = None
    """One for each of `token_texts`, where the path gives them."""


class LogitsPath(Protocol):
    """A path that gives logits."""

    name: str
    budget: float
    """Largest relative difference of a sound path in its number format."""

    def logits(
        self, prompt: str, prompt_tokens: Sequence[int], response: Sequence[int]
    ) -> torch.Tensor:
        """(1 + R, V) logits behind the prompt and behind each token of the response."""
        ...

    def answer(self, prompt: str, max_new_tokens: int) -> Answer:
        """The greedy answer."""
        ...


class AnswerPath(Protocol):
    """A path that gives greedy answers, perhaps with log-probabilities."""

    name: str

    def answer(self, prompt: str, max_new_tokens: int) -> Answer:
        """The greedy answer."""
        ...


@dataclasses.dataclass(frozen=True)
class SelfTestReport:
    """What a self-test found."""

    path: str
    verdict: str
    """`right`, `wrong`, or `undecided` where this model's answers cannot tell."""
    mistake: str | None
    """The mistake that explains a wrong path best; None where none does."""
    message: str
    """One or two sentences for people."""
    distances: dict[str, float]
    """How far the path is from the right model and from each mistake that was tried."""


@dataclasses.dataclass
class _Spoken:
    """What a model answers to a prompt."""

    text: str
    finish_reason: str
    tokens: list[int]
    token_texts: list[str]
    logprobs: list[float]


def check_logits(
    reference: TextModel, path: LogitsPath, prompts: Sequence[str] = PROMPTS
) -> SelfTestReport:
    """Compare a path's logits, then where its answers end.

    Args:
        reference: the right model, in fp32.
        prompts: texts to ask, with condition direct.
    """
    tokenizer = reference.tokenizer
    response = tokenizer.encode_texts([RESPONSE])[0]
    rows: list[Row] = [(ids, response) for ids in tokenizer.encode_prompts(list(prompts))]
    found = torch.cat(
        [path.logits(text, ids, response) for text, (ids, _) in zip(prompts, rows, strict=True)]
    )
    model = reference.model
    right = reference_logits(model, rows)
    distances = {RIGHT: Distance.between(right, found).relative}
    known = list(mistakes(model.config))
    mask, others = known[0], known[1:]
    distances[mask.name] = _distance(mask, model, rows, found)
    if not distances[RIGHT] <= EXACT:
        for mistake in others:
            distances[mistake.name] = _distance(mistake, model, rows, found)
    nearest = min(known, key=lambda m: distances.get(m.name, float("inf")))
    finite = bool(found.isfinite().all())
    if not finite:
        return SelfTestReport(path.name, WRONG, None, "the logits are not all finite", distances)
    if distances[nearest.name] < distances[RIGHT]:
        return _wrong(path.name, nearest, distances)
    if not distances[RIGHT] <= path.budget:
        message = (
            f"logits differ from the reference by {distances[RIGHT]:.1%}, expected at most "
            f"{path.budget:.1%}; no known mistake explains it (nearest: {nearest.name})"
        )
        return SelfTestReport(path.name, WRONG, None, message, distances)
    if distances[mask.name] < MASK_MARGIN * distances[RIGHT]:
        message = (
            f"logits differ from the reference by {distances[RIGHT]:.2%}, but under the other mask "
            f"they would by {distances[mask.name]:.2%} only: this model cannot tell the masks apart"
        )
        return SelfTestReport(path.name, UNDECIDED, None, message, distances)
    ended = _check_end(reference, path, prompts)
    if isinstance(ended, Mistake):
        return _wrong(path.name, ended, distances)
    message = (
        f"logits differ from the reference by {distances[RIGHT]:.2%}; under the other mask they "
        f"would by {distances[mask.name]:.1%}. {ended}"
    )
    return SelfTestReport(path.name, RIGHT, None, message, distances)


def check_answers(
    reference: TextModel, path: AnswerPath, prompts: Sequence[str] = PROMPTS
) -> SelfTestReport:
    """Compare a path's greedy answers, with their log-probabilities where it gives them.

    Args:
        reference: the right model, in fp32.
        prompts: texts to ask, with condition direct; better ones tell more mistakes apart.
    """
    observed = [path.answer(prompt, MAX_NEW_TOKENS) for prompt in prompts]
    right = _speak(reference, prompts)
    solid = _solid_lengths(reference, prompts, right)
    distances = {RIGHT: _mismatch(right, observed, solid)}
    known = list(mistakes(reference.config))
    for mistake in known:
        variant = TextModel(mistake.variant(reference.model), reference.tokenizer)
        distances[mistake.name] = _mismatch(_speak(variant, prompts), observed)
    nearest = min(known, key=lambda m: distances[m.name])
    if distances[RIGHT] == 0:
        mask = known[0]
        if distances[mask.name] == 0:
            message = (
                f"the answers to {len(prompts)} prompts are right, but they would be the same "
                f"with the mistake {mask.name!r}: give prompts that this model was trained on"
            )
            return SelfTestReport(path.name, UNDECIDED, None, message, distances)
        alike = [m.name for m in known if distances[m.name] == 0]
        message = f"the answers to {len(prompts)} prompts are the reference's. "
        message += _end_note(right) + (f" Not told apart: {', '.join(alike)}." if alike else "")
        return SelfTestReport(path.name, RIGHT, None, message, distances)
    ended = _end_mistake(right, observed, solid)
    if ended is not None and distances[nearest.name] > 0:
        return _wrong(path.name, ended, distances)
    if distances[nearest.name] < distances[RIGHT]:
        return _wrong(path.name, nearest, distances)
    index = next(i for i, one in enumerate(observed) if one.text != right[i].text)
    message = (
        f"answers differ from the reference's and no known mistake explains them; to "
        f"{prompts[index]!r} it gave {observed[index].text!r}, expected {right[index].text!r}"
    )
    return SelfTestReport(path.name, WRONG, None, message, distances)


def _wrong(name: str, mistake: Mistake, distances: dict[str, float]) -> SelfTestReport:
    return SelfTestReport(name, WRONG, mistake.name, f"{mistake.name}: {mistake.advice}", distances)


def _distance(mistake: Mistake, model: HrmLM, rows: Sequence[Row], found: torch.Tensor) -> float:
    return Distance.between(reference_logits(mistake.variant(model), rows), found).relative


def _speak(model: TextModel, prompts: Sequence[str]) -> list[_Spoken]:
    config = GenerateConfig(max_new_tokens=MAX_NEW_TOKENS)
    decode = model.tokenizer.tokenizer.decode
    return [
        _Spoken(
            answer.text,
            answer.finish_reason,
            answer.tokens,
            [decode([token], skip_special_tokens=False) for token in answer.tokens],
            answer.logprobs or [],
        )
        for answer in model.generate_tokens(list(prompts), config=config)
    ]


def _solid_lengths(
    reference: TextModel, prompts: Sequence[str], right: Sequence[_Spoken]
) -> list[int]:
    """Characters of each right answer before the first token that rounding might change."""
    lengths = []
    encoded = reference.tokenizer.encode_prompts(list(prompts))
    for answer, ids in zip(right, encoded, strict=True):
        logits = reference_logits(reference.model, [(ids, answer.tokens[:-1])])
        best = logits.topk(2, dim=-1).values
        thin = ((best[:, 0] - best[:, 1]) < THIN_MARGIN).nonzero()
        if len(thin):
            lengths.append(len(reference.tokenizer.decode(answer.tokens[: int(thin[0])])))
        else:
            lengths.append(WHOLE)
    return lengths


def _mismatch(
    expected: Sequence[_Spoken], observed: Sequence[Answer], solid: Sequence[int] | None = None
) -> float:
    """0 where all answers are alike, up to 1 where none begins alike; plus log-probabilities.

    Args:
        solid: characters of each expected answer that count; None: all.
    """
    total = 0.0
    for index, (want, got) in enumerate(zip(expected, observed, strict=True)):
        limit = solid[index] if solid is not None else WHOLE
        a, b = want.text[:limit], got.text[:limit]
        same_end = want.finish_reason == got.finish_reason or len(want.text) > limit
        if a != b or not same_end:
            longest = max(len(a), len(b), 1)
            total += 1 - min(_common(a, b) / longest, 0.99)
        total += _logprob_gap(want, got)
    return total / len(expected)


def _logprob_gap(want: _Spoken, got: Answer) -> float:
    """Mean difference in nats over the tokens that agree, 0 within the budget, at most 1."""
    if not got.logprobs or not got.token_texts:
        return 0.0
    same = _common(want.token_texts, got.token_texts)
    pairs = list(zip(want.logprobs[:same], got.logprobs[:same], strict=True))
    if not pairs:
        return 0.0
    gap = sum(abs(a - b) for a, b in pairs) / len(pairs)
    return min(gap, 1.0) if gap > LOGPROB_BUDGET else 0.0


def _common(a: Sequence, b: Sequence) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _check_end(reference: TextModel, path: LogitsPath, prompts: Sequence[str]) -> Mistake | str:
    observed = [path.answer(prompt, MAX_NEW_TOKENS) for prompt in prompts]
    right = _speak(reference, prompts)
    ended = _end_mistake(right, observed, _solid_lengths(reference, prompts, right))
    return ended if ended is not None else _end_note(right)


def _end_note(right: Sequence[_Spoken]) -> str:
    count = sum(one.finish_reason == STOP for one in right)
    if count == 0:
        return f"No answer ends within {MAX_NEW_TOKENS} tokens, so the end token was not tested."
    return f"{count} of {len(right)} answers end where they must."


def _end_mistake(
    right: Sequence[_Spoken], observed: Sequence[Answer], solid: Sequence[int]
) -> Mistake | None:
    """The mistake with the end token that explains answers which begin alike."""
    over = early = 0
    for want, got, limit in zip(right, observed, solid, strict=True):
        a, b = want.text[:limit], got.text[:limit]
        whole = len(want.text) <= limit
        if whole and want.finish_reason == STOP and b.startswith(a):
            over += len(b) > len(a) or got.finish_reason == LENGTH
        elif a.startswith(b) and len(b) < len(a) and got.finish_reason == STOP:
            early += 1
        elif a != b:
            return None
    if over:
        return Mistake(
            "wrong end token: it runs past the end",
            "<|box_end|> must end an answer (eos_token_id, or a stop token)",
            lambda config, state: (config, state),
        )
    if early:
        return Mistake(
            "wrong end token: it stops early",
            "only <|box_end|> may end an answer; another token is set as end or stop token",
            lambda config, state: (config, state),
        )
    return None
