"""Keys and values of a recurrent forward pass, one slot for each (stack call, layer).

Letters: B rows, C capacity in tokens of a row, N heads, K head width, T tokens of a packed stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
        shape = (num_rows, config.num_heads, capacity, config.head_dim)

        def allocate() -> list[torch.Tensor]:
            slots = range(config.num_slots)
            return [torch.zeros(shape, device=device, dtype=dtype) for _ in slots]

        self.keys = allocate()  # of each slot, (B, N, C, K)
        self.values = allocate()
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)  # (B)
        self.longest = 0

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.keys[0].shape[2]

    @property
    def num_rows(self) -> int:
        """B."""
        return self.keys[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Where keys and values are."""
        return self.keys[0].device

    @property
    def nbytes(self) -> int:
        """Memory of keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

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

    def extend(self, layout: RowLayout) -> ExtendPlan:
        """A plan for several further tokens of every row, such as a conversation's next prompt.

        The tokens see all that their row holds, and one another as `layout` says, whose positions
        count from the first new token. Call `commit` after the pass.
        """
        return ExtendPlan(self, layout, self.held_before(layout))

    def held_before(self, layout: RowLayout) -> list[int]:
        """(B) tokens that each row holds; DataError if the new ones of `layout` do not fit."""
        held: list[int] = self.lengths.tolist()
        if len(layout.lengths) != self.num_rows:
            raise DataError(
                f"{len(layout.lengths)} rows do not fit a cache of {self.num_rows} rows"
            )
        longest = max(have + more for have, more in zip(held, layout.lengths, strict=True))
        if longest > self.capacity:
            raise DataError(
                f"the cache would hold {longest} tokens a row, but has room for {self.capacity}"
            )
        return held

    def hold(self, lengths: torch.Tensor) -> None:
        """Row b holds `lengths[b]` tokens from now on; (B) int64."""
        self.lengths = lengths.clone()
        self.longest = int(lengths.max())

    def decode(self) -> DecodePlan:
        """A plan for one further token of every row. Call `commit` after the pass."""
        self.require_room()
        return DecodePlan(self.keys, self.values, self.lengths, self.longest + 1, cache=self)

    def require_room(self) -> None:
        """DataError if the longest row cannot take another token."""
        if self.longest >= self.capacity:
            raise DataError(f"the cache is full: every row holds {self.capacity} tokens at most")

    def advance(self) -> None:
        """Count one decoded token a row."""
        self.lengths = self.lengths + 1
        self.longest += 1

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens a row."""
        extra = (0, 0, 0, capacity - self.capacity)
        self.keys = [F.pad(tensor, extra) for tensor in self.keys]
        self.values = [F.pad(tensor, extra) for tensor in self.values]

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only `rows` (indices), in that order: finished rows leave, survivors move up."""
        self.keys = [tensor.index_select(0, rows) for tensor in self.keys]
        self.values = [tensor.index_select(0, rows) for tensor in self.values]
        self.lengths = self.lengths.index_select(0, rows)

    def trim(self, lengths: torch.Tensor) -> None:
        """Forget what row b holds beyond `lengths[b]` tokens; (B) int64, none above the present."""
        if bool((lengths > self.lengths).any()):
            raise DataError("trim can only shorten rows")
        self.hold(lengths)


class PrefillPlan:
    """Packed attention that also fills a cache."""

    def __init__(self, cache: KVCache, layout: RowLayout, plan: AttentionPlan) -> None:
        self.cache = cache
        self.plan = plan
        self.lengths = torch.tensor(layout.lengths, device=cache.device)
        rows = torch.repeat_interleave(
            torch.arange(cache.num_rows, device=cache.device), self.lengths
        )
        self.used = len(rows)
        starts = torch.tensor(layout.starts(), device=rows.device)
        self.rows = rows  # (used)
        self.positions = torch.arange(self.used, device=rows.device) - starts[rows]  # (used)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        """(T, N, K) each -> (T, N, K)."""
        keys, values = self.cache.keys[slot], self.cache.values[slot]
        keys[self.rows, :, self.positions] = k[: self.used].to(keys.dtype)
        values[self.rows, :, self.positions] = v[: self.used].to(keys.dtype)
        return self.plan.attend(q, k, v, slot)

    def commit(self) -> None:
        """Count the stored tokens; once, after the forward pass."""
        self.cache.hold(self.lengths)


class ExtendPlan:
    """Several new tokens a row over what the row holds and over one another.

    One call of torch's attention for each row: rows differ in both lengths.
    """

    def __init__(self, cache: KVCache, layout: RowLayout, held: list[int]) -> None:
        """`held`: tokens that each row has in the cache."""
        self.cache = cache
        self.used = sum(layout.lengths)
        self.num_tokens = layout.num_tokens
        device = cache.device
        self.spans: list[tuple[int, int, int, int, torch.Tensor]] = []
        """Of each row: number, first new token in the stream, tokens held, held and new, mask."""
        positions = []
        for row, (start, length, have) in enumerate(
            zip(layout.starts(), layout.lengths, held, strict=True)
        ):
            ends = have + layout.visible_end[start : start + length]  # (S)
            seen = torch.arange(have + length) < ends[:, None]  # (S, W)
            mask = torch.zeros(seen.shape, dtype=cache.keys[0].dtype)
            mask = mask.masked_fill_(~seen, float("-inf")).to(device)
            self.spans.append((row, start, have, have + length, mask))
            positions.append(torch.arange(have, have + length))
        positions.append(torch.arange(layout.num_padding))
        self.positions = torch.cat(positions).to(device)  # (T)
        self.lengths = torch.tensor([end for _, _, _, end, _ in self.spans], device=device)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        """(T, N, K) each -> (T, N, K), zeros behind the last row."""
        keys, values = self.cache.keys[slot], self.cache.values[slot]  # (B, N, C, K)
        out = torch.zeros_like(q)
        for row, start, have, end, mask in self.spans:
            new = slice(start, start + end - have)
            keys[row, :, have:end] = k[new].transpose(0, 1).to(keys.dtype)
            values[row, :, have:end] = v[new].transpose(0, 1).to(values.dtype)
            attended = F.scaled_dot_product_attention(
                q[new].transpose(0, 1)[None].to(keys.dtype),  # (1, N, S, K)
                keys[row : row + 1, :, :end],
                values[row : row + 1, :, :end],
                attn_mask=mask,
            )
            out[new] = attended[0].transpose(0, 1).to(out.dtype)
        return out

    def commit(self) -> None:
        """Count the stored tokens; once, after the forward pass."""
        self.cache.hold(self.lengths)


class DecodePlan:
    """One query a row over everything that the row holds, itself included.

    Computed in the cache's number format, two batched products around a softmax: with one query a
    row, torch's fused kernels have nothing to fuse.
    """

    def __init__(
        self,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        lengths: torch.Tensor,
        width: int,
        cache: KVCache | None = None,
    ) -> None:
        """Attend to the first `width` columns of keys and values, each row to what it holds.

        Args:
            keys, values: of each slot, (B, N, C, K); the new token is written into them.
            lengths: (B) tokens that each row holds; also the positions of the new ones.
            width: above every length, at most C.
        """
        num_rows, num_heads = keys[0].shape[:2]
        self.keys, self.values, self.positions, self.width = keys, values, lengths, width
        self.cache = cache
        self.rows = torch.arange(num_rows, device=lengths.device)  # (B)
        columns = torch.arange(width, device=lengths.device)
        mask = torch.zeros(num_rows, width, dtype=keys[0].dtype, device=lengths.device)
        mask = mask.masked_fill(columns > lengths[:, None], float("-inf"))  # (B, width)
        # (B * N, 1, width), shared by all stack calls and layers
        self.mask = mask.repeat_interleave(num_heads, dim=0)[:, None]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        """(B, N, K) each -> (B, N, K)."""
        keys, values = self.keys[slot], self.values[slot]  # (B, N, C, K)
        keys[self.rows, :, self.positions] = k.to(keys.dtype)
        values[self.rows, :, self.positions] = v.to(keys.dtype)
        keys = keys[:, :, : self.width].flatten(0, 1)  # (B * N, width, K)
        values = values[:, :, : self.width].flatten(0, 1)
        queries = q.to(keys.dtype).reshape(-1, 1, q.shape[-1])  # (B * N, 1, K)
        scores = torch.baddbmm(self.mask, queries, keys.mT, alpha=q.shape[-1] ** -0.5)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(-1, dtype=wide).to(scores.dtype)
        return torch.bmm(weights, values).view(q.shape).to(q.dtype)

    def commit(self) -> None:
        """Count the stored token; once, after the forward pass."""
        assert self.cache is not None, "only a plan made by a cache counts its tokens"
        self.cache.advance()
