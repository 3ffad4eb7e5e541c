"""FlashAttention under PrefixLM: two passes of variable-length attention over the packed stream.

FlashAttention knows two masks, all and causal. Queries that share one `visible_end` (a prompt) see
all keys up to it: pass 1, without a mask. All other queries see the keys up to themselves: pass 2,
causal, aligned at the last query. Together they are the mask of `hrmtext.batch`, exactly, for any
number of bidirectional blocks in a row, and nothing is computed for masked pairs.

Letters: T tokens of the stream, Q queries and J keys of a pass, G segments, N heads, K head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hrmtext.batch import RowLayout
from hrmtext.errors import BackendError
from hrmtext.model.attention.varlen import (
    FAST_KERNELS,
    KERNELS,
    find_kernel,
    kernel_problem,
    width_problem,
)
from hrmtext.runtime.compile import outside_graphs
from hrmtext.runtime.transfer import send

Array = npt.NDArray[np.int64]


class Segments(NamedTuple):
    """Query runs of one pass, as stream indices; each sees keys from its row's start on."""

    query_start: Array
    num_queries: Array
    key_start: Array
    num_keys: Array


@dataclasses.dataclass(frozen=True)
class Pass:
    """One call of the kernel: index tensors and maxima, ready for all layers and stack calls."""

    causal: bool
    num_queries: int
    cu_q: torch.Tensor
    """(G+1) int32."""
    cu_k: torch.Tensor
    """(G+1) int32."""
    max_q: int
    max_k: int
    keys: torch.Tensor | None
    """(J) stream indices; None: the first J tokens of the stream, as they lie."""
    num_keys: int
    repeats: bool
    """Whether some key occurs twice."""


@outside_graphs("attend")
class FlashPlan:
    """Two passes of a variable-length kernel. The backward is as deterministic as the kernel's:

    FlashAttention adds up dq in no fixed order, unless `torch.use_deterministic_algorithms` is on.
    """

    def __init__(
        self,
        layout: RowLayout,
        device: torch.device,
        dtype: torch.dtype,
        *,
        kernel: str | None = None,
        head_dim: int | None = None,
    ) -> None:
        """Plan the passes of `layout`.

        Args:
            kernel: `torch`, `flash_attn` or `reference` (slow, any device); None: the first of
                the fast ones that runs.
            head_dim: K, where known: an unfit width is then refused here, not in `attend`.

        Raises:
            BackendError: the kernel cannot run here; the message says why.
        """
        if kernel is None:
            kernel = find_kernel(device, dtype, head_dim)
        elif reason := kernel_problem(kernel, device, dtype, head_dim):
            raise BackendError(f"attention kernel {kernel!r} cannot run: {reason}")
        self.kernel_name, self.kernel, self.dtype = kernel, KERNELS[kernel], dtype
        self.num_tokens, self.num_used = layout.num_tokens, sum(layout.lengths)
        found = find_segments(layout)
        self.passes = [
            _plan_pass(segments, causal, device)
            for segments, causal in zip(found, (False, True), strict=True)
            if len(segments.num_queries)
        ]
        order = np.concatenate([ranges(s.query_start, s.num_queries) for s in found])
        self.order = None if _is_prefix(order) else send(torch.from_numpy(order), device)  # (used)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        """(T, N, K) each -> (T, N, K), zeros behind the last row."""
        del slot
        if self.kernel_name in FAST_KERNELS:
            self._check(q)
        if self.order is None:
            queries = q[: self.num_used]
        else:
            queries = _Gather.apply(q, self.order, False)
        parts = []
        for part, step in zip(
            queries.split([step.num_queries for step in self.passes]), self.passes, strict=True
        ):
            keys, values = _keys_of(k, step), _keys_of(v, step)
            parts.append(
                self.kernel(
                    part, keys, values, step.cu_q, step.cu_k, step.max_q, step.max_k, step.causal
                )
            )
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)  # (used, N, K)
        if self.order is not None:
            return joined.new_zeros(q.shape).index_copy(0, self.order, joined)
        padding = self.num_tokens - self.num_used
        return torch.nn.functional.pad(joined, (0, 0, 0, 0, 0, padding)) if padding else joined

    def _check(self, q: torch.Tensor) -> None:
        reason = width_problem(q.shape[-1])
        if q.dtype != self.dtype:
            reason = f"the plan is for {self.dtype}, the queries are {q.dtype}"
        if reason:
            raise BackendError(f"attention kernel {self.kernel_name!r} cannot run: {reason}")


