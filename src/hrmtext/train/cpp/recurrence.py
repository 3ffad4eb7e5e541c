"""A whole recurrence by the C++ kernel: one call of it forward, one backward.

Letters: T tokens of the stream, S those whose output is wanted, D hidden size.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from hrmtext.config.model import ModelConfig
from hrmtext.model import HrmLM
from hrmtext.model.depth import Depth
from hrmtext.model.layers import Block, rotary_tables
from hrmtext.train.cpp.blocks import (
    CBlock,
    CppBlocks,
    CRows,
    CSaved,
    RowsPlan,
    empty_gradients,
    linears_of,
    stacks_of,
)

NUM_WEIGHTS = 4
"""Of a block."""
_I, _P = ctypes.c_int64, ctypes.c_void_p


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, _I) for name in ("first_block", "selects")),
        *((name, _P) for name in ("left", "right")),
        ("left_step", _I),
        ("flow", _P),
        ("flow_step", _I),
        *((name, _P) for name in ("out", "saved")),
        ("has_backward", _I),
        *((name, _P) for name in ("d_out", "d_other", "d_left", "d_right")),
        *((name, _I) for name in ("adds_left", "adds_right")),
    ]


class _Recurrence(ctypes.Structure):
    _fields_ = [
        *((name, _I) for name in ("num_blocks", "blocks_per_stack", "num_calls")),
        *((name, _P) for name in ("blocks", "rows", "selected", "d_flow", "d_weights")),
    ]


@dataclasses.dataclass(frozen=True)
class StackCall:
    """A call of a stack as `model.recur` makes it."""

    stack: str
    """H or L: whose weights, and whose state it replaces."""
    reads: tuple[str, ...]
    """The states whose sum goes in."""
    carries_gradient: bool


def stack_calls(config: ModelConfig, depth: Depth) -> Iterator[StackCall]:
    """The calls of a recurrence, in order."""
    flags = iter(depth.carries_gradient)
    for _ in range(depth.H_cycles):
        for _ in range(depth.L_cycles):
            yield StackCall("L", ("L", "H"), next(flags))
        reads = ("L",) if depth.L_cycles else ("H",)
        if depth.L_cycles and config.H_injection:
            reads = ("H", "L")
        yield StackCall("H", reads, next(flags))


class CppRecurrence(CppBlocks):
    """`CppBlocks` that also computes all calls of the stacks at once: see `model.hrm.recur`.

    States and gradients are those of the same blocks called one by one, to the bit but where an
    early loss adds another gradient to a state's.
    """

    def __init__(self, model: HrmLM, dtype: torch.dtype = torch.float32) -> None:
        """As `CppBlocks`."""
        super().__init__(model, dtype)
        self.config = model.config
        stacks = stacks_of(model)
        blocks = [cast(Block, block) for stack in stacks for block in stack.layers]
        structs = [self._packed[id(block)].block for block in blocks]
        self.structs = (CBlock * len(structs))(*structs)
        self.first_block = {"H": 0, "L": 0 if len(stacks) == 1 else len(blocks) // 2}
        self._tables = (torch.empty(0), torch.empty(0))
        self.weights = [linear.weight for block in blocks for linear in linears_of(block)]

    def recur(
        self,
        depth: Depth,
        z_H: torch.Tensor,
        z_L: torch.Tensor,
        positions: torch.Tensor,
        plan: RowsPlan,
        select: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """z_H after every H cycle: (T, D) each, but the last (S, D) where tokens are selected.

        What is behind the last row is zero, and so is its gradient.

        Args:
            z_H, z_L: (T, D), the states at the start.
            positions: (T) int64. plan: what `rows` gave.
        """
        cos, sin = self._rotary_tables(positions)
        run = _Run(self, depth, cos, sin, plan, select)
        if not (torch.is_grad_enabled() and any(depth.carries_gradient)):
            return run.forward(z_H, z_L, with_backward=False)
        return list(_RecurrenceFunction.apply(z_H, z_L, run, *self.weights))

    def _rotary_tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`rotary_tables` of these positions, looked up: computing takes 5 % of a small step."""
        needed = 1 + int(positions.max())
        if len(self._tables[0]) < needed:
            config, all_positions = self.config, torch.arange(max(needed, self.config.max_seq_len))
            self._tables = rotary_tables(
                all_positions, config.head_dim, config.rope_theta, torch.float32
            )
        cos, sin = self._tables
        return cos.index_select(0, positions), sin.index_select(0, positions)


