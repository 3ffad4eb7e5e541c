"""Which part of every tensor a rank holds, and how whole tensors come from and go to the parts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as torch_dist
from torch import nn


class Shards:
    """A model's parameters as the optimizer of this rank sees them.

    Every parameter is cut along its first dimension into `num_shards` chunks of equal size (the
    last ones may be shorter, or empty), of which this rank holds number `index`. With one shard
    the parameters are whole, and no method communicates.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        shapes: Mapping[str, torch.Size],
        buffers: Mapping[str, torch.Tensor],
        *,
        num_shards: int = 1,
        index: int = 0,
        group: torch_dist.ProcessGroup | None = None,
    ) -> None:
        """`parameters` are fp32 master weights of this rank; `shapes` those of the whole ones.

        Args:
            buffers: tensors that are whole on every rank, by name.
            group: the ranks that share this copy, in the order of their chunks.
        """
        self.parameters = dict(parameters)
        self.shapes = dict(shapes)
        self.buffers = dict(buffers)
        self.num_shards, self.index, self.group = num_shards, index, group

    @classmethod
    def whole(cls, model: nn.Module) -> Shards:
        """All trained weights of a model on this rank."""
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        return cls(parameters, shapes, dict(model.named_buffers()))

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's chunk of a whole parameter: a view."""
        chunks = tensor.chunk(self.num_shards)
        return chunks[self.index] if self.index < len(chunks) else tensor[:0]

    @torch.no_grad()
    def assign(self, name: str, tensor: torch.Tensor) -> None:
        """Set a parameter or buffer from the whole tensor; only this rank's chunk is kept."""
        if name in self.buffers:
            self.buffers[name].copy_(tensor)
        else:
            self.parameters[name].copy_(self.part(tensor))

    def sum_over_shards(self, values: torch.Tensor) -> torch.Tensor:
        """Sum numbers taken of this rank's chunks over the ranks that hold the others, in place.

        Where parameters and gradients are whole on each rank, nothing happens.
        """
        if self.num_shards > 1:
            torch_dist.all_reduce(values, group=self.group)
        return values

    def gather(
        self, name: str, part: torch.Tensor, group: torch_dist.ProcessGroup | None = None
    ) -> torch.Tensor | None:
        """The whole tensor of `name` from all parts, on the first rank of the copy; else None.

        Args:
            part: this rank's chunk, of whatever belongs to that parameter.
            group: another group of the same ranks, for communication of its own.
        """
        if self.num_shards == 1 or name in self.buffers:
            return part if self.index == 0 else None
        group = self.group if group is None else group
        assert group is not None, "shards without a group"
        shape = self.shapes[name]
        rows = -(-shape[0] // self.num_shards)
        padded = part.new_zeros(rows, *shape[1:])
        padded[: len(part)] = part
        pieces = [torch.empty_like(padded) for _ in range(self.num_shards if not self.index else 0)]
        first = torch_dist.get_global_rank(group, 0)
        torch_dist.gather(padded, pieces if not self.index else None, dst=first, group=group)
        return torch.cat(pieces)[: shape[0]] if pieces else None
