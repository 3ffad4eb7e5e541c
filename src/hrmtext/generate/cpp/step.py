"""Prompts and decode steps by the C++ kernel: packed weights, and calls as of `DecodeStep`.

Letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch

from hrmtext.batch import RowLayout
from hrmtext.errors import BackendError
from hrmtext.generate.step import guided, read_by_module
from hrmtext.model import Depth, HrmLM, KVCache
from hrmtext.model.layers import Block, rotary_tables
from hrmtext.runtime.native import load_kernel
from hrmtext.runtime.native.pack import alternate, pack_columns
from hrmtext.runtime.native.share import even_shares

MAX_THREADS = 16
"""More would wait at barriers longer than they compute."""
READ_TOKENS = 256
"""Tokens of prompts that a thread takes through the recurrence together: their activations stay in
its cache."""
LONGEST_READ = 512
"""Tokens of a row up to which the kernel reads it; beyond, torch's attention is faster."""
MIN_OWN_TOKENS = 4
"""Tokens a thread from which threads go apart: each then reads all weights for its own rows."""
APART_BYTES = 16 << 20
"""Packed weights up to which they do: every thread reads them from its cache, not from memory."""

_I, _F, _P = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = [(name, _P) for name in ("gqkv", "o", "gate_up", "down")]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _I) for name in ("hidden", "heads", "head_dim", "mlp", "vocab", "layers")),
        *((name, _I) for name in ("bf16", "shared", "H_injection", "L_slots")),
        *((name, _F) for name in ("eps", "scale")),
        *((name, _P) for name in ("embedding", "z_L_init", "cos", "sin", "head")),
        *((name, ctypes.POINTER(_Layer)) for name in ("H", "L")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _I) for name in ("tokens", "outputs", "H_cycles", "L_cycles")),
        *((name, _I) for name in ("capacity", "threads")),
        *((name, _P) for name in ("ids", "rows", "positions", "visible", "select")),
        *((name, _P) for name in ("bounds", "output_bounds")),
        *((name, ctypes.POINTER(_P)) for name in ("keys", "values")),
        *((name, _P) for name in ("logits", "first_logits", "workspace")),
        ("first", _I),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel; BackendError where it cannot be built."""
    loaded = load_kernel(Path(__file__).with_name("kernel.cpp"), "step=cpp")
    for name in ("hrm_lanes", "hrm_has_bf16", "hrm_workspace"):
        getattr(loaded, name).restype = ctypes.c_int64
    loaded.hrm_step.restype = None
    return loaded


def why_not(model: HrmLM) -> str | None:
    """What keeps `CppStep` from running this model; None: nothing does."""
    weight, config = model.lm_head.weight, model.config
    if weight.device.type != "cpu":
        return f"it runs on the CPU, the weights are on {weight.device}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"it reads fp32 and bf16 weights, these are {weight.dtype}"
    widths = {"hidden_size": config.hidden_size, "mlp_size": config.mlp_size,
              "attention_size": config.attention_size, "head_dim": config.head_dim}  # fmt: skip
    lanes = 2 * library().hrm_lanes()
    for name, width in widths.items():
        if width % (lanes // 2 if name == "head_dim" else lanes):
            return f"it needs widths in multiples of {lanes}, {name} is {width}"
    return None


def packed_bytes(model: HrmLM) -> int:
    """Memory that the packed copy of the weights takes."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) - config.vocab_size * config.hidden_size
    return weights * (2 if _in_bf16(model) else 4) + 4 * config.vocab_size * config.hidden_size


