"""Packed attention through torch's flex_attention: one compiled kernel that skips empty blocks.

Query i sees the keys [first[i], end[i]) of the stream, an interval; from the intervals follow both
the mask and which 128 x 128 blocks of it are empty, full or mixed. Both are made once a
micro-batch, without the dense T x T mask, and are used by every stack call and layer.

torch compiles no backward of it for the CPU: there the plan serves the forward pass only.

Letters: T tokens of the stream, B blocks of 128 tokens, N heads, K head width.
"""

from __future__ import annotations

import shutil
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hrmtext.batch import RowLayout
from hrmtext.errors import BackendError
from hrmtext.runtime.compile import outside_graphs
from hrmtext.runtime.transfer import send

if TYPE_CHECKING:  # seconds of imports: where it is used, then
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
FORMATS = (torch.float32, torch.bfloat16, torch.float16)


@outside_graphs("attend")
class FlexPlan:
    """The intervals of one micro-batch and their block mask."""

    def __init__(self, layout: RowLayout, device: torch.device, dtype: torch.dtype) -> None:
        """Plan `layout`.

        Raises:
            BackendError: a number format or a machine for which torch compiles no such kernel.
        """
        if reason := problem(device, dtype):
            raise BackendError(f"attention backend 'flex' cannot run: {reason}")
        self.device, self.num_used = device, sum(layout.lengths)
        self.num_padding = layout.num_padding
        self.intervals = intervals(layout)

    @cached_property
    def block_mask(self) -> BlockMask:
        """Made at the first call, so that a refusal costs nothing."""
        return make_block_mask(*self.intervals, self.device)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        """(T, N, K) each -> (T, N, K), zeros behind the last row."""
        del slot
        wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if wants_gradient and self.device.type == "cpu":
            raise BackendError(
                "attention backend 'flex' has no backward pass on the CPU; train with "
                "attention=sdpa there, or wrap the forward pass in torch.no_grad()"
            )
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, N, T, K) each
        out = _compiled()(*heads, self.block_mask)[0].transpose(0, 1)  # (T, N, K)
        if self.num_padding:
            padding = (0, 0, 0, 0, 0, self.num_padding)
            out = torch.nn.functional.pad(out[: self.num_used], padding)
        return out


def problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch compiles no kernel here; None: it does."""
    if dtype not in FORMATS:
        return f"it computes in fp32, bf16 or fp16, not in {dtype}; use sdpa or reference"
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        return "it is compiled, which needs a C++ compiler on the CPU; install g++, or use sdpa"
    if device.type not in ("cpu", "cuda"):
        return f"it is compiled for cpu and cuda, not for {device.type}; use sdpa"
    return None


def intervals(layout: RowLayout) -> tuple[np.ndarray, np.ndarray]:
    """(T) first key and (T) end of the keys that each token sees, as stream indices.

    A token behind the last row sees itself, so that no softmax is empty; its output is dropped.
    """
    lengths = np.asarray(layout.lengths, dtype=np.int64)
    used = int(lengths.sum())
    first = np.arange(layout.num_tokens, dtype=np.int64)
    end = first + 1
    first[:used] = np.repeat(np.asarray(layout.starts(), dtype=np.int64), lengths)
    end[:used] = first[:used] + layout.visible_end.numpy()[:used]
    return first, end


def make_block_mask(first: np.ndarray, end: np.ndarray, device: torch.device) -> BlockMask:
    """The block mask of intervals: a block counts as mixed where it might hold a visible pair."""
    from torch.nn.attention.flex_attention import BlockMask

    num_tokens = len(first)
    num_blocks = -(-num_tokens // BLOCK)
    at = np.arange(0, num_tokens, BLOCK)
    lowest, highest = np.minimum.reduceat(first, at), np.maximum.reduceat(end, at)  # (B)
    latest, earliest = np.maximum.reduceat(first, at), np.minimum.reduceat(end, at)  # (B)
    if num_tokens % BLOCK:  # the last query block is not whole: none of its blocks is full
        earliest[-1] = 0
    key = np.arange(num_blocks) * BLOCK  # (B) first key of each key block
    some = (key < highest[:, None]) & (key + BLOCK > lowest[:, None])  # (B, B)
    full = (key >= latest[:, None]) & (key + BLOCK <= earliest[:, None])  # (B, B)
    on_device = [send(torch.from_numpy(x.astype(np.int32)), device) for x in (first, end)]
    first_key, end_key = on_device

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        del batch, head
        return (key >= first_key[query]) & (key < end_key[query])

    mixed_counts, mixed_order = _listed(some & ~full, device)
    full_counts, full_order = _listed(full, device)
    return BlockMask.from_kv_blocks(
        mixed_counts,
        mixed_order,
        full_counts,
        full_order,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
    )


def _listed(blocks: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, B) bool -> how many key blocks each query block has, and their numbers first."""
    counts = blocks.sum(1, dtype=np.int32)  # (B)
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)  # (B, B)
    on_device = (send(torch.from_numpy(x), device) for x in (counts, order))
    counted, ordered = (x[None, None].contiguous() for x in on_device)
    return counted, ordered


@cache
def _compiled() -> Any:
    """flex_attention, compiled under a name of its own.

    torch keeps what it learns of shapes with the compiled function. Compiled directly, the shapes
    of other libraries' calls count among ours, and with two batch sizes its C++ does not compile.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: BlockMask) -> Any:
        return flex_attention(q, k, v, block_mask=block_mask)

    return torch.compile(attention)
