"""What any path is compared with: our logits in fp32, and how far others are from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from hrmtext.batch import RowLayout
from hrmtext.model import HrmLM, make_plan

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of a response."""


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far some logits are from others, over all positions compared."""

    argmax_agreement: float
    """Share of positions whose most probable token is the same."""
    max_difference: float
    """Of two logits."""
    kl: float
    """Mean Kullback-Leibler divergence of the expected from the found distribution, in nats."""
    relative: float
    """Root mean square of the differences over that of the expected logits."""

    @classmethod
    def between(cls, expected: torch.Tensor, found: torch.Tensor) -> Distance:
        """(P, V) logits each."""
        expected, found = expected.double(), found.double()
        log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
        difference = found - expected
        return cls(
            argmax_agreement=float((expected.argmax(-1) == found.argmax(-1)).double().mean()),
            max_difference=float(difference.abs().max()),
            kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
            relative=float(difference.square().mean().sqrt() / expected.square().mean().sqrt()),
        )


@torch.inference_mode()
def reference_logits(
    model: HrmLM, rows: Sequence[Row], *, prefix: bool | None = None
) -> torch.Tensor:
    """(P, V) logits behind the prompt and behind every response token of each row.

    Args:
        model: one that computes in fp32.
        prefix: whether prompts see themselves in both directions; None: as the model says.
    """
    both_ways = model.config.prefix_lm if prefix is None else prefix
    weight = model.lm_head.weight
    found = []
    for prompt, response in rows:
        ids = [*prompt, *response]
        layout = RowLayout.from_prefixes([len(ids)], [len(prompt) if both_ways else 0])
        plan = make_plan(layout, device=weight.device, dtype=torch.float32)
        tokens = torch.tensor(ids, device=weight.device)
        positions = torch.arange(len(ids), device=weight.device)
        wanted = positions[len(prompt) - 1 :]
        found.append(model(tokens, positions, plan, select=wanted).logits.float().cpu())
    return torch.cat(found)
