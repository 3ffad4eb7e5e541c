"""Whether a run's blocks are computed in C++: asked for by name, or chosen and proved."""

from __future__ import annotations

import torch

from hrmtext.batch import RowLayout
from hrmtext.config.train import TrainConfig
from hrmtext.errors import BackendError
from hrmtext.model import HrmLM, make_plan
from hrmtext.model.layers import rotary_tables
from hrmtext.runtime.log import logger
from hrmtext.runtime.native import compiler
from hrmtext.train.cpp.blocks import CppBlocks, why_not
from hrmtext.train.cpp.head import CppHead
from hrmtext.train.cpp.recurrence import CppRecurrence

WIDEST = 768
"""Hidden size up to which `auto` takes the kernel: wider products are torch's own strength."""
LONGEST = 1_024
"""Tokens of a row up to which it does: the kernel holds all scores of a row and head."""
PROBE_LENGTHS, PROBE_PREFIXES = (5, 1, 9), (3, 1, 0)
PROBE_UNITS = {torch.float32: 64, torch.bfloat16: 4}
"""Units in the last place of the largest value that the kernel may be off the module in fp32."""


def choose_blocks(
    model: HrmLM, config: TrainConfig, device: torch.device, dtype: torch.dtype
) -> CppBlocks | None:
    """What calls the blocks of a step; None: the module itself.

    Args:
        model: with weights in fp32.
        dtype: the run's format, in which the products of blocks multiply.

    Raises:
        BackendError: the kernel was asked for by name and cannot run here; the message says why.
    """
    if config.block_kernel == "torch":
        return None
    reason = _against(config, device)
    if config.block_kernel == "cpp" and reason is not None:
        raise BackendError(f"block_kernel=cpp cannot be used: {reason}; use block_kernel=torch")
    try:
        if config.block_kernel == "auto":
            reason = reason or _against_auto(model, dtype)
            if reason is not None:
                logger.debug("block_kernel=auto: torch, as %s", reason)
                return None
        blocks = CppRecurrence(model, dtype)
        _probe(blocks, model)
    except BackendError as error:  # the machine's compiler, or its arithmetic, is unfit
        if config.block_kernel == "cpp":
            raise
        logger.warning("block_kernel=auto takes torch, which is slower: %s", error)
        return None
    return blocks


def choose_head(config: TrainConfig, dtype: torch.dtype) -> CppHead | None:
    """What computes the loss of a small head beside C++ blocks; None: torch.

    Args:
        dtype: the format in which the blocks multiply.

    Raises:
        BackendError: `block_kernel` is cpp, and this machine's kernel is unfit.
    """
    if config.loss != "auto":
        return None
    try:
        head = CppHead(dtype)
        _probe_head(head)
    except BackendError as error:
        if config.block_kernel == "cpp":
            raise
        logger.warning("loss=auto takes torch, which is slower: %s", error)
        return None
    return head


def _probe_head(head: CppHead) -> None:
    """Refuse a kernel that does not compute a loss and its gradients as torch does."""
    draw = torch.Generator().manual_seed(0)
    state, weight = (torch.randn(rows, 64, generator=draw).requires_grad_() for rows in (70, 96))
    labels = torch.arange(70)
    ours = head.loss(state, weight, labels, 1.0)[0]
    theirs = torch.nn.functional.cross_entropy(state @ weight.T, labels, reduction="sum")
    found = [ours, *torch.autograd.grad(ours, (state, weight))]
    expected = [theirs, *torch.autograd.grad(theirs, (state, weight))]
    unit = torch.finfo(head.dtype).eps
    for name, a, b in zip(("loss", "gradient", "gradient"), found, expected, strict=True):
        error = float((a - b).detach().abs().max())
        allowed = PROBE_UNITS[head.dtype] * unit * float(b.detach().abs().max())
        if not error <= allowed:
            raise BackendError(
                f"the C++ head's {name} differs from torch's by {error:.2e}, expected at most "
                f"{allowed:.2e}; use loss=chunked and report the compiler and processor"
            )


def _against(config: TrainConfig, device: torch.device) -> str | None:
    """What speaks against the kernel in any case."""
    if device.type != "cpu":
        return f"the device is {device}"
    if config.compile is True:
        return "compile is true"
    if config.attention != "auto":
        return f"attention is {config.attention}"
    if config.activation_checkpointing != "none":
        return f"activation_checkpointing is {config.activation_checkpointing}"
    return None


def _against_auto(model: HrmLM, dtype: torch.dtype) -> str | None:
    """What speaks against it where it was not asked for."""
    if compiler() is None:
        return "there is no C++ compiler"
    if model.config.hidden_size > WIDEST:
        return f"hidden_size is above {WIDEST}"
    if model.config.max_seq_len > LONGEST:
        return f"rows may be longer than {LONGEST} tokens"
    return why_not(model, dtype)


def _probe(blocks: CppBlocks, model: HrmLM) -> None:
    """Refuse a kernel that does not compute what the module computes on this very machine."""
    config, block = model.config, model.model.H_module.layers[0]
    layout = RowLayout.from_prefixes(PROBE_LENGTHS, PROBE_PREFIXES)
    positions = torch.cat([torch.arange(length) for length in PROBE_LENGTHS])
    tables = rotary_tables(positions, config.head_dim, config.rope_theta, torch.float32)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(layout.num_tokens, config.hidden_size, generator=draw).requires_grad_()
    inputs = [x, *block.parameters()]
    blocks.pack()
    ours = blocks(block, x, *tables, blocks.rows(layout), 0)
    theirs = block(x, *tables, make_plan(layout), 0)
    towards = torch.randn(ours.shape, generator=draw)
    found = [ours, *torch.autograd.grad(ours, inputs, towards)]
    expected = [theirs, *torch.autograd.grad(theirs, inputs, towards)]
    for name, a, b in zip(("output", "gradient", *_names(block)), found, expected, strict=True):
        error = float((a - b).detach().abs().max())
        unit = torch.finfo(blocks.dtype).eps
        allowed = PROBE_UNITS[blocks.dtype] * unit * float(b.detach().abs().max())
        if not error <= allowed:
            raise BackendError(
                f"the C++ block's {name} differs from the module's by {error:.2e}, expected at "
                f"most {allowed:.2e}; use block_kernel=torch and report the compiler and processor"
            )


def _names(block: torch.nn.Module) -> list[str]:
    return [f"gradient of {name}" for name, _ in block.named_parameters()]
