"""Keys and values of a recurrent forward pass, one slot for each (stack call, layer).

Letters: B rows, C capacity in tokens of a row, N heads, K head width, T tokens of a packed stream.
"""

from __future__ import annotations

import torch

from hrmtext.batch import RowLayout
from hrmtext.config.model import ModelConfig
from hrmtext.errors import DataError
from hrmtext.model.attention import AttentionPlan


class KVCache:
    """A preallocated cache; row b holds its first `lengths[b]` positions."""

    def __init__(
        self,
        config: ModelConfig,
        num_rows: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate for `num_rows` rows of at most `capacity` tokens.

        `dtype` may differ from the model's: on a CPU, fp32 keys and values make bf16 models decode
        faster, as batched bf16 products of one row are slow there.
        """
        shape = (config.num_slots, num_rows, config.num_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (slots, B, N, C, K)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)  # (B)
        self.longest = 0

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.keys.shape[3]

    @property
    def num_rows(self) -> int:
        """B."""
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def prefill(self, layout: RowLayout, plan: AttentionPlan) -> PrefillPlan:
        """A plan for the first forward pass: attends as `plan` does and stores keys and values.

        Row r of the packed stream becomes row r of the cache. Call `commit` after the pass.
        """
        if len(layout.lengths) != self.num_rows or max(layout.lengths) > self.capacity:
            raise DataError(
                f"{len(layout.lengths)} rows of up to {max(layout.lengths)} tokens do not fit a "
                f"cache of {self.num_rows} rows of {self.capacity}"
            )
        return PrefillPlan(self, layout, plan)

    def decode(self) -> DecodePlan:
        """A plan for one further token of every row. Call `commit` after the pass."""
        if self.longest >= self.capacity:
            raise DataError(f"the cache is full: every row holds {self.capacity} tokens at most")
        return DecodePlan(self)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only `rows` (indices), in that order: finished rows leave, survivors move up."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)
        self.lengths = self.lengths.index_select(0, rows)

    def trim(self, lengths: torch.Tensor) -> None:
        """Forget what row b holds beyond `lengths[b]` tokens; (B) int64, none above the present."""
        if bool((lengths > self.lengths).any()):
            raise DataError("trim can only shorten rows")
        self.lengths = lengths.clone()
        self.longest = int(lengths.max())


class PrefillPlan:
    """Packed attention that also fills a cache."""

    def __init__(self, cache: KVCache, layout: RowLayout, plan: AttentionPlan) -> None:
        self.cache = cache
        self.plan = plan
        self.lengths = torch.tensor(layout.lengths, device=cache.keys.device)
        self.longest = max(layout.lengths)
        rows = torch.repeat_interleave(
            torch.arange(cache.num_rows, device=cache.keys.device), self.lengths
        )
        self.used = len(rows)
        starts = torch.tensor(layout.starts(), device=rows.device)
        self.rows = rows  # (used)
        self.columns = torch.arange(self.used, device=rows.device) - starts[rows]  # (used)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        """(T, N, K) each -> (T, N, K)."""
        keys, values = self.cache.keys[slot], self.cache.values[slot]
        keys[self.rows, :, self.columns] = k[: self.used].to(keys.dtype)
        values[self.rows, :, self.columns] = v[: self.used].to(keys.dtype)
        return self.plan.attend(q, k, v, slot)

    def commit(self) -> None:
        """Count the stored tokens; once, after the forward pass."""
        self.cache.lengths = self.lengths.clone()
        self.cache.longest = self.longest


class DecodePlan:
    """One query a row over everything that the row holds, itself included.

    Computed in the cache's number format, two batched products around a softmax: with one query a
    row, torch's fused kernels have nothing to fuse.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.rows = torch.arange(cache.num_rows, device=cache.keys.device)  # (B)
        self.width = cache.longest + 1
        columns = torch.arange(self.width, device=self.rows.device)
        hidden = columns > cache.lengths[:, None]  # (B, width)
        mask = torch.zeros(hidden.shape, dtype=cache.keys.dtype, device=self.rows.device)
        mask = mask.masked_fill_(hidden, float("-inf"))
        # (B * N, 1, width), shared by all stack calls and layers
        self.mask = mask.repeat_interleave(cache.keys.shape[2], dim=0)[:, None]

    @property
    def positions(self) -> torch.Tensor:
        """(B) position of the token that each row decodes."""
        return self.cache.lengths

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int
    ) -> torch.Tensor:
        """(B, N, K) each -> (B, N, K)."""
        keys, values = self.cache.keys[slot], self.cache.values[slot]  # (B, N, C, K)
        keys[self.rows, :, self.cache.lengths] = k.to(keys.dtype)
        values[self.rows, :, self.cache.lengths] = v.to(keys.dtype)
        keys = keys[:, :, : self.width].flatten(0, 1)  # (B * N, width, K)
        values = values[:, :, : self.width].flatten(0, 1)
        queries = q.to(keys.dtype).reshape(-1, 1, q.shape[-1])  # (B * N, 1, K)
        scores = torch.baddbmm(self.mask, queries, keys.mT, alpha=q.shape[-1] ** -0.5)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(-1, dtype=wide).to(scores.dtype)
        return torch.bmm(weights, values).view(q.shape).to(q.dtype)

    def commit(self) -> None:
        """Count the stored token; once, after the forward pass."""
        self.cache.lengths = self.cache.lengths + 1
        self.cache.longest += 1
