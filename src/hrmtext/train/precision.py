"""fp32 master weights and the module that computes: the same one, or one with bf16 stacks.

In bf16 the stacks are copies: each of their gradients is added to the fp32 gradient of the master
weight as soon as it is whole, in every microbatch, and they are refreshed from the master weights
after every optimizer step. Embedding and head, which a step uses once, are the master's own: what
was looked up is rounded, and the loss rounds the head for its products, so that no copy of them is
kept and their gradients are fp32 from the start. No autocast.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

from hrmtext.errors import ConfigError
from hrmtext.model import HrmLM
from hrmtext.runtime import dist
from hrmtext.train.parallel.group import sum_gradients
from hrmtext.train.parallel.shards import Shards

Result = TypeVar("Result")


class ComputeModel:
    """The module for forward and backward beside the master weights that the optimizer updates."""

    def __init__(self, master: HrmLM, dtype: torch.dtype) -> None:
        """`master` holds fp32 weights (fp64 in tests); `dtype` is that of forward and backward."""
        self.master = master
        self.dtype = dtype
        master_dtype = next(master.parameters()).dtype
        if master_dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"master weights are {master_dtype}, expected torch.float32")
        self.is_copy = dtype != master_dtype
        self._buffers: dict[int, torch.Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._take(_with_rounded_stacks(master, dtype) if self.is_copy else master)
        self.shards = Shards.whole(master)

    def use_master(self) -> None:
        """Compute with the master weights themselves: what calls the blocks rounds by itself."""
        self.dtype = next(self.master.parameters()).dtype
        self.is_copy = False
        self._take(self.master)

    def _take(self, module: HrmLM) -> None:
        self.module = module
        pairs = list(zip(self.master.parameters(), self.module.parameters(), strict=True))
        self._trained: list[tuple[torch.Tensor, torch.Tensor]] = [
            pair for pair in pairs if pair[0].requires_grad
        ]
        """Trained weights, of the master and as they compute: copies, or the same."""
        self._copies = [(ours, copied) for ours, copied in pairs if ours is not copied]
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            computed.register_post_accumulate_grad_hook(functools.partial(self._collect, index))
            for index, (master, computed) in enumerate(self._trained)
            if computed is not master
        ]

    def call(self, function: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        """`function(module, ...)`, ready for a backward pass."""
        return function(self.module, *arguments, **named)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a microbatch to the master's."""
        loss.backward()

    def use_sparse_embedding(self) -> None:
        """Let the embedding's gradient be sparse: of the rows that were looked up, on one rank."""
        checks = torch.sparse.check_sparse_tensor_invariants
        if not checks.is_enabled():
            checks.disable()  # torch warns where nobody has said whether it is to check
        self.module.model.embed_tokens.sparse = True

    def reduce(self) -> None:
        """Sum the gradients over all ranks, and those of a sparse one by row."""
        if self.module.model.embed_tokens.sparse:
            table = self.master.model.embed_tokens.weight
            if table.grad is not None and table.grad.is_sparse:
                table.grad = table.grad.coalesce()
        if dist.is_distributed():
            sum_gradients(list(self.shards.parameters.values()))

    def clear_gradients(self) -> None:
        """Set every gradient to None: a parameter that gets none must be seen to have none."""
        for master, computed in self._trained:
            master.grad = None
            computed.grad = None

    @torch.no_grad()
    def _collect(self, index: int, computed: torch.Tensor) -> None:
        """Add a whole gradient of the copy to the master's, in fp32, and free it."""
        master = self._trained[index][0]
        assert computed.grad is not None, "called when the gradient has been accumulated"
        if master.grad is None:
            if index not in self._buffers:
                self._buffers[index] = torch.empty_like(master, requires_grad=False)
            master.grad = self._buffers[index].copy_(computed.grad)
        else:
            master.grad += computed.grad
        computed.grad = None

    @torch.no_grad()
    def refresh(self, *, frozen: bool = False) -> None:
        """Round the master weights into the copy; frozen ones only when asked, after loading."""
        pairs = [pair for pair in self._copies if frozen or pair[0].requires_grad]
        if pairs:
            torch._foreach_copy_([copied for _, copied in pairs], [master for master, _ in pairs])

    @contextlib.contextmanager
    @torch.no_grad()
    def using(self, weights: Sequence[torch.Tensor] | None) -> Iterator[HrmLM]:
        """The module with other weights (the averages), in the order of the trained parameters.

        None: with its own. On leaving, the master's weights are back bit for bit.
        """
        if weights is None:
            yield self.module
            return
        own = [computed.data for _, computed in self._trained]
        try:
            for (master, computed), other in zip(self._trained, weights, strict=True):
                if computed is master:
                    computed.data = other  # borrowed, not copied
                else:
                    computed.copy_(other)
            yield self.module
        finally:
            for (_, computed), data in zip(self._trained, own, strict=True):
                computed.data = data
            self.refresh()


def _with_rounded_stacks(master: HrmLM, dtype: torch.dtype) -> HrmLM:
    """A module with stacks of its own in `dtype`, and the master's embedding and head."""
    own = (master.model.embed_tokens.weight, master.lm_head.weight)
    module = copy.deepcopy(master, {id(parameter): parameter for parameter in own})
    for name, child in module.model.named_children():
        if name != "embed_tokens":
            child.to(dtype)
    module.model.embed_tokens.register_forward_hook(lambda _, __, looked_up: looked_up.to(dtype))
    # The loss takes the head's weight; who calls the module itself gets logits in its format.
    module.lm_head.register_forward_pre_hook(
        lambda head, inputs: tuple(state.to(head.weight.dtype) for state in inputs)
    )
    return module
