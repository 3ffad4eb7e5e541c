"""Blocks by the C++ kernel, forward and backward, as what calls the blocks of a model.

Letters: T tokens of the stream, S those whose output is wanted, D hidden size, A attention size, N
heads, K head width, M SwiGLU width.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from hrmtext.batch import RowLayout
from hrmtext.errors import BackendError
from hrmtext.model import HrmLM
from hrmtext.model.layers import Block, ExitNorm
from hrmtext.runtime.memory import empty_in_large_pages
from hrmtext.runtime.native.share import circle_shares
from hrmtext.train.cpp.library import library

MIN_OWN_TOKENS = 32
"""Tokens from which a thread of its own pays."""
PIECE_TOKENS, WIDE_PIECE_TOKENS = 256, 480
"""Tokens that go through a block together, about, in narrow blocks and in wide ones."""
NARROW = 192
"""Hidden size up to which what is between the products of PIECE_TOKENS stays in the cache; where it
does not, larger pieces read the weights and their gradients less often."""
MOST_FREE = 8
"""Calls whose memory is kept for the next step: as many as carry gradient, and some."""
_WEIGHTS = ("gqkv", "o", "gate_up", "down")
NUM_WEIGHTS = len(_WEIGHTS)
"""Of a block."""

_I, _P = ctypes.c_int64, ctypes.c_void_p


class CBlock(ctypes.Structure):
    _fields_ = [
        *((name, _I) for name in ("hidden", "heads", "head_dim", "mlp", "bf16")),
        ("eps", ctypes.c_float),
        *((name, _P) for name in _WEIGHTS),
        *((f"{name}_t", _P) for name in _WEIGHTS),
    ]


class CRows(ctypes.Structure):
    _fields_ = [
        *(
            (name, _I)
            for name in ("tokens", "outputs", "rows", "longest", "threads", "piece", "first_row")
        ),
        *((name, _P) for name in ("starts", "visible", "select", "bounds")),
        *((name, _P) for name in ("positions", "cos", "sin")),
    ]


View = tuple[CRows, Sequence[torch.Tensor | None]]
"""Rows as the kernel reads them, and what must live as long."""


class CSaved(ctypes.Structure):
    _fields_ = [(name, _P) for name in ("gqkv", "attended", "logsum", "middle", "gate_up")]


def why_not(model: HrmLM, dtype: torch.dtype = torch.float32) -> str | None:
    """What keeps `CppBlocks` from running this model with products in `dtype`; None: nothing."""
    weight, config = model.lm_head.weight, model.config
    if weight.device.type != "cpu":
        return f"it runs on the CPU, the weights are on {weight.device}"
    if weight.dtype != torch.float32:
        return f"it takes weights in fp32, these are {weight.dtype}"
    if dtype == torch.bfloat16 and not library().hrm_block_has_bf16():
        return "this processor has no instructions for bf16 that the kernel uses (AVX-512 BF16)"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"its products are in fp32 or bf16, not in {dtype}"
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith(".layers") and any(
            type(part) is not nn.Linear for part in linears_of(cast(Block, module))
        ):
            return f"{name} has other layers than plain projections (adapters?)"
    lanes = 2 * library().hrm_lanes()
    widths = {"hidden_size": config.hidden_size, "mlp_size": config.mlp_size,
              "head_dim": config.head_dim}  # fmt: skip
    for name, width in widths.items():
        if width % lanes:
            return f"it needs widths in multiples of {lanes}, {name} is {width}"
    return None


class RowsPlan:
    """Rows of one micro-batch as the kernel reads them, in the place of an attention plan."""

    def __init__(self, layout: RowLayout, piece: int) -> None:
        """`piece`: tokens that are to go through a block together, about."""
        starts = [*layout.starts(), sum(layout.lengths)]
        self.num_tokens = layout.num_tokens
        self.longest = max(layout.lengths)
        self.num_rows = len(layout.lengths)
        self.starts = torch.tensor(starts)
        self.visible = layout.visible_end.contiguous()
        shares = circle_shares(layout.lengths, torch.get_num_threads(), MIN_OWN_TOKENS)
        self.first_row, bounds = shares or (0, [0, self.num_rows])
        self.threads = len(bounds) - 1
        self.bounds = torch.tensor(bounds)
        share = starts[-1] / self.threads
        self.piece = math.ceil(share / max(1, round(share / piece)))  # of like size, none left over

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        """Not by itself: the kernel computes whole blocks."""
        raise BackendError("these rows are for the C++ blocks; make_plan gives a plan that attends")

    def view(
        self,
        cos: torch.Tensor,
        sin: torch.Tensor,
        select: torch.Tensor | None,
        positions: torch.Tensor | None = None,
    ) -> View:
        """The kernel's `Rows`.

        Args:
            cos, sin: (T, K), or a table of which `positions` (T) are rows.
        """
        chosen = None
        if select is not None:  # an empty tensor has no address, which would ask for all tokens
            chosen = select if len(select) else self.starts
        rows = CRows(
            tokens=self.num_tokens,
            outputs=self.num_tokens if select is None else len(select),
            rows=self.num_rows,
            longest=self.longest,
            threads=self.threads,
            piece=self.piece,
            first_row=self.first_row,
            starts=self.starts.data_ptr(),
            visible=self.visible.data_ptr(),
            select=None if chosen is None else chosen.data_ptr(),
            bounds=self.bounds.data_ptr(),
            positions=None if positions is None else positions.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
        )
        return rows, (cos, sin, positions, select, self.starts, self.visible, self.bounds)


class CppBlocks:
    """A `BlockCall` that computes blocks and exit norms in C++, with all their gradients.

    Call `pack` after every change of the weights, and give `rows(layout)` as the attention plan.
    Padding behind the last row passes through a block unchanged.
    """

    def __init__(self, model: HrmLM, dtype: torch.dtype = torch.float32) -> None:
        """Build the kernel if need be.

        Args:
            model: with weights in fp32.
            dtype: format in which products multiply and projections are kept for the backward pass,
                bf16 or fp32; all else is fp32 with both.

        Raises:
            BackendError: this model is not for the kernel, or there is no compiler.
        """
        reason = why_not(model, dtype)
        if reason is not None:
            raise BackendError(
                f"block_kernel=cpp cannot train this model: {reason}; use block_kernel=torch"
            )
        self.dtype = dtype
        self.piece = PIECE_TOKENS if model.config.hidden_size <= NARROW else WIDE_PIECE_TOKENS
        self.library = library()
        self._gap = int(self.library.hrm_block_gap())
        blocks = [cast(Block, block) for stack in stacks_of(model) for block in stack.layers]
        self._packed = {id(block): _Packed(block, dtype) for block in blocks}
        self._workspace = torch.empty(0)
        self._free: list[torch.Tensor] = []

    @torch.no_grad()
    def pack(self) -> None:
        """Take the weights as they are now."""
        for packed in self._packed.values():
            packed.take(self.library)

    def rows(self, layout: RowLayout) -> RowsPlan:
        """What takes the place of the attention plan of a micro-batch."""
        return RowsPlan(layout, self.piece)

    def __call__(self, block: nn.Module, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """As the module's `forward`: (T, D) -> (T, D), or (S, D) of the selected tokens."""
        if isinstance(block, ExitNorm):
            return _NormFunction.apply(x.contiguous(), self.library, block.eps)
        return self._block(block, x, *arguments)

    def _block(
        self,
        block: nn.Module,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        plan: RowsPlan,
        slot: int,
        select: torch.Tensor | None = None,
    ) -> torch.Tensor:
        del slot
        x, view = x.contiguous(), plan.view(cos.contiguous(), sin.contiguous(), select)
        if not torch.is_grad_enabled():
            return self.forward(id(block), view, x, with_backward=False)[0]
        weights = [linear.weight for linear in linears_of(cast(Block, block))]
        return _BlockFunction.apply(x, self, id(block), view, *weights)

    def forward(
        self,
        key: int,
        view: View,
        x: torch.Tensor,
        *,
        with_backward: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The block's output, and what its backward pass needs: give it back to `free`."""
        block, rows = self._packed[key].block, view[0]
        saved = self.take(sum(self.saved_sizes(block, rows))) if with_backward else None
        pointers = CSaved() if saved is None else self._saved(block, rows, saved)
        y = torch.empty(rows.outputs, block.hidden)
        structs = [ctypes.byref(each) for each in (block, rows, pointers)]
        self.library.hrm_block_forward(
            *structs,
            _P(x.data_ptr()),
            _P(y.data_ptr()),
            *self.workspace(block, rows, is_backward=False),
        )
        return y, saved

    def free(self, saved: torch.Tensor) -> None:
        """Let a later call use this memory: fresh pages cost a tenth of a forward pass."""
        if len(self._free) < MOST_FREE:
            self._free.append(saved)

    def take(self, size: int) -> torch.Tensor:
        """Memory of at least so many floats."""
        while self._free:
            memory = self._free.pop()
            if memory.numel() >= size:
                return memory
        # Micro-batches differ by a little.
        return empty_in_large_pages(size + size // 16, torch.float32)

    def saved_sizes(self, block: CBlock, rows: CRows) -> list[int]:
        """Floats of each part that `CSaved` points to."""
        size, gap = block.heads * block.head_dim, self._gap
        per_float = 2 if block.bf16 else 1
        return [
            rows.tokens * (4 * size // per_float + gap),
            rows.tokens * (size + gap),
            -(-rows.tokens * block.heads // 16) * 16,
            rows.outputs * (block.hidden + gap),
            rows.outputs * 2 * block.mlp // per_float,
        ]

    def _saved(self, block: CBlock, rows: CRows, memory: torch.Tensor) -> CSaved:
        offsets = itertools.accumulate(self.saved_sizes(block, rows), initial=0)
        pointers = [memory.data_ptr() + 4 * offset for offset in offsets]
        return CSaved(*pointers[:-1])

    def backward(
        self,
        key: int,
        view: View,
        x: torch.Tensor,
        saved: torch.Tensor,
        d_y: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradients of the input and of the four weights."""
        block, rows, d_y = self._packed[key].block, view[0], d_y.contiguous()
        d_x, d_weights = torch.empty_like(x), empty_gradients(block)
        structs = [ctypes.byref(each) for each in (block, rows, self._saved(block, rows, saved))]
        pointers = (_P(tensor.data_ptr()) for tensor in (x, d_y, d_x))
        of_weights = (_P * NUM_WEIGHTS)(*(tensor.data_ptr() for tensor in d_weights))
        workspace = self.workspace(block, rows, is_backward=True)
        self.library.hrm_block_backward(*structs, *pointers, of_weights, *workspace)
        return d_x, d_weights

    def workspace(self, block: CBlock, rows: CRows, *, is_backward: bool) -> tuple[Any, ...]:
        """Workspace, and the floats of it that each thread has."""
        sizes = (ctypes.byref(block), ctypes.byref(rows), _I(is_backward))
        own = int(self.library.hrm_block_workspace(*sizes))
        if self._workspace.numel() < rows.threads * own:
            self._workspace = empty_in_large_pages(rows.threads * own, torch.float32)
        return _P(self._workspace.data_ptr()), _I(own)


class _Packed:
    """A block's weights as the kernel reads them."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self._weights = dict(zip(_WEIGHTS, (m.weight for m in linears_of(block)), strict=True))
        self._memory = {
            name + suffix: torch.empty(weight.numel(), dtype=dtype)
            for name, weight in self._weights.items()
            for suffix in ("", "_t")
        }
        self.block = CBlock(
            hidden=self._weights["o"].shape[0],
            heads=self._weights["o"].shape[1] // block.attn.head_dim,
            head_dim=block.attn.head_dim,
            mlp=self._weights["down"].shape[1],
            bf16=dtype == torch.bfloat16,
            eps=block.eps,
            **{name: memory.data_ptr() for name, memory in self._memory.items()},
        )

    def take(self, kernel: ctypes.CDLL) -> None:
        """Pack the weights as they are now."""
        weights = [weight.contiguous() for weight in self._weights.values()]
        pointers = (_P(weight.data_ptr()) for weight in weights)
        kernel.hrm_block_pack(ctypes.byref(self.block), *pointers, _I(torch.get_num_threads()))


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kernel: ctypes.CDLL, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.of = kernel, eps
        y = torch.empty_like(x)
        kernel.hrm_norm_forward(_P(x.data_ptr()), _P(y.data_ptr()), *_norm_sizes(x, eps))
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        (x,), (kernel, eps) = ctx.saved_tensors, ctx.of
        d_y, d_x = grad_outputs[0].contiguous(), torch.empty_like(x)
        pointers = (_P(tensor.data_ptr()) for tensor in (x, d_y, d_x))
        kernel.hrm_norm_backward(*pointers, *_norm_sizes(x, eps))
        return d_x, None, None


def _norm_sizes(x: torch.Tensor, eps: float) -> tuple[Any, ...]:
    rows, width = x.shape
    threads = max(1, min(torch.get_num_threads(), rows // MIN_OWN_TOKENS))
    return _I(rows), _I(width), ctypes.c_float(eps), _I(threads)


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        blocks: CppBlocks,
        key: int,
        view: View,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        y, saved = blocks.forward(key, view, x)
        ctx.save_for_backward(x)
        ctx.of = blocks, key, view, saved
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors  # torch refuses a second backward pass here
        blocks, key, view, saved = ctx.of
        d_x, d_weights = blocks.backward(key, view, x, saved, grad_outputs[0])
        ctx.of = None
        blocks.free(saved)
        return d_x, None, None, None, *d_weights


def empty_gradients(block: CBlock) -> list[torch.Tensor]:
    """Room for the gradients of a block's weights."""
    size = block.heads * block.head_dim
    shapes = ((4 * size, block.hidden), (block.hidden, size),
              (2 * block.mlp, block.hidden), (block.hidden, block.mlp))  # fmt: skip
    return [torch.empty(shape) for shape in shapes]


def stacks_of(model: HrmLM) -> list[Any]:
    """The stacks of a model, H first."""
    core = model.model
    return [core.H_module] if core.config.shared_stack else [core.H_module, core.L_module]


def linears_of(block: Block) -> tuple[nn.Linear, ...]:
    """The projections of a block in the kernel's order."""
    return (
        block.attn.gqkv_proj, block.attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj
    )  # fmt: skip
