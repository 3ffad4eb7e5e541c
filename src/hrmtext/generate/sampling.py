"""From logits to tokens: greedy, or drawn with numbers that do not depend on the batch.

Letters: B rows, V vocabulary, S tokens that an answer may have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from hrmtext.config.generate import GenerateConfig
from hrmtext.runtime.io import fingerprint
from hrmtext.runtime.rng import numpy_generator


def row_uniforms(seed: int, prompt: Sequence[int], sample: int, num_tokens: int) -> np.ndarray:
    """(S) float64 in [0, 1): entry i decides token i of this row, whatever rows are beside it.

    A longer answer's numbers begin with a shorter one's.
    """
    key = fingerprint(np.asarray(prompt, dtype=np.int64).tobytes())
    return numpy_generator(seed, "sample", key, sample).random(num_tokens)


@dataclasses.dataclass
class Sampler:
    """Chooses the next token of every row of a batch."""

    config: GenerateConfig
    uniforms: torch.Tensor | None
    """(B, S) float64 from `row_uniforms`; None for greedy decoding."""

    @classmethod
    def for_rows(
        cls,
        config: GenerateConfig,
        prompts: Sequence[Sequence[int]],
        samples: Sequence[int],
        num_tokens: int,
        device: torch.device,
    ) -> Sampler:
        """The sampler of a batch of (prompt, sample number) rows."""
        if config.temperature == 0:
            return cls(config, None)
        drawn = np.stack(
            [
                row_uniforms(config.seed, prompt, sample, num_tokens)
                for prompt, sample in zip(prompts, samples, strict=True)
            ]
        )
        return cls(config, torch.from_numpy(drawn).to(device))

    def __call__(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """(B, V) logits of answer position `step` -> (B) tokens."""
        if self.uniforms is None:
            return logits.argmax(-1)
        return draw(logits, self.uniforms[:, step], self.config)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only `rows`, in that order."""
        if self.uniforms is not None:
            self.uniforms = self.uniforms.index_select(0, rows)


def draw(logits: torch.Tensor, uniforms: torch.Tensor, config: GenerateConfig) -> torch.Tensor:
    """(B, V) logits and (B) uniforms -> (B) tokens, by inverting the cumulative distribution.

    Temperature first, then top-k, then top-p of what top-k left.
    """
    logits = logits.double() / config.temperature  # (B, V)
    tokens = None
    if config.top_k is not None and config.top_k < logits.shape[1]:
        logits, tokens = logits.topk(config.top_k, dim=-1)  # (B, k), most probable first
    elif config.top_p is not None:
        logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
    mass = logits.softmax(-1).cumsum(-1)  # (B, k or V)
    total = mass[:, -1:]
    if config.top_p is not None:
        # The last token kept is the first whose cumulative mass reaches top_p.
        last = torch.searchsorted(mass, total * config.top_p).clamp_(max=mass.shape[1] - 1)
        total = mass.gather(1, last)
    place = torch.searchsorted(mass, uniforms[:, None] * total, right=True)
    place.clamp_(max=mass.shape[1] - 1)
    return (place if tokens is None else tokens.gather(1, place)).squeeze(1)