class _Run:
    """One recurrence, forward and then backward."""

    def __init__(
        self,
        owner: CppRecurrence,
        depth: Depth,
        cos: torch.Tensor,
        sin: torch.Tensor,
        plan: RowsPlan,
        select: torch.Tensor | None,
    ) -> None:
        self.owner = owner
        self.stack_calls = list(stack_calls(owner.config, depth))
        self.calls = (_Call * len(self.stack_calls))()
        self.num_blocks = owner.config.num_layers_per_stack  # of a stack
        self.width = owner.config.hidden_size
        self.rows, kept = plan.view(cos, sin, None)
        self.selected = None if select is None else plan.view(cos, sin, select)[0]
        self._alive: list[Any] = [kept, select]  # what the structures point to
        self.recurrence = _Recurrence(
            num_blocks=len(owner.structs),
            blocks_per_stack=self.num_blocks,
            num_calls=len(self.calls),
            blocks=ctypes.addressof(owner.structs),
            rows=ctypes.addressof(self.rows),
            selected=None if self.selected is None else ctypes.addressof(self.selected),
        )

    def forward(
        self, z_H: torch.Tensor, z_L: torch.Tensor, *, with_backward: bool
    ) -> list[torch.Tensor]:
        """The states of H; what the backward pass needs is kept until `backward`."""
        step, last = self.rows.tokens * self.width, len(self.calls) - 1
        keeps = [call.carries_gradient and with_backward for call in self.stack_calls]
        sizes = [self._sizes(index) if kept else [] for index, kept in enumerate(keeps)]
        # Validation leaves the memory of training steps alone.
        self.saved = self.owner.take(sum(map(sum, sizes))) if any(keeps) else torch.empty(0)
        address = self.saved.data_ptr()
        # Calls of which nothing is kept go through this, in place but where tokens are selected.
        passing = torch.empty(step * (1 if self.selected is None else self.num_blocks + 1))
        # Every call of L overwrites its state, whose start may be one row for all tokens.
        start = z_L[:1].contiguous() if z_L.stride(0) == 0 else z_L.contiguous()
        state = {"H": z_H.contiguous(), "L": start}
        of_L = torch.empty(self.rows.tokens, self.width)
        found: list[torch.Tensor] = []
        for index, (call, struct) in enumerate(zip(self.stack_calls, self.calls, strict=True)):
            read = [state[name].data_ptr() for name in call.reads]
            struct.left, struct.right = (*read, None)[:2]
            struct.left_step = self.width if len(state[call.reads[0]]) > 1 else 0
            if call.stack == "L":
                state["L"] = of_L
            else:
                state["H"] = torch.empty(self._rows(index, self.num_blocks - 1).outputs, self.width)
                found.append(state["H"])
            struct.out = state[call.stack].data_ptr()
            struct.first_block = self.owner.first_block[call.stack]
            struct.selects = index == last and self.selected is not None
            struct.flow, struct.flow_step = passing.data_ptr(), step if struct.selects else 0
            if keeps[index]:
                struct.flow, *pointers = _addresses(address, sizes[index])
                struct.flow_step, struct.saved = step, self._saved(pointers)
                address += 4 * sum(sizes[index])
        self._compute(self.owner.library.hrm_recurrence_forward, is_backward=False)
        return found

    def backward(
        self, d_states: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """Gradients of z_H at the start and of the weights; None where nothing arrives."""
        H_calls = (i for i, call in enumerate(self.stack_calls) if call.stack == "H")
        from_outside = dict(zip(H_calls, d_states, strict=True))
        d_state = {name: torch.empty(self.rows.tokens, self.width) for name in ("H", "L")}
        has_some = dict.fromkeys(d_state, False)
        d_weights: dict[int, list[torch.Tensor]] = {}
        for index in reversed(range(len(self.calls))):
            call, struct = self.stack_calls[index], self.calls[index]
            d_out, d_other = has_some[call.stack], from_outside.get(index)
            has_some[call.stack] = False  # what comes next is of the state that this call replaced
            if not call.carries_gradient or not (d_out or d_other is not None):
                continue
            struct.has_backward = True
            struct.d_out = d_state[call.stack].data_ptr() if d_out else None
            if d_other is not None:
                self._alive.append(d_other := d_other.contiguous())
                struct.d_other = d_other.data_ptr()
            for side, name in zip(("left", "right"), call.reads, strict=False):
                setattr(struct, f"d_{side}", d_state[name].data_ptr())
                setattr(struct, f"adds_{side}", has_some[name])
                has_some[name] = True
            for block in range(struct.first_block, struct.first_block + self.num_blocks):
                if block not in d_weights:
                    d_weights[block] = empty_gradients(self.owner.structs[block])
        if d_weights:
            self._compute_gradients(d_weights)
        found: list[torch.Tensor | None] = []
        for block in range(len(self.owner.structs)):
            found += d_weights.get(block, [None] * NUM_WEIGHTS)
        return d_state["H"] if has_some["H"] else None, found

    def _compute_gradients(self, d_weights: dict[int, list[torch.Tensor]]) -> None:
        count = len(self.owner.structs)
        addresses = {block: parts[0].data_ptr() for block, parts in d_weights.items()}
        pointers = (_P * count)(*(addresses.get(block) for block in range(count)))
        d_flow = torch.empty(2 * self.rows.tokens, self.width)
        self.recurrence.d_weights = ctypes.addressof(pointers)
        self.recurrence.d_flow = d_flow.data_ptr()
        self._compute(self.owner.library.hrm_recurrence_backward, is_backward=True)
        self.owner.free(self.saved)
        del self.saved

    def _compute(self, work: Any, *, is_backward: bool) -> None:
        workspace = self.owner.workspace(self.owner.structs[0], self.rows, is_backward=is_backward)
        work(ctypes.byref(self.recurrence), self.calls, *workspace)

    def _rows(self, call: int, block: int) -> CRows:
        """What a block of a call sees; `block` is counted within its stack."""
        is_last = call + 1 == len(self.calls) and block + 1 == self.num_blocks
        return self.selected if is_last and self.selected is not None else self.rows

    def _sizes(self, call: int) -> list[int]:
        """Floats that a call keeps: for the rows between its blocks, and for each block."""
        of_all, flow = self._saved_sizes(self.rows), (self.num_blocks + 1) * self.rows.tokens
        last = self._saved_sizes(self._rows(call, self.num_blocks - 1))
        return [flow * self.width, *of_all * (self.num_blocks - 1), *last]

    def _saved_sizes(self, rows: CRows) -> list[int]:
        """Of a block; no vector of it lies across two lines of the cache."""
        sizes = self.owner.saved_sizes(self.owner.structs[0], rows)
        return [-(-size // 16) * 16 for size in sizes]

    def _saved(self, pointers: Sequence[int]) -> int:
        each = len(CSaved._fields_)
        parts = (pointers[at : at + each] for at in range(0, len(pointers), each))
        saved = (CSaved * self.num_blocks)(*(CSaved(*part) for part in parts))
        self._alive.append(saved)
        return ctypes.addressof(saved)


class _RecurrenceFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_H: torch.Tensor, z_L: torch.Tensor, run: _Run, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        del weights
        states = run.forward(z_H, z_L, with_backward=True)
        ctx.save_for_backward(z_H)
        ctx.set_materialize_grads(False)
        ctx.run = run
        H_calls = (call for call in run.stack_calls if call.stack == "H")
        ctx.mark_non_differentiable(
            *(z for z, call in zip(states, H_calls, strict=True) if not call.carries_gradient)
        )
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        _ = ctx.saved_tensors  # torch refuses a second backward pass here
        d_z_H, d_weights = ctx.run.backward(grad_outputs)
        ctx.run = None
        return d_z_H, None, None, *d_weights


def _addresses(first: int, sizes: Sequence[int]) -> list[int]:
    """Where parts of so many floats begin that lie one behind the other."""
    return list(itertools.accumulate((4 * size for size in sizes[:-1]), initial=first))
