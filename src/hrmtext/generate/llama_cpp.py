"""GGUF models run by llama.cpp under the prefix mask.

llama.cpp's own programs run HRM-Text causally. Its C interface has a switch for causal attention:
off while the prompt is decoded in one micro-batch, on from the first token of the answer, it gives
the mask that the model was trained with.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from hrmtext.artifacts.gguf_file import GgufFile, open_gguf
from hrmtext.config.base import build
from hrmtext.config.generate import GenerateConfig
from hrmtext.config.model import ModelConfig
from hrmtext.errors import BackendError, ConfigError, DataError
from hrmtext.generate.gguf_tokenizer import tokenizer_of
from hrmtext.generate.llama_cpp_library import F16_CACHE, F32_CACHE, Batch, library
from hrmtext.generate.runner import Generated
from hrmtext.generate.sampling import Sampler
from hrmtext.generate.stop import LENGTH, STOP, stop_ids
from hrmtext.model import Depth

CAPACITY_STEP = 256
"""Tokens by which a context grows; llama.cpp rounds to this too."""
CACHES = {"f16": (F16_CACHE, -1), "f32": (F32_CACHE, 0)}
"""Cache format -> ggml's number of it, and whether fused attention may be used (-1) or not (0)."""


class LlamaCppModel:
    """A GGUF file that answers prompts as `TextModel` does. Not for several threads at once."""

    def __init__(self, path: str | Path, *, threads: int | None = None, cache: str = "f16") -> None:
        """Load a model.

        Args:
            threads: processor threads; None: as many as torch uses.
            cache: number format of keys and values; `f16` is llama.cpp's default, `f32` is exact.

        Raises:
            CheckpointError: the file is not a sound HRM-Text GGUF, or has no tokenizer.
            BackendError: llama.cpp is not installed, or refuses the file.
        """
        if cache not in CACHES:
            raise ConfigError(f"cache is {cache!r}, expected {' or '.join(CACHES)}")
        # llama.cpp ends the process on some damaged files, so ours are checked first.
        self.config: ModelConfig = open_gguf(path).config
        file = GgufFile(path)
        self.path = file.path
        self.tokenizer = tokenizer_of(file.values, str(path))
        self.kinds = file.kinds
        self.threads = threads or torch.get_num_threads()
        self._cache = cache
        self._library = library()
        self._model = self._context = self._memory = None
        self._capacity = 0
        params = self._library.llama_model_default_params()
        self._model = self._library.llama_model_load_from_file(bytes(self.path), params)
        if not self._model:
            raise BackendError(f"llama.cpp cannot load {path}: {self._library.take_problems()}")
        self._vocab = self._library.llama_model_get_vocab(self._model)
        if self._library.llama_vocab_n_tokens(self._vocab) != self.config.vocab_size:
            raise BackendError(f"llama.cpp reads another vocabulary size from {path}")

    def __enter__(self) -> LlamaCppModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free what llama.cpp holds."""
        if getattr(self, "_context", None):
            self._library.llama_free(self._context)
        if getattr(self, "_model", None):
            self._library.llama_model_free(self._model)
        self._context = self._model = None
        self._capacity = 0

    def generate(
        self,
        prompts: str | Sequence[str],
        condition: str | Sequence[str] = "direct",
        *,
        stop_tokens: Sequence[int | str] | None = None,
        **options: Any,
    ) -> list[str]:
        """Answers to one or many prompts; arguments as in `TextModel.generate`.

        Options: max_new_tokens, temperature, top_k, top_p, seed, num_samples. A draw depends on
        the same numbers as there.

        Raises:
            DataError: a prompt that leaves no room for an answer, or an unknown condition.
            ConfigError: an option out of range, or guidance, which needs the first cycle's state.
        """
        config = build(GenerateConfig, options, where="generate")
        answers = self.generate_tokens(
            prompts, condition, config, stop_tokens=stop_tokens, with_logprobs=False
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
            depth: None; the number of cycles is the file's.
        """
        config = config or GenerateConfig()
        if depth is not None:
            raise ConfigError(
                "depth is set in the GGUF file; use the native engine for other cycles"
            )
        if config.guidance:
            raise ConfigError(
                "guidance compares the states of two cycles, which llama.cpp does not give; "
                "use the native engine"
            )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded = self.tokenizer.encode_prompts(texts, condition) if texts else []
        for index, ids in enumerate(encoded):
            self._require_room(ids, f"prompt {index}")
        stops = frozenset(stop_ids(self.tokenizer, stop_tokens))
        answers: list[Generated] = []
        for ids in encoded:
            for answer in self._answer(ids, config, stops, with_logprobs):
                answers.append(answer)
                if progress is not None:
                    progress(len(answers), len(encoded) * config.num_samples)
        return answers

    def logits(
        self,
        prompt_tokens: Sequence[int],
        response_tokens: Sequence[int] = (),
        *,
        prefix: bool | None = None,
    ) -> torch.Tensor:
        """(1 + R, V) fp32 logits behind the prompt and behind each token of the response.

        Args:
            prefix: whether the prompt sees itself in both directions; None: as the model says.

        Raises:
            DataError: no prompt, or more tokens than the context has.
        """
        if not prompt_tokens:
            raise DataError("the prompt has no token")
        total = len(prompt_tokens) + len(response_tokens)
        if total > self.config.max_seq_len:
            raise DataError(f"{total} tokens, but max_seq_len is {self.config.max_seq_len}")
        rows = [self._read_prompt(prompt_tokens, total, prefix)]
        rows += [
            self._decode([token], len(prompt_tokens) + place)
            for place, token in enumerate(response_tokens)
        ]
        return torch.stack(rows)

    def tokenise(self, text: str) -> list[int]:
        """Ids that llama.cpp's own tokenizer gives a plain text, special tokens left as text."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self._library.llama_tokenize(
            self._vocab, data, len(data), ids, len(ids), False, False
        )
        if count < 0:
            raise BackendError(f"llama.cpp cannot tokenise {text[:40]!r}")
        return list(ids[:count])

    def _answer(
        self, ids: list[int], config: GenerateConfig, stops: frozenset[int], with_logprobs: bool
    ) -> Iterator[Generated]:
        """Every sample's answer to a prompt, which is decoded once."""
        limit = min(config.max_new_tokens, self.config.max_seq_len - len(ids))
        first = self._read_prompt(ids, len(ids) + limit, None)
        for sample in range(config.num_samples):
            if sample:
                self._library.llama_memory_seq_rm(self._memory, 0, len(ids), -1)
            sampler = Sampler.for_rows(config, [ids], [sample], limit, torch.device("cpu"))
            logits, tokens, logprobs = first, list[int](), list[float]()
            while True:
                tokens.append(int(sampler(logits[None], len(tokens))))
                if with_logprobs:
                    logprobs.append(float(logits.double().log_softmax(-1)[tokens[-1]]))
                if tokens[-1] in stops or len(tokens) == limit:
                    break
                logits = self._decode(tokens[-1:], len(ids) + len(tokens) - 1)
            stopped = tokens[-1] in stops
            yield Generated(
                text=self.tokenizer.decode(tokens[:-1] if stopped else tokens),
                tokens=tokens,
                finish_reason=STOP if stopped else LENGTH,
                logprobs=logprobs if with_logprobs else None,
                num_prompt_tokens=len(ids),
            )

    def _read_prompt(self, ids: Sequence[int], capacity: int, prefix: bool | None) -> torch.Tensor:
        """Forget everything, decode a prompt; (V) logits behind it."""
        self._reserve(capacity)
        self._library.llama_memory_clear(self._memory, False)
        both_ways = self.config.prefix_lm if prefix is None else prefix
        self._library.llama_set_causal_attn(self._context, not both_ways)
        try:
            return self._decode(ids, 0)
        finally:
            self._library.llama_set_causal_attn(self._context, True)

    def _decode(self, ids: Sequence[int], start: int) -> torch.Tensor:
        """Decode tokens as one micro-batch from position `start`; (V) logits behind the last."""
        count = len(ids)
        sequence = (ctypes.c_int32 * 1)(0)
        owners = (ctypes.POINTER(ctypes.c_int32) * count)(*[sequence] * count)
        wanted = (ctypes.c_int8 * count)(*[0] * (count - 1), 1)
        batch = Batch(
            n_tokens=count,
            token=(ctypes.c_int32 * count)(*ids),
            pos=(ctypes.c_int32 * count)(*range(start, start + count)),
            n_seq_id=(ctypes.c_int32 * count)(*[1] * count),
            seq_id=owners,
            logits=wanted,
        )
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise BackendError(
                f"llama.cpp could not decode {count} tokens at position {start} (status {status}): "
                f"{self._library.take_problems()}"
            )
        found = self._library.llama_get_logits_ith(self._context, count - 1)
        view = np.ctypeslib.as_array(found, (self.config.vocab_size,))
        return torch.from_numpy(view.copy())

    def _reserve(self, tokens: int) -> None:
        """A context that holds `tokens`; a prompt of that length fits one micro-batch."""
        if self._model is None:
            raise BackendError(f"{self.path} was closed")
        if tokens <= self._capacity:
            return
        if self._context:
            self._library.llama_free(self._context)
            self._context = None
        capacity = -(-tokens // CAPACITY_STEP) * CAPACITY_STEP
        number, fused = CACHES[self._cache]
        params = self._library.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = capacity
        params.n_outputs_max = 1
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = number
        params.flash_attn_type = fused
        self._context = self._library.llama_init_from_model(self._model, params)
        if not self._context:
            raise BackendError(
                f"llama.cpp has no room for {capacity} tokens of context: "
                f"{self._library.take_problems()}; lower max_new_tokens or shorten the prompt"
            )
        if self._library.llama_n_ubatch(self._context) < capacity:
            raise BackendError("llama.cpp made the micro-batch smaller than the prompt needs")
        self._memory = self._library.llama_get_memory(self._context)
        self._capacity = capacity

    def _require_room(self, ids: Sequence[int], what: str) -> None:
        longest = self.config.max_seq_len - 1
        if len(ids) > longest:
            raise DataError(
                f"{what} has {len(ids)} tokens with its condition and end; this model takes at "
                f"most {longest}, which leaves one for the answer. Shorten it"
            )
