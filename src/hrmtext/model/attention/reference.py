"""The oracle: attention over the whole stream with a dense mask, in any dtype, weights on request.

Letters: T tokens, N heads, K head width.
"""

from __future__ import annotations

import torch

from hrmtext.batch import RowLayout


class ReferencePlan:
    """Dense T x T mask; slow, and written to be read."""

    def __init__(self, layout: RowLayout, device: torch.device, dtype: torch.dtype) -> None:
        del dtype  # the dense mask serves every dtype
        self.mask = dense_mask(layout).to(device)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        """(T, N, K) each -> (T, N, K)."""
        del slot
        return torch.einsum("nij,jnk->ink", self.weights(q, k), v)

    def weights(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """(N, T, T) attention weights; rows of padding tokens are zero."""
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("ink,jnk->nij", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~self.mask, float("-inf"))
        seen = self.mask.any(1)[:, None]
        scores = torch.where(seen, scores, 0.0)
        return torch.where(seen, scores.softmax(-1), 0.0).to(q.dtype)


def dense_mask(layout: RowLayout) -> torch.Tensor:
    """(T, T) bool: whether query i (row) sees key j (column)."""
    mask = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for start, length in zip(layout.starts(), layout.lengths, strict=True):
        row = slice(start, start + length)
        mask[row, row] = torch.arange(length)[None, :] < layout.visible_end[row, None]
    return mask
