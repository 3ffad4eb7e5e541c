"""TextModel: a model with its tokenizer, from texts to texts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hrmtext.batch import RowLayout
from hrmtext.config.base import build
from hrmtext.config.generate import GenerateConfig
from hrmtext.config.model import ModelConfig
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.errors import BackendError, ConfigError, DataError
from hrmtext.generate.batches import MAX_BATCH_TOKENS, near_tokens, plan_batches
from hrmtext.generate.choice import Steps
from hrmtext.generate.cpp import CppStep
from hrmtext.generate.cpp.step import packed_bytes
from hrmtext.generate.decode import Blocks, DecodeSettings, cache_dtype, decode_batch, prefill
from hrmtext.generate.sampling import Sampler
from hrmtext.generate.step import StepFunction, run_model
from hrmtext.generate.stop import LENGTH, STOP, stop_ids, stop_table
from hrmtext.model import Depth, HrmLM, KVCache, make_plan
from hrmtext.model.flops import kv_bytes_per_token
from hrmtext.runtime.device import last_cache_bytes

CPU_CACHE_BYTES = 1 << 30
CUDA_CACHE_SHARE = 0.4
"""Share of the free GPU memory that a batch's keys and values may take."""

SELFTEST_UNITS = {2: 16, 4: 64, 8: 64}
"""Bytes a value -> units in the last place of the largest logit that the self-test allows.

Sound models are off by 1 unit in bf16 and 2 to 4 in fp32; deeper ones by more.
"""


@dataclasses.dataclass(frozen=True)
class Generated:
    """One answer."""

    text: str
    """Without its stop token and without special tokens."""
    tokens: list[int]
    """Its stop token included, where one came."""
    finish_reason: str
    """`stop`: a stop token came. `length`: max_new_tokens or max_seq_len was reached."""
    logprobs: list[float] | None
    """Of each token, in the model's own distribution; None where not asked for."""
    num_prompt_tokens: int