class CppStep:
    """Logits behind prompts, and behind one further token a row, by the C++ kernel.

    Activations, sums and the cache are fp32; weights are read in their own format where the
    processor multiplies it (bf16 then rounds what each product reads, as the module does), else in
    fp32. The packed weights are a copy: see `pack`.
    """

    is_compiled = False
    """Any number of rows and any capacity, from step to step."""

    def __init__(self, model: HrmLM) -> None:
        """Build the kernel if need be, and pack the weights.

        Raises:
            BackendError: this model, device or number format is not for the kernel, or there is no
                compiler.
        """
        reason = why_not(model)
        if reason is not None:
            raise BackendError(f"step=cpp cannot run this model: {reason}; use step=eager")
        self.model = model
        self._library = library()
        self._lanes = int(self._library.hrm_lanes())
        self._bf16 = _in_bf16(model)
        self._kept: list[torch.Tensor] = []  # what the kernel's pointers point to
        self._layers: list[ctypes.Array[_Layer]] = []
        self._workspace = torch.empty(0)
        self.packed_bytes = packed_bytes(model)
        self.pack()

    def pack(self) -> None:
        """Pack the weights as they are now.

        Called whenever the step is asked for: a write through `.data` leaves no trace that could be
        looked for, and stale weights would answer wrongly in silence. It takes as long as a step or
        two.
        """
        self._kept.clear()
        self._layers.clear()
        self._packed = self._pack_model()

    def __call__(
        self, tokens: torch.Tensor, cache: KVCache, depth: Depth | None, guidance: float
    ) -> torch.Tensor:
        """(B) tokens, appended to the cache -> (B, V) fp32 logits behind them."""
        cache.require_room()
        where = {"ids": tokens, "positions": cache.lengths}
        logits = self._run(where, list(range(1, len(tokens) + 1)), cache, depth, guidance)
        cache.advance()
        return logits

    def read(
        self,
        tokens: torch.Tensor,
        layout: RowLayout,
        cache: KVCache,
        depth: Depth | None,
        guidance: float,
    ) -> torch.Tensor:
        """See `StepFunction.read`."""
        if max(layout.lengths) + cache.longest > LONGEST_READ:
            return read_by_module(self.model, tokens, layout, cache, depth, guidance)
        held = torch.tensor(cache.held_before(layout))  # (B)
        lengths = torch.tensor(layout.lengths)
        ends = lengths.cumsum(0)
        rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # (T)
        positions = torch.arange(len(rows)) - (ends - lengths - held)[rows]
        visible = layout.visible_end[: len(rows)] + held[rows]
        found = []
        for group in _groups(layout.lengths, READ_TOKENS * self._threads()):
            part = slice(int(ends[group.start] - lengths[group.start]), int(ends[group.stop - 1]))
            where = {
                "ids": tokens[part],
                "rows": rows[part],
                "positions": positions[part],
                "visible": visible[part],
                "select": ends[group.start : group.stop] - 1 - part.start,
            }
            row_ends = (ends[group.start : group.stop] - part.start).tolist()
            found.append(self._run(where, row_ends, cache, depth, guidance))
        cache.hold(held + lengths)
        return torch.cat(found)

    def _run(
        self,
        where: dict[str, torch.Tensor],
        row_ends: list[int],
        cache: KVCache,
        depth: Depth | None,
        guidance: float,
    ) -> torch.Tensor:
        """Logits behind each row.

        Args:
            where: tensors of int64, one for each pointer of that name in the kernel's `Step`.
            row_ends: where each row's tokens end among all.
        """
        config = self.model.config
        threads, outputs = self._threads(), len(row_ends)
        shares = None
        if self.packed_bytes <= APART_BYTES:
            shares = even_shares(row_ends, threads, MIN_OWN_TOKENS)
        if shares is not None:
            where |= {"bounds": torch.tensor(shares[0]), "output_bounds": torch.tensor(shares[1])}
        where = {name: tensor.contiguous() for name, tensor in where.items()}
        logits = torch.empty(outputs, config.vocab_size)
        first = torch.empty_like(logits) if guidance else None
        step = _Step(
            tokens=len(where["ids"]),
            outputs=outputs,
            H_cycles=depth.H_cycles if depth else config.H_cycles,
            L_cycles=depth.L_cycles if depth else config.L_cycles,
            capacity=cache.capacity,
            threads=threads,
            keys=_pointers(cache.keys),
            values=_pointers(cache.values),
            logits=logits.data_ptr(),
            first_logits=None if first is None else first.data_ptr(),
            **{name: tensor.data_ptr() for name, tensor in where.items()},
        )
        step.workspace = self._memory(step).data_ptr()
        self._library.hrm_step(ctypes.byref(self._packed), ctypes.byref(step))
        return logits if first is None else guided(first, logits, guidance)

    def _threads(self) -> int:
        return min(torch.get_num_threads(), MAX_THREADS)

    def _memory(self, step: _Step) -> torch.Tensor:
        size = self._library.hrm_workspace(ctypes.byref(self._packed), ctypes.byref(step))
        if self._workspace.numel() < size:
            self._workspace = torch.empty(size)
        return self._workspace

    def _pack_model(self) -> _Model:
        model, config = self.model, self.model.config
        core = model.model
        H = self._pack_stack(core.H_module.layers)
        L = H if config.shared_stack else self._pack_stack(core.L_module.layers)
        positions = torch.arange(config.max_seq_len)
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, torch.float32)
        return _Model(
            hidden=config.hidden_size,
            heads=config.num_heads,
            head_dim=config.head_dim,
            mlp=config.mlp_size,
            vocab=config.vocab_size,
            layers=config.num_layers_per_stack,
            bf16=self._bf16,
            shared=config.shared_stack,
            H_injection=config.H_injection,
            L_slots=config.L_cycles,
            eps=config.rms_norm_eps,
            scale=config.scale,
            embedding=self._keep(core.embed_tokens.weight.float()),
            z_L_init=self._keep(core.z_L_init.float()),
            cos=self._keep(cos),
            sin=self._keep(sin),
            head=self._keep(self._pack(model.lm_head.weight)),
            H=H,
            L=L,
        )

    def _pack_stack(self, blocks: torch.nn.ModuleList) -> ctypes.Array[_Layer]:
        layers = (_Layer * len(blocks))(*(self._pack_block(cast(Block, block)) for block in blocks))
        self._layers.append(layers)
        return layers

    def _pack_block(self, block: Block) -> _Layer:
        gate_up = alternate(block.mlp.gate_up_proj.weight, self._lanes, bf16=self._bf16)
        return _Layer(
            gqkv=self._keep(self._pack(block.attn.gqkv_proj.weight)),
            o=self._keep(self._pack(block.attn.o_proj.weight)),
            gate_up=self._keep(gate_up),
            down=self._keep(self._pack(block.mlp.down_proj.weight)),
        )

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        return pack_columns(weight, self._lanes, bf16=self._bf16)

    def _keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _groups(lengths: Sequence[int], most: int) -> Iterator[range]:
    """Consecutive rows of at most so many tokens together, or a single longer one."""
    start = tokens = 0
    for row, length in enumerate(lengths):
        if row > start and tokens + length > most:
            yield range(start, row)
            start, tokens = row, 0
        tokens += length
    yield range(start, len(lengths))


def _in_bf16(model: HrmLM) -> bool:
    return model.lm_head.weight.dtype == torch.bfloat16 and bool(library().hrm_has_bf16())


def _pointers(tensors: list[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    first = tensors[0]
    assert first.dtype == torch.float32 and first.is_contiguous(), "the CPU cache is fp32"
    return (_P * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
