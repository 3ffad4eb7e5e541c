"""Activation checkpointing: blocks that keep their input only and run again in the backward."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hrmtext.model import HrmLM
from hrmtext.model.layers import BlockCall

Recomputed = Literal["none", "L", "all"]


def recomputing(model: HrmLM, which: Recomputed) -> BlockCall | None:
    """How to call the blocks of `model`; None: plainly.

    Args:
        which: the stack whose blocks keep their input only: `L` (a shared one is it too), or
            `all` for both.
    """
    if which == "none":
        return None
    core = model.model
    stacks = [core.H_module if core.config.shared_stack else core.L_module]
    if which == "all":
        stacks.append(core.H_module)
    chosen = {id(block) for stack in stacks for block in stack.layers}
    return functools.partial(_call, chosen)


def _call(chosen: set[int], block: nn.Module, *arguments: Any) -> torch.Tensor:
    # Calls that carry no gradient keep nothing anyhow. There is no dropout, so no random state.
    if id(block) not in chosen or not torch.is_grad_enabled():
        return block(*arguments)
    return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