class TextModel:
    """A model that answers prompts. Holds no state between calls."""

    def __init__(self, model: HrmLM, tokenizer: PromptTokenizer) -> None:
        """Join a model and its tokenizer.

        Raises:
            DataError: the tokenizer has more entries than the model's embedding.
        """
        if tokenizer.vocab_size > model.config.vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.vocab_size} entries, the model's embedding only "
                f"{model.config.vocab_size}: they do not belong together"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._steps = Steps(self.model)

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.model.lm_head.weight.dtype

    def generate(
        self,
        prompts: str | Sequence[str],
        condition: str | Sequence[str] = "direct",
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_tokens: Sequence[int | str] | None = None,
        num_samples: int = 1,
        guidance: float = 0.0,
        depth: Depth | tuple[int, int] | None = None,
        batch_tokens: int | None = None,
        step: str = "auto",
    ) -> list[str]:
        """Answers to one or many prompts, in their order.

        Args:
            prompts: texts; special tokens written in them are plain text.
            condition: `direct`, `cot`, `noisy`, `synth`, a comma list of them, or one for each
                prompt.
            num_samples: answers to each prompt; those of prompt i are [i * n : (i + 1) * n].
            stop_tokens: ids or texts of single tokens that end an answer; None: the end token.
            guidance: auto-guidance weight, see `GenerateConfig`.
            step: what takes a decode step: auto, eager, compiled or cpp; see `GenerateConfig`.
            depth: (H_cycles, L_cycles) to run, at most the model's own; None: the model's.

        An answer depends on its own prompt, sample number and the options, not on its batch.

        Raises:
            DataError: a prompt that leaves no room for an answer, or an unknown condition.
            ConfigError: an option out of range.
        """
        config = build(
            GenerateConfig,
            {
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "seed": seed,
                "num_samples": num_samples,
                "guidance": guidance,
                "batch_tokens": batch_tokens,
                "step": step,
            },
            where="generate",
        )
        answers = self.generate_tokens(
            prompts, condition, config, stop_tokens=stop_tokens, depth=depth, with_logprobs=False
        )
        return [answer.text for answer in answers]

    def generate_tokens(
        self,
        prompts: str | Sequence[str],
        condition: str | Sequence[str] = "direct",
        config: GenerateConfig | None = None,
        *,
        stop_tokens: Sequence[int | str] | None = None,
        depth: Depth | tuple[int, int] | None = None,
        with_logprobs: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Generated]:
        """As `generate`, with token ids, finish reasons and log-probabilities.

        Args:
            progress: called after every batch with the answers done and wanted.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            return []
        return self.generate_ids(
            self.tokenizer.encode_prompts(texts, condition), None, config,
            stop_tokens=stop_tokens, depth=depth, with_logprobs=with_logprobs, progress=progress,
        )  # fmt: skip

    def chat(
        self, messages: Sequence[Mapping[str, Any]], condition: str = "direct", **options: Any
    ) -> str:
        """The answer to a conversation that ends with the user's message.

        `Conversation` goes on from there without reading all of it again.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first.
            options: fields of `GenerateConfig`.

        Raises:
            DataError: messages that make no conversation, or one that leaves no room to answer.
        """
        from hrmtext.generate.conversation import answer_conversations

        config = build(GenerateConfig, options, where="chat")
        return answer_conversations(self, [messages], condition, config)[0].text

    def generate_ids(
        self,
        encoded: Sequence[list[int]],
        blocks: Sequence[Blocks] | None,
        config: GenerateConfig | None = None,
        *,
        stop_tokens: Sequence[int | str] | None = None,
        depth: Depth | tuple[int, int] | None = None,
        with_logprobs: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Generated]:
        """As `generate_tokens` for encoded prompts; `blocks` as for `prefill`."""
        config = config or GenerateConfig()
        longest = self.config.max_seq_len - 1
        for index, ids in enumerate(encoded):
            if len(ids) > longest:
                raise DataError(
                    f"prompt {index} has {len(ids)} tokens with its condition and end; this model "
                    f"takes at most {longest}, which leaves one for the answer. Shorten it"
                )
        settings = DecodeSettings(
            stop=stop_table(
                stop_ids(self.tokenizer, stop_tokens), self.config.vocab_size, self.device
            ),
            depth=self._depth(depth, config.guidance),
            guidance=config.guidance,
            with_logprobs=with_logprobs,
        )
        limits = [min(config.max_new_tokens, self.config.max_seq_len - len(p)) for p in encoded]
        answers: list[Generated | None] = [None] * (len(encoded) * config.num_samples)
        step_model = self._steps.get(config.step)
        for rows in self._batches(encoded, limits, config, step_model):
            found = self._answer(rows, encoded, blocks, limits, config, settings, step_model)
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
            if progress is not None:
                progress(sum(answer is not None for answer in answers), len(answers))
        return [answer for answer in answers if answer is not None]

    def _answer(
        self,
        rows: Sequence[int],
        encoded: Sequence[list[int]],
        blocks: Sequence[Blocks] | None,
        limits: Sequence[int],
        config: GenerateConfig,
        settings: DecodeSettings,
        step_model: StepFunction,
    ) -> list[Generated]:
        """Answers of one batch; row i is sample i % num_samples of prompt i // num_samples."""
        owners = [row // config.num_samples for row in rows]
        unique = list(dict.fromkeys(owners))
        place = {owner: index for index, owner in enumerate(unique)}
        sampler = Sampler.for_rows(
            config,
            [encoded[owner] for owner in owners],
            [row % config.num_samples for row in rows],
            max(limits[owner] for owner in owners),
            self.device,
        )
        decoded = decode_batch(
            step_model,
            [encoded[owner] for owner in unique],
            [place[owner] for owner in owners],
            [limits[owner] for owner in owners],
            sampler,
            settings,
            None if blocks is None else [blocks[owner] for owner in unique],
        )
        spoken = self.tokenizer.decode_batch(
            [row.tokens[:-1] if row.stopped else row.tokens for row in decoded]
        )
        return [
            Generated(
                text=text,
                tokens=row.tokens,
                finish_reason=STOP if row.stopped else LENGTH,
                logprobs=row.logprobs,
                num_prompt_tokens=len(encoded[owner]),
            )
            for row, text, owner in zip(decoded, spoken, owners, strict=True)
        ]

    @torch.inference_mode()
    def logits(
        self,
        prompt: str,
        response: str = "",
        condition: str = "direct",
        *,
        guidance: float = 0.0,
        depth: Depth | tuple[int, int] | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """(T, V) logits behind every token of the prompt and of the response's text.

        Entry `num_prompt_tokens - 1` predicts the response's first token. The prompt is seen
        bidirectionally where the model is a PrefixLM.
        """
        prompt_ids = self.tokenizer.encode_prompt(prompt, condition)
        ids = prompt_ids + self.tokenizer.encode_texts([response])[0]
        if len(ids) > self.config.max_seq_len:
            raise DataError(f"{len(ids)} tokens, but max_seq_len is {self.config.max_seq_len}")
        prefix = len(prompt_ids) if self.config.prefix_lm else 0
        layout = RowLayout.from_prefixes([len(ids)], [prefix])
        plan = make_plan(
            layout,
            device=self.device,
            dtype=self.dtype,
            backend=backend,
            head_dim=self.config.head_dim,
        )
        tokens = torch.tensor(ids, device=self.device)
        positions = torch.arange(len(ids), device=self.device)
        return run_model(
            self.model, tokens, positions, plan, self._depth(depth, guidance), guidance
        )

    def selftest(self, prompt: str = "What is 12 + 30?", response: str = "42") -> float:
        """Prove that the generation path applies the prefix mask; returns its largest error.

        The cached path (prefill, then one step a response token) is compared with one pass of the
        reference backend in fp32, and a later prompt token must move the state at the first.

        Raises:
            BackendError: the logits differ beyond the number format's budget, or the first
                prompt position does not see the rest of the prompt (or does in a causal model).
        """
        prompt_ids = self.tokenizer.encode_prompt(prompt)
        response_ids = self.tokenizer.encode_texts([response])[0]
        cached, _ = self._cached_path(prompt_ids, response_ids)
        if self.dtype == torch.float32:
            wide = self
        else:
            wide = TextModel(copy.deepcopy(self.model).float(), self.tokenizer)
        exact = wide.logits(prompt, response, backend="reference")[len(prompt_ids) - 1 :]
        error = float((cached.float() - exact).abs().max())
        budget = SELFTEST_UNITS[self.dtype.itemsize] * torch.finfo(self.dtype).eps
        budget *= float(exact.abs().max())
        if not error <= budget:
            raise BackendError(
                f"self-test: cached logits differ from the reference by {error:.2e}, expected at "
                f"most {budget:.2e}; the prefix mask, positions or cache are not applied rightly"
            )
        changed = list(prompt_ids)
        changed[-2] = self.tokenizer.eos_id
        moved = not torch.equal(
            self._cached_path(prompt_ids, [])[1], self._cached_path(changed, [])[1]
        )
        if moved != self.config.prefix_lm:
            raise BackendError(
                "self-test: the first prompt token "
                + ("does not see the prompt's end" if not moved else "sees the prompt's end")
                + f", but prefix_lm is {self.config.prefix_lm}"
            )
        return error

    @torch.inference_mode()
    def _cached_path(
        self, prompt_ids: list[int], response_ids: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits behind the prompt and each response token, and the keys of position 0.

        By the steps that `generate` takes when nothing else is asked for.
        """
        step_model = self._steps.get("auto")
        cache = KVCache(
            self.config,
            1,
            len(prompt_ids) + len(response_ids),
            device=self.device,
            dtype=cache_dtype(self.model),
        )
        no_stop = stop_table([], self.config.vocab_size, self.device)
        found = [prefill(step_model, cache, [prompt_ids], DecodeSettings(stop=no_stop))]
        first = cache.keys[-1][0, :, 0].clone()
        for token in response_ids:
            tokens = torch.tensor([token], device=self.device)
            found.append(step_model(tokens, cache, None, 0.0))
        return torch.cat(found), first

    def _depth(self, depth: Depth | tuple[int, int] | None, guidance: float) -> Depth | None:
        if isinstance(depth, tuple):
            H_cycles, L_cycles = depth
            own = (self.config.H_cycles, self.config.L_cycles)
            least = (1, min(1, own[1]))  # a plain transformer has no L calls
            if not (1 <= H_cycles <= own[0] and least[1] <= L_cycles <= own[1]):
                raise ConfigError(f"depth is {depth}, expected from {least} to {own}")
            depth = Depth(H_cycles, L_cycles, (False,) * (H_cycles * (L_cycles + 1)))
        H_cycles = depth.H_cycles if depth else self.config.H_cycles
        if guidance and H_cycles < 2:
            raise ConfigError("guidance compares the first with the last H cycle; there is but one")
        return depth

    def _batches(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        config: GenerateConfig,
        step_model: StepFunction,
    ) -> list[list[int]]:
        near = None
        if config.batch_tokens is None and isinstance(step_model, CppStep):
            near = near_tokens(
                last_cache_bytes(), packed_bytes(self.model), self._bytes_per_token()
            )
        most = config.batch_tokens or self._batch_tokens()
        lengths = [len(prompt) for prompt in prompts]
        return plan_batches(lengths, limits, config.num_samples, most, near)

    def _batch_tokens(self) -> int:
        room = CPU_CACHE_BYTES
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            room = int(free * CUDA_CACHE_SHARE)
        return max(1, min(MAX_BATCH_TOKENS, room // self._bytes_per_token()))

    def _bytes_per_token(self) -> int:
        return kv_bytes_per_token(self.config, cache_dtype(self.model).itemsize)
