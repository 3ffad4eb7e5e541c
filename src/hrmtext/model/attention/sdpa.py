"""Packed attention through torch's scaled_dot_product_attention, on the CPU and any GPU.

Rows of similar length are gathered into small padded groups, only inside the attention call: the
matrix products of the model never see padding. The index tensors and masks are built once a
micro-batch.

Letters: T tokens of the stream, R rows of a group, S its longest row, N heads, K head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from hrmtext.batch import RowLayout
from hrmtext.runtime.compile import outside_graphs
from hrmtext.runtime.transfer import send

MAX_MASK_ELEMENTS = 1 << 24
"""Rows of a group times S squared stay below this, so that a mask stays below 64 MiB in fp32."""
MAX_WASTE = 2.0
"""A group's longest row is at most this many times its shortest, unless the group is tiny."""
TINY_GROUP_TOKENS = 64
LONGEST_PRODUCT_ROW = {"cpu": 1_024}
"""By device type, rows up to this length are two batched products around a softmax: on a CPU this
is 1.4 times as fast as torch's fused kernel in fp32, and more in bf16, forward and backward."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows of similar length, padded to the longest."""

    num_rows: int
    num_columns: int
    mask: torch.Tensor | None
    """(R, 1, S, S) additive, or None where every query sees every key."""
    dtype: torch.dtype
    """Number format of queries, keys and values; scores of products are fp32 or better."""
    by_products: bool
    """Two batched products around a softmax, not torch's fused kernel."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(R*S, N, K) each -> (R*S, N, K)."""
        shape = (self.num_rows, self.num_columns, *q.shape[1:])
        heads = (x.view(shape).transpose(1, 2).to(self.dtype) for x in (q, k, v))  # (R, N, S, K)
        compute = _by_products if self.by_products else scaled_dot_product_attention
        out = compute(*heads, attn_mask=self.mask)  # (R, N, S, K)
        return out.transpose(1, 2).reshape(q.shape).to(q.dtype)


@outside_graphs("attend")
class SdpaPlan:
    """Groups of padded rows, and the way from the stream to them and back."""

    def __init__(self, layout: RowLayout, device: torch.device, dtype: torch.dtype) -> None:
        limit = LONGEST_PRODUCT_ROW.get(device.type, 0)
        starts = np.asarray(layout.starts(), dtype=np.int64)
        visible_end = layout.visible_end.numpy()
        groups, gathers = [], []
        back = np.zeros(layout.num_tokens, dtype=np.int64)
        base = 0
        for rows in group_rows(layout.lengths):
            lengths = np.asarray([layout.lengths[row] for row in rows], dtype=np.int64)
            columns = np.arange(int(lengths.max()))
            real = columns < lengths[:, None]  # (R, S)
            # A padded slot repeats the row's first token; real queries never see it as a key.
            gather = starts[rows][:, None] + np.where(real, columns, 0)  # (R, S)
            ends = np.where(real, visible_end[gather], lengths[:, None])  # (R, S)
            by_products = len(columns) <= limit
            # torch's CPU kernel takes four times as long for the bf16 backward as for the fp32 one.
            is_slow = device.type == "cpu" and dtype.itemsize < 4 and not by_products
            compute_dtype = torch.float32 if is_slow else dtype
            scores = torch.promote_types(dtype, torch.float32) if by_products else compute_dtype
            mask = _additive_mask(ends, scores, device)
            groups.append(Group(len(rows), len(columns), mask, compute_dtype, by_products))
            gathers.append(gather.ravel())
            back[gather[real]] = base + np.flatnonzero(real)
            base += gather.size
        self.groups = groups
        self.num_padding = layout.num_padding
        gather = np.concatenate(gathers)
        self.gather = send(torch.from_numpy(gather), device)  # (sum R*S)
        self.back = send(torch.from_numpy(back), device)  # (T)
        slots = np.zeros(gather.size, dtype=bool)
        slots[back[: layout.num_tokens - layout.num_padding]] = True
        self.is_real = send(torch.from_numpy(slots), device)[:, None, None]  # (sum R*S, 1, 1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        """(T, N, K) each -> (T, N, K)."""
        del slot
        padded = [_ToGroups.apply(x, self) for x in (q, k, v)]
        sizes = [group.num_rows * group.num_columns for group in self.groups]
        parts = zip(*(x.split(sizes) for x in padded), strict=True)
        outputs = [group.attend(*qkv) for group, qkv in zip(self.groups, parts, strict=True)]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return _FromGroups.apply(joined, self)  # (T, N, K)

    def to_groups(self, x: torch.Tensor) -> torch.Tensor:
        """(T, N, K) -> (sum R*S, N, K); padded slots hold a copy of some real token."""
        return x.index_select(0, self.gather)

    def from_groups(self, x: torch.Tensor) -> torch.Tensor:
        """(sum R*S, N, K) -> (T, N, K), zeros behind the last row."""
        stream = x.index_select(0, self.back)
        if self.num_padding:
            stream[-self.num_padding :] = 0
        return stream


def group_rows(lengths: tuple[int, ...]) -> list[np.ndarray]:
    """Row indices by group: longest rows first, each group within MAX_WASTE and the mask limit."""
    order = np.argsort(np.asarray(lengths), kind="stable")[::-1]
    groups: list[np.ndarray] = []
    start = 0
    for at in range(1, len(order) + 1):
        if at < len(order):
            longest = lengths[order[start]]
            shortest = lengths[order[at]]
            fits = (at - start + 1) * longest**2 <= MAX_MASK_ELEMENTS
            alike = longest <= MAX_WASTE * shortest
            tiny = (at - start) * longest < TINY_GROUP_TOKENS
            if fits and (alike or tiny):
                continue
        groups.append(order[start:at])
        start = at
    return groups


def _additive_mask(
    ends: np.ndarray, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    seen = torch.from_numpy(np.arange(ends.shape[1]) < ends[:, :, None])  # (R, S, S)
    if bool(seen.all()):
        return None
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    return send(mask[:, None], device)  # (R, 1, S, S)


def _by_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None
) -> torch.Tensor:
    """(R, N, S, K) each -> (R, N, S, K): scores and softmax in fp32 or better, weighted sum."""
    rows, heads, length = q.shape[:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.reshape(-1, length, x.shape[-1]) for x in (q, k, v))  # (R*N, S, K)
    q, k, scale = q.to(wide), k.to(wide), q.shape[-1] ** -0.5
    if attn_mask is None:
        scores = torch.bmm(q * scale, k.mT)  # (R*N, S, S)
    else:
        mask = attn_mask.expand(rows, heads, length, length).reshape(-1, length, length)
        scores = torch.baddbmm(mask, q, k.mT, alpha=scale)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).view(rows, heads, length, -1)


class _ToGroups(torch.autograd.Function):
    """Stream -> groups. Both directions are gathers, as no token is used twice for real."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: SdpaPlan) -> torch.Tensor:
        ctx.plan = plan
        return plan.to_groups(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor, None]:
        # Padded slots receive no gradient: masked as keys, their outputs unused as queries.
        return ctx.plan.from_groups(grad_outputs[0]), None


class _FromGroups(torch.autograd.Function):
    """Groups -> stream, the inverse of `_ToGroups`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: SdpaPlan) -> torch.Tensor:
        ctx.plan = plan
        return plan.from_groups(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor, None]:
        return ctx.plan.to_groups(grad_outputs[0]) * ctx.plan.is_real, None