def find_segments(layout: RowLayout) -> tuple[Segments, Segments]:
    """Query runs of pass 1 (a common visible end) and of pass 2 (each sees up to itself)."""
    lengths = np.asarray(layout.lengths, dtype=np.int64)
    used = int(lengths.sum())
    row_starts = np.repeat(np.asarray(layout.starts(), dtype=np.int64), lengths)  # (used)
    ends = row_starts + layout.visible_end.numpy()[:used]  # as stream indices
    new_row = np.diff(row_starts, prepend=-1) != 0
    # A run is a stretch of one row with one common end; what sees just itself and back is causal.
    runs = np.flatnonzero(new_row | (np.diff(ends, prepend=-1) != 0))
    lone = (np.diff(runs, append=used) == 1) & (ends[runs] == runs + 1)
    is_causal = np.repeat(lone, np.diff(runs, append=used))  # (used)
    # Neighbouring causal runs of a row join to one segment.
    joins = is_causal & np.roll(is_causal, 1) & ~new_row
    first = np.zeros(used, dtype=bool)
    first[runs] = True
    starts = np.flatnonzero(first & ~joins)
    counts = np.diff(starts, append=used)
    last_end = ends[starts + counts - 1]
    found = Segments(starts, counts, row_starts[starts], last_end - row_starts[starts])
    causal = is_causal[starts]
    blocks, rest = (Segments(*(array[which] for array in found)) for which in (~causal, causal))
    return blocks, rest


def ranges(starts: Array, counts: Array) -> Array:
    """Concatenation of [start, start + count) over all pairs."""
    offsets = np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(starts, counts) + np.arange(int(counts.sum())) - offsets


def _plan_pass(segments: Segments, causal: bool, device: torch.device) -> Pass:
    keys = ranges(segments.key_start, segments.num_keys)
    return Pass(
        causal=causal,
        num_queries=int(segments.num_queries.sum()),
        cu_q=_cumulative(segments.num_queries, device),
        cu_k=_cumulative(segments.num_keys, device),
        max_q=int(segments.num_queries.max()),
        max_k=int(segments.num_keys.max()),
        keys=None if _is_prefix(keys) else send(torch.from_numpy(keys), device),
        num_keys=len(keys),
        repeats=len(np.unique(keys)) < len(keys),
    )


def _cumulative(counts: Array, device: torch.device) -> torch.Tensor:
    cumulative = np.concatenate(([0], counts.cumsum())).astype(np.int32)
    return send(torch.from_numpy(cumulative), device)


def _is_prefix(index: Array) -> bool:
    return bool((index == np.arange(len(index))).all())


def _keys_of(x: torch.Tensor, step: Pass) -> torch.Tensor:
    """(T, N, K) keys or values -> (J, N, K)."""
    if step.keys is None:
        return x[: step.num_keys]
    return _Gather.apply(x, step.keys, step.repeats)


class _Gather(torch.autograd.Function):
    """Rows by index. The backward copies, unless a row was taken twice: then it sums in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, repeats: bool) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.repeats, ctx.num_rows = repeats, len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor, None, None]:
        (arriving,) = grad_outputs
        (index,) = ctx.saved_tensors
        shape = (ctx.num_rows, *arriving.shape[1:])
        if not ctx.repeats:
            return arriving.new_zeros(shape).index_copy_(0, index, arriving), None, None
        wide = torch.promote_types(arriving.dtype, torch.float32)
        total = torch.zeros(shape, dtype=wide, device=arriving.device)
        return total.index_add_(0, index, arriving.to(wide)).to(arriving.dtype), None, None
