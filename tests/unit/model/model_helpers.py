"""Small models and streams for the tests of model/."""

from __future__ import annotations

import torch

from hrmtext.batch import RowLayout
from hrmtext.config import ModelConfig, preset
from hrmtext.model import HrmLM, build_model, make_plan


def model_in(dtype: torch.dtype = torch.float64, seed: int = 1, **changes) -> HrmLM:
    """The tiny preset with random weights."""
    return build_model(preset("test", **changes), seed=seed).to(dtype)


def random_rows(count: int, seed: int, config: ModelConfig, longest: int = 24) -> list[list[int]]:
    """Rows of different length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator).tolist()
    return [
        torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()
        for length in lengths
    ]


def run(
    model: HrmLM,
    rows: list[list[int]],
    prefixes: list[int],
    *,
    backend: str = "sdpa",
    depth=None,
    num_tokens: int | None = None,
):
    """LMOutput of the packed rows; the stream is padded to `num_tokens`."""
    layout = RowLayout.from_prefixes([len(row) for row in rows], prefixes, num_tokens)
    return run_layout(model, rows, layout, backend=backend, depth=depth)


def run_layout(model: HrmLM, rows: list[list[int]], layout: RowLayout, *, backend, depth=None):
    """LMOutput of the packed rows under any layout."""
    padding = layout.num_padding
    tokens = torch.tensor([token for row in rows for token in row] + [0] * padding)
    positions = torch.cat([torch.arange(len(row)) for row in rows] + [torch.arange(padding)])
    plan = make_plan(layout, dtype=model.lm_head.weight.dtype, backend=backend)
    return model(tokens, positions, plan, depth=depth)


def gradients(model: HrmLM) -> dict[str, torch.Tensor | None]:
    """Every parameter's gradient, cloned; the model's are cleared."""
    found = {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return found
