"""FSDP2 and HSDP: fp32 master weights, gradients and optimizer state spread over the ranks.

Blocks are units of their own, embedding and head the root's. The recurrence calls every block many
times, so weights stay gathered (in the compute format) from a step's first call to its end, and
gradients are reduced once a step, unit by unit after the last bin. FSDP would reduce after every
call of a block, and in an order that depends on the number of bins, which differs between ranks.
Gradients are summed, not averaged: the loss is divided by the supervised tokens of all ranks.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hrmtext.config.model import ModelConfig
from hrmtext.model import HrmLM, empty_model
from hrmtext.model.init import initial_weights
from hrmtext.train.parallel.choose import Layout
from hrmtext.train.parallel.shards import Shards

Result = TypeVar("Result")


class _Root(nn.Module):
    """The module whose forward pass is a function of the model, so that FSDP's hooks enclose it."""

    def __init__(self, model: HrmLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        return function(self.model, *arguments, **named)


class ShardedModel:
    """The sharded counterpart of `train.precision.ComputeModel`, with the same interface."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        layout: Layout,
        device: torch.device,
        *,
        master_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build on meta and allocate this rank's shards; call `draw` or assign the weights next.

        Args:
            dtype: number format of forward and backward.
            master_dtype: fp32; fp64 in tests.
        """
        self.dtype = dtype
        model = empty_model(config, device="meta", dtype=master_dtype)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        mesh = _mesh(layout, device)
        policy = MixedPrecisionPolicy(
            param_dtype=dtype if dtype != master_dtype else None,
            reduce_dtype=master_dtype,
            cast_forward_inputs=False,
        )
        self._root = _Root(model)
        stacks = [model.model.H_module]
        if not config.shared_stack:
            stacks.append(model.model.L_module)
        for module in [*itertools.chain(*(stack.layers for stack in stacks)), self._root]:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self._root.to_empty(device=device)
        self.master = self.module = model
        self._units = [
            cast(FSDPModule, m) for m in self._root.modules() if isinstance(m, FSDPModule)
        ]
        for unit in self._units:
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)
        root = cast(FSDPModule, self._root)
        root.set_reshard_after_backward(False)
        with torch.no_grad():  # torch finishes its set-up, paddings included, at the first forward
            for _, buffer in model.named_buffers():
                buffer.zero_()
            self._root(lambda _: None)
        self._reshard()
        self._sharded = dict(model.named_parameters())
        parameters = {
            name: nn.Parameter(cast(DTensor, parameter).to_local().detach())
            for name, parameter in self._sharded.items()
        }
        shard_mesh = mesh if mesh.ndim == 1 else mesh["shard"]
        self.shards = Shards(
            parameters,
            shapes,
            dict(model.named_buffers()),
            num_shards=layout.shard_size,
            index=shard_mesh.get_local_rank(),
            group=shard_mesh.get_group(),
        )

    def draw(self, seed: int) -> None:
        """Set the initial weights: each is drawn whole, as on one rank, and cut."""
        for name, tensor in initial_weights(self.module, seed):
            self.shards.assign(name, tensor)

    def call(self, function: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        """`function(module, ...)` with the weights gathered."""
        return self._root(function, *arguments, **named)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a microbatch to those of this rank, in the reduction's format."""
        root = cast(FSDPModule, self._root)
        root.set_requires_gradient_sync(False)
        root.set_is_last_backward(False)
        loss.backward()

    def clear_gradients(self) -> None:
        """Set every gradient to None: a parameter that gets none must be seen to have none."""
        for parameter in (*self._sharded.values(), *self.shards.parameters.values()):
            parameter.grad = None

    def reduce(self) -> None:
        """Sum the gradients over all ranks and hand them to the optimizer's parameters."""
        root = cast(FSDPModule, self._root)
        root.set_requires_gradient_sync(True)
        root.set_is_last_backward(True)
        # At the end of a backward pass FSDP reduces what its units have not yet: everything.
        one = torch.ones((), device=next(iter(self.shards.parameters.values())).device)
        self._root(lambda _: one.requires_grad_() * 1.0).backward()
        for name, parameter in self.shards.parameters.items():
            gradient = self._sharded[name].grad
            parameter.grad = None if gradient is None else cast(DTensor, gradient).to_local()

    def refresh(self, *, frozen: bool = False) -> None:
        """Drop gathered weights, which an update has made stale; none are `frozen` here."""
        del frozen
        self._reshard()

    @contextlib.contextmanager
    def using(self, weights: Sequence[torch.Tensor] | None) -> Iterator[HrmLM]:
        """The module with other weights (shards of the averages), in the order of the parameters.

        None: with its own. On leaving, the master's weights are back bit for bit.
        """
        own = [parameter.detach() for parameter in self.shards.parameters.values()]
        kept = None if weights is None else [weight.clone() for weight in own]
        self._reshard()
        try:
            if weights is not None:
                torch._foreach_copy_(own, list(weights))
            for unit in self._units:
                unit.unshard()
            yield self.module
        finally:
            self._reshard()
            if kept is not None:
                torch._foreach_copy_(own, kept)

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()


def _mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    if layout.strategy == "fsdp":
        return init_device_mesh(device.type, (layout.shard_size,), mesh_dim_names=("shard",))
    grid = (layout.replicas, layout.shard_size)
    return init_device_mesh(device.type, grid, mesh_dim_names=("replicate", "shard"))
