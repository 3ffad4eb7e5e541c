"""Weights as the kernels read them.

Letters: O outputs and I inputs of a projection.
"""

from __future__ import annotations

import torch


def pack_columns(weight: torch.Tensor, lanes: int, *, bf16: bool = False) -> torch.Tensor:
    """(O, I) -> (O / lanes, I, lanes) in fp32 or (O / lanes, I / 2, lanes, 2) in bf16.

    Outputs are padded with zeros to a multiple of two blocks.
    """
    weight = weight.detach().to(torch.bfloat16 if bf16 else torch.float32)
    missing = -len(weight) % (2 * lanes)
    weight = torch.nn.functional.pad(weight, (0, 0, 0, missing)) if missing else weight
    blocks = weight.unflatten(0, (-1, lanes))  # (O / lanes, lanes, I)
    if bf16:
        return blocks.unflatten(2, (-1, 2)).transpose(1, 2).contiguous()
    return blocks.transpose(1, 2).contiguous()


def alternate(gate_up: torch.Tensor, lanes: int, *, bf16: bool = False) -> torch.Tensor:
    """Gate and up of (2M, I), packed each, block by block in turn."""
    gate, up = (pack_columns(half, lanes, bf16=bf16) for half in gate_up.chunk(2))
    return torch.stack((gate, up), dim=1).flatten(0, 1)
