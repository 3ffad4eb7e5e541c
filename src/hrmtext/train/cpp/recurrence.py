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
    NUM_WEIGHTS,
    CBlock,
    CppBlocks,
    CRows,
    CSaved,
    RowsPlan,
    empty_gradients,
    linears_of,
    stacks_of,
)

_I, _P = ctypes.c_int64, ctypes.c_void_p


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, _I) for name in ("first_block", "selects")),
        *((name, _P) for name in ("left", "right")),
        ("left_step", _I),
        ("flow", _P),
        ("flow_step", _I),
        *((name, _P) for name in ("out", "saved")),
    ]


class _CallBackward(ctypes.Structure):
    _fields_ = [
        ("call", _I),
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
        run = Run(self, depth, positions, plan, select)
        if not (torch.is_grad_enabled() and any(depth.carries_gradient)):
            return run.forward(z_H, z_L, with_backward=False)
        return list(_RecurrenceFunction.apply(z_H, z_L, run, *self.weights))

    def rotary_tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`rotary_tables` of 0 to the largest position and on: made once, and looked up."""
        least, largest = (int(end) for end in positions.aminmax())
        assert least >= 0, f"positions count from 0, got {least}"
        if len(self._tables[0]) <= largest:
            config, count = self.config, max(largest + 1, self.config.max_seq_len)
            self._tables = rotary_tables(
                torch.arange(count), config.head_dim, config.rope_theta, torch.float32
            )
        return self._tables


class Run:
    """One recurrence, forward and then backward.

    `prepare` and `prepare_backward` lay it out for a call of the kernel that computes more.
    """

    def __init__(
        self,
        owner: CppRecurrence,
        depth: Depth,
        positions: torch.Tensor,
        plan: RowsPlan,
        select: torch.Tensor | None,
    ) -> None:
        self.owner = owner
        positions, count = positions.contiguous(), plan.num_tokens
        assert len(positions) == count, f"{len(positions)} positions for {count} tokens"
        self.stack_calls = list(stack_calls(owner.config, depth))
        self.num_blocks = owner.config.num_layers_per_stack  # of a stack
        self.width = owner.config.hidden_size
        tables = owner.rotary_tables(positions)
        self.rows, kept = plan.view(*tables, None, positions)
        self.selected = None if select is None else plan.view(*tables, select, positions)[0]
        self._alive: list[Any] = [kept, select]  # what the structures point to
        self.recurrence = _Recurrence(
            num_blocks=len(owner.structs),
            blocks_per_stack=self.num_blocks,
            num_calls=len(self.stack_calls),
            blocks=ctypes.addressof(owner.structs),
            rows=ctypes.addressof(self.rows),
            selected=None if self.selected is None else ctypes.addressof(self.selected),
        )

    def forward(
        self, z_H: torch.Tensor, z_L: torch.Tensor, *, with_backward: bool
    ) -> list[torch.Tensor]:
        """The states of H; what the backward pass needs is kept until `backward`."""
        states = self.prepare(z_H, z_L, with_backward=with_backward)
        workspace = self.workspace(is_backward=False)
        calls = (ctypes.byref(self.recurrence), self.calls)
        self.owner.library.hrm_recurrence_forward(*calls, *workspace)
        return states

    def prepare(
        self, z_H: torch.Tensor, z_L: torch.Tensor, *, with_backward: bool
    ) -> list[torch.Tensor]:
        """Lay out the calls in `calls`; returns where the states of H will be."""
        tokens, width, last = self.rows.tokens, self.width, len(self.stack_calls) - 1
        keeps = [call.carries_gradient and with_backward for call in self.stack_calls]
        sizes = [self._sizes(self.rows)] * last + [self._sizes(self.selected or self.rows)]
        kept_sizes = itertools.compress(sizes, keeps)
        # Validation leaves the memory of training steps alone.
        self.saved = self.owner.take(sum(map(sum, kept_sizes))) if any(keeps) else torch.empty(0)
        kept_at = self.saved.data_ptr()
        # Calls of which nothing is kept go through this, in place but where tokens are selected.
        parts = 1 if self.selected is None else self.num_blocks + 1
        passing = torch.empty(parts * tokens * width)
        # Every call of L overwrites its state, whose start may be one row for all tokens.
        start, z_H = (z_L[:1] if z_L.stride(0) == 0 else z_L).contiguous(), z_H.contiguous()
        of_L = torch.empty(tokens, width)
        state = {"H": (z_H.data_ptr(), width), "L": (start.data_ptr(), width * (len(start) > 1))}
        found: list[torch.Tensor] = []
        calls: list[tuple[int | None, ...]] = []
        for index, call in enumerate(self.stack_calls):
            (left, left_step), *others = (state[name] for name in call.reads)
            right = others[0][0] if others else None
            selects = index == last and self.selected is not None
            if call.stack == "L":
                out = of_L.data_ptr()
            else:
                rows = self.rows if index < last else self.selected or self.rows
                found.append(torch.empty(rows.outputs, width))
                out = found[-1].data_ptr()
            state[call.stack] = out, width
            flow, flow_step, saved = passing.data_ptr(), tokens * width * selects, None
            if keeps[index]:
                flow, *pointers = _addresses(kept_at, sizes[index])
                flow_step, saved = tokens * width, self._saved(pointers)
                kept_at += 4 * sum(sizes[index])
            first_block = self.owner.first_block[call.stack]
            calls.append(
                (first_block, selects, left, right, left_step, flow, flow_step, out, saved)
            )
        self.calls = (_Call * len(calls))(*calls)
        self._alive += [z_H, start, of_L, passing, *found]
        return found

    def backward(
        self, d_states: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """Gradients of z_H at the start and of the weights; None where nothing arrives."""
        found = self.prepare_backward(d_states)
        workspace = self.workspace(is_backward=True)
        steps = (ctypes.byref(self.recurrence), self.calls, self.steps, _I(len(self.steps)))
        self.owner.library.hrm_recurrence_backward(*steps, *workspace)
        self.finish()
        return found

    def prepare_backward(
        self, d_states: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """Lay out the backward pass in `steps`; returns where its gradients will be."""
        H_calls = (i for i, call in enumerate(self.stack_calls) if call.stack == "H")
        given = [None if d is None else d.contiguous() for d in d_states]
        from_outside = dict(zip(H_calls, given, strict=True))
        d_state = {name: torch.empty(self.rows.tokens, self.width) for name in ("H", "L")}
        address = {name: d.data_ptr() for name, d in d_state.items()}
        has_some = dict.fromkeys(d_state, False)
        steps: list[tuple[int | None, ...]] = []
        stacks: set[str] = set()
        for index in reversed(range(len(self.stack_calls))):
            call, other = self.stack_calls[index], from_outside.get(index)
            d_out = address[call.stack] if has_some[call.stack] else None
            d_other = None if other is None else other.data_ptr()
            has_some[call.stack] = False  # what comes next is of the state that this call replaced
            if not call.carries_gradient or (d_out is None and d_other is None):
                continue
            d_left, d_right = (*(address[name] for name in call.reads), None)[:2]
            adds_left, adds_right = (*(has_some[name] for name in call.reads), False)[:2]
            steps.append((index, d_out, d_other, d_left, d_right, adds_left, adds_right))
            has_some |= dict.fromkeys(call.reads, True)
            stacks.add(call.stack)
        with_gradient = {
            block
            for first in map(self.owner.first_block.__getitem__, stacks)
            for block in range(first, first + self.num_blocks)
        }
        d_weights: list[torch.Tensor | None] = []
        for block, struct in enumerate(self.owner.structs):
            is_one = block in with_gradient
            d_weights += empty_gradients(struct) if is_one else [None] * NUM_WEIGHTS
        d_flow = torch.empty(2 * self.rows.tokens, self.width)
        addresses = (None if one is None else one.data_ptr() for one in d_weights)
        pointers = (_P * len(d_weights))(*addresses)
        self.recurrence.d_weights = ctypes.addressof(pointers)
        self.recurrence.d_flow = d_flow.data_ptr()
        self.steps = (_CallBackward * len(steps))(*steps)
        self._alive += [given, d_state, d_flow, pointers]
        return d_state["H"] if has_some["H"] else None, d_weights

    def finish(self) -> None:
        """To be called behind the backward pass: its memory is free for the next step."""
        self.owner.free(self.saved)
        del self.saved

    def workspace(self, *, is_backward: bool) -> tuple[Any, ...]:
        """Of the kernel: its memory, and what each thread has of it."""
        return self.owner.workspace(self.owner.structs[0], self.rows, is_backward=is_backward)

    def _sizes(self, rows_of_last: CRows) -> list[int]:
        """Floats that a call keeps: for the rows between its blocks, and for each block."""
        of_all, flow = self._saved_sizes(self.rows), (self.num_blocks + 1) * self.rows.tokens
        last = of_all if rows_of_last is self.rows else self._saved_sizes(rows_of_last)
        return [flow * self.width, *of_all * (self.num_blocks - 1), *last]

    def _saved_sizes(self, rows: CRows) -> list[int]:
        """Of a block; no vector of it lies across two lines of the cache."""
        sizes = self.owner.saved_sizes(self.owner.structs[0], rows)
        return [-(-size // 16) * 16 for size in sizes]

    def _saved(self, pointers: Sequence[int]) -> int:
        each = len(CSaved._fields_)
        parts = (tuple(pointers[at : at + each]) for at in range(0, len(pointers), each))
        saved = (CSaved * self.num_blocks)(*parts)
        self._alive.append(saved)
        return ctypes.addressof(saved)


class _RecurrenceFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_H: torch.Tensor, z_L: torch.Tensor, run: Run, *weights: torch.Tensor
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
