"""A conversation whose keys and values are kept: every token is read once, however many turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hrmtext.batch import RowLayout
from hrmtext.config.generate import GenerateConfig
from hrmtext.data.sources.chat import read_question, with_system
from hrmtext.errors import ConfigError, DataError, NonFiniteError
from hrmtext.generate.decode import MIN_GROWTH_TOKENS, cache_dtype, grow
from hrmtext.generate.runner import Generated, TextModel
from hrmtext.generate.sampling import Sampler
from hrmtext.generate.step import StepFunction
from hrmtext.generate.stop import LENGTH, STOP
from hrmtext.model import Depth, KVCache


class Conversation:
    """Turns with a model. Each prompt is one bidirectional block over all that came before.

    What was said before never sees what comes later, so the cache only grows, and an answer equals
    that of a run over the whole conversation.
    """

    def __init__(
        self, model: TextModel, *, system: str | None = None, condition: str = "direct"
    ) -> None:
        """Start without turns.

        Args:
            system: put in front of the first question, with a blank line between.
            condition: of every turn, as in `TextModel.generate`.

        Raises:
            DataError: an unknown condition.
        """
        model.tokenizer.parse_condition(condition)
        self.model, self.condition = model, condition
        self.tokens: list[int] = []
        """All tokens so far, prompts and answers."""
        self.messages: list[dict[str, str]] = []
        """All turns so far, as `TextModel.chat` takes them."""
        if system is not None and not system.isspace():
            self.messages.append({"role": "system", "content": system})
        self._blocks: list[tuple[int, int]] = []
        self._cache: KVCache | None = None

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are held."""
        return 0 if self._cache is None else self._cache.longest

    @property
    def room(self) -> int:
        """Tokens that still fit the model's context."""
        return self.model.config.max_seq_len - len(self.tokens)

    def add(self, question: str, answer: str) -> None:
        """Append a turn whose answer is given, for example one of an earlier conversation.

        Raises:
            DataError: the context has no room for it.
        """
        prompt = self._prompt(question)
        response = self.model.tokenizer.encode_response(answer)
        if len(prompt) + len(response) > self.room:
            raise DataError(self._no_room(len(prompt) + len(response)))
        self._append(prompt)
        self.tokens += response
        self._remember(question, answer)

    @torch.inference_mode()
    def ask(self, question: str, config: GenerateConfig | None = None) -> Generated:
        """The answer to a further question.

        Args:
            config: decoding options; `num_samples` must be 1.

        Raises:
            DataError: the context has no room for the question and one token of an answer; the
                conversation stays as it was.
            NonFiniteError: the model's logits are NaN or infinite.
        """
        config = config or GenerateConfig()
        if config.num_samples != 1:
            raise ConfigError(f"a conversation takes one answer a turn, not {config.num_samples}")
        depth = self.model._depth(None, config.guidance)
        prompt = self._prompt(question)
        if len(prompt) + 1 > self.room:
            raise DataError(self._no_room(len(prompt) + 1))
        before = len(self.tokens), self.num_cached
        self._append(prompt)
        try:
            answer, logprobs = self._answer(config, depth)
        except BaseException:  # an interrupt too leaves the conversation as it was
            self._forget(*before)
            raise
        eos = self.model.tokenizer.eos_id
        stopped = answer[-1] == eos
        num_prompt = len(self.tokens)
        # An answer that was cut ends all the same, as every answer in training does.
        self.tokens += answer if stopped else [*answer, eos]
        text = self.model.tokenizer.decode(answer[:-1] if stopped else answer)
        self._remember(question, text)
        return Generated(
            text=text,
            tokens=answer,
            finish_reason=STOP if stopped else LENGTH,
            logprobs=logprobs,
            num_prompt_tokens=num_prompt,
        )

    def _answer(self, config: GenerateConfig, depth: Depth | None) -> tuple[list[int], list[float]]:
        """Tokens of the answer and their log-probabilities."""
        limit = min(config.max_new_tokens, self.room)
        sampler = Sampler.for_rows(config, [self.tokens], [0], limit, self.model.device)
        step_model = self.model._steps.get(config.step)
        logits = self._read(step_model, config, depth)  # (1, V)
        assert self._cache is not None, "_read makes the cache"
        answer: list[int] = []
        logprobs: list[float] = []
        while True:
            chosen = sampler(logits, len(answer))  # (1)
            answer.append(int(chosen))
            logprobs.append(float(logits[0].float().log_softmax(-1)[chosen]))
            if answer[-1] == self.model.tokenizer.eos_id or len(answer) == limit:
                return answer, logprobs
            self._make_room(1)
            logits = step_model(chosen, self._cache, depth, config.guidance)

    def _forget(self, num_tokens: int, num_cached: int) -> None:
        """Take back a prompt that got no answer."""
        del self.tokens[num_tokens:]
        self._blocks.pop()
        if self._cache is not None:
            self._cache.trim(torch.tensor([num_cached], device=self._cache.device))

    def _prompt(self, question: str) -> list[int]:
        system = None
        if not self.tokens and self.messages:
            system = self.messages[0]["content"]
        return self.model.tokenizer.encode_prompt(with_system(system, question), self.condition)

    def _append(self, prompt: list[int]) -> None:
        self._blocks.append((len(self.tokens), len(self.tokens) + len(prompt)))
        self.tokens += prompt

    def _remember(self, question: str, answer: str) -> None:
        self.messages.append({"role": "user", "content": question})
        self.messages.append({"role": "assistant", "content": answer})

    def _read(
        self, step_model: StepFunction, config: GenerateConfig, depth: Depth | None
    ) -> torch.Tensor:
        """Run what the cache does not hold; (1, V) logits behind the last token."""
        held = self.num_cached
        new = self.tokens[held:]
        blocks = [(a - held, b - held) for a, b in self._blocks if b > held]
        self._make_room(len(new))
        assert self._cache is not None, "made by _make_room"
        is_prefix_lm = self.model.config.prefix_lm
        layout = RowLayout.from_blocks([len(new)], [blocks if is_prefix_lm else []])
        tokens = torch.tensor(new, device=self.model.device)
        logits = step_model.read(tokens, layout, self._cache, depth, config.guidance)
        if not bool(logits.isfinite().all()):
            raise NonFiniteError("the model's logits are NaN or infinite; are its weights damaged?")
        return logits

    def _make_room(self, count: int) -> None:
        """A cache with room for `count` further tokens."""
        model = self.model.model
        if self._cache is None:
            self._cache = KVCache(
                model.config,
                1,
                min(model.config.max_seq_len, count + MIN_GROWTH_TOKENS),
                device=self.model.device,
                dtype=cache_dtype(model),
            )
        while self._cache.longest + count > self._cache.capacity:
            grow(self._cache, model.config.max_seq_len)

    def _no_room(self, wanted: int) -> str:
        return (
            f"the conversation has {len(self.tokens)} tokens and {wanted} more are needed, but the "
            f"model's context is {self.model.config.max_seq_len}; start a new conversation"
        )


def answer_conversations(
    model: TextModel,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    condition: str | Sequence[str] = "direct",
    config: GenerateConfig | None = None,
    *,
    depth: Depth | tuple[int, int] | None = None,
    with_logprobs: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """Answers to many conversations that each end with the user's message, batched.

    Args:
        conversations: messages as for `TextModel.chat`.
        condition: for all of them, or one each; it stands in every turn.

    Raises:
        DataError: messages that make no conversation, or one that leaves no room to answer.
    """
    conditions = [condition] * len(conversations) if isinstance(condition, str) else condition
    encoded = []
    for messages, name in zip(conversations, conditions, strict=True):
        history, question = read_question(list(messages))
        encoded.append(model.tokenizer.encode_question(history, question, name))
    if not encoded:
        return []
    return model.generate_ids(
        [ids for ids, _ in encoded],
        [blocks for _, blocks in encoded],
        config,
        depth=depth,
        with_logprobs=with_logprobs,
        progress=progress,
    )
