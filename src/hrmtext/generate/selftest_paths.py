"""The paths that can be tested: our own, transformers, llama.cpp, a server by HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hrmtext.config.generate import GenerateConfig
from hrmtext.data.example import DEFAULT_CONDITION
from hrmtext.data.tokenizer import BEGIN, CONDITIONS, PROMPT_END
from hrmtext.errors import BackendError, CheckpointError
from hrmtext.generate.llama_cpp import LlamaCppModel
from hrmtext.generate.runner import TextModel
from hrmtext.generate.selftest import Answer
from hrmtext.generate.stop import LENGTH, STOP

BUDGETS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest relative difference from fp32 of a sound path, by number format."""
GGUF_BUDGETS = {"f32": 0.01, "f16": 0.02, "bf16": 0.06}
QUANTISED_BUDGET = 0.15
"""llama.cpp rounds activations as well; its cache is f16."""
TIMEOUT_S = 600.0


def written_prompt(prompt: str) -> str:
    """The prompt with its special tokens as text."""
    return BEGIN + CONDITIONS[DEFAULT_CONDITION] + prompt + PROMPT_END


class NativePath:
    """Our own generation path, in whatever number format the model was loaded."""

    def __init__(self, model: TextModel) -> None:
        self.model = model
        self.name = f"native ({str(model.dtype).removeprefix('torch.')} on {model.device.type})"
        self.budget = BUDGETS[model.dtype]

    def logits(
        self, prompt: str, prompt_tokens: Sequence[int], response: Sequence[int]
    ) -> torch.Tensor:
        """(1 + R, V), by prefill and one step a token."""
        found, _ = self.model._cached_path(list(prompt_tokens), list(response))
        return found.float().cpu()

    def answer(self, prompt: str, max_new_tokens: int) -> Answer:
        """The greedy answer."""
        config = GenerateConfig(max_new_tokens=max_new_tokens)
        found = self.model.generate_tokens(prompt, config=config)[0]
        return Answer(found.text, found.finish_reason)


class LlamaCppPath:
    """A GGUF file in llama.cpp, as `hrm-text generate` runs it."""

    def __init__(self, model: LlamaCppModel, *, prefix: bool | None = None) -> None:
        """`prefix` as in `LlamaCppModel.logits`; llama.cpp's own programs run with False."""
        self.model, self.prefix = model, prefix
        kinds = [kind for kind in model.kinds if kind != "f32"] or ["f32"]
        self.name = f"llama.cpp ({', '.join(kinds)})"
        self.budget = max(GGUF_BUDGETS.get(kind, QUANTISED_BUDGET) for kind in kinds)

    def logits(
        self, prompt: str, prompt_tokens: Sequence[int], response: Sequence[int]
    ) -> torch.Tensor:
        """(1 + R, V), the prompt in one micro-batch and then token by token."""
        return self.model.logits(prompt_tokens, response, prefix=self.prefix)

    def answer(self, prompt: str, max_new_tokens: int) -> Answer:
        """The greedy answer."""
        config = GenerateConfig(max_new_tokens=max_new_tokens)
        found = self.model.generate_tokens(prompt, config=config)[0]
        return Answer(found.text, found.finish_reason)


class TransformersPath:
    """A Hugging Face folder as its users run it: what the tokenizer gives goes into the model."""

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Load model and tokenizer.

        Raises:
            CheckpointError: transformers cannot load the folder.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"transformers cannot load {folder}: {error}") from error
        self.name = f"transformers ({str(dtype).removeprefix('torch.')})"
        self.budget = BUDGETS[dtype]

    def logits(
        self, prompt: str, prompt_tokens: Sequence[int], response: Sequence[int]
    ) -> torch.Tensor:
        """(1 + R, V), by a first forward and one step a token over its cache.

        Raises:
            CheckpointError: the folder's tokenizer reads other tokens.
        """
        encoded = dict(self.tokenizer(written_prompt(prompt), return_tensors="pt"))
        if encoded["input_ids"][0].tolist() != list(prompt_tokens):
            raise CheckpointError(
                f"the tokenizer beside the model reads {prompt!r} as other tokens than it was "
                "trained with; export the model again"
            )
        with torch.inference_mode():
            out = self.model(**encoded, use_cache=True)
            found = [out.logits[0, -1]]
            # The cache's name changed with transformers 5.24.
            name = "cache" if "cache" in out else "past_key_values"
            for token in response:
                out = self.model(
                    input_ids=torch.tensor([[token]]),
                    use_cache=True,
                    **{name: out[name]},
                )
                found.append(out.logits[0, -1])
        return torch.stack(found).float()

    def answer(self, prompt: str, max_new_tokens: int) -> Answer:
        """The greedy answer by `generate`, with the folder's own end token."""
        encoded = dict(self.tokenizer(written_prompt(prompt), return_tensors="pt"))
        with torch.inference_mode():
            out = self.model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
        tokens = out[0, encoded["input_ids"].shape[1] :].tolist()
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        reason = STOP if tokens and tokens[-1] in ends else LENGTH
        return Answer(self.tokenizer.decode(tokens, skip_special_tokens=True), reason)


class ServerPath:
    """A server with OpenAI's completions interface."""

    def __init__(self, url: str, model: str | None = None) -> None:
        """`url` is the server's address, with or without `/v1`; `model` the name to ask for."""
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self.name = f"server at {url}"
        self.model = model or self._first_model()

    def answer(self, prompt: str, max_new_tokens: int) -> Answer:
        """The greedy answer; the prompt is sent as text, special tokens included.

        Raises:
            BackendError: the server cannot be reached, refuses, or answers in another form.
        """
        found = self._ask(
            "completions",
            {
                "model": self.model,
                "prompt": written_prompt(prompt),
                "max_tokens": max_new_tokens,
                "temperature": 0,
                "logprobs": 1,
            },
        )
        try:
            choice = found["choices"][0]
            details = choice.get("logprobs") or {}
            return Answer(
                choice["text"],
                STOP if choice.get("finish_reason") == STOP else LENGTH,
                details.get("tokens"),
                details.get("token_logprobs"),
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise BackendError(
                f"{self.url}/completions answered in another form than OpenAI's: {found!r:.200}"
            ) from error

    def _first_model(self) -> str:
        found = self._ask("models", None)
        try:
            return str(found["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise BackendError(f"{self.url}/models lists no model; name one") from error

    def _ask(self, verb: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/{verb}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read().decode("utf-8", "replace")[:300]
            raise BackendError(f"{self.url}/{verb} answered {error.code}: {detail}") from error
        except (OSError, ValueError) as error:
            raise BackendError(f"cannot ask {self.url}/{verb}: {error}") from error
