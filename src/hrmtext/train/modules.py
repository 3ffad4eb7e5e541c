"""Parameters by module (embedding, head, attention and MLP of every layer), and norms over them.

Letters: P parameters, M modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from hrmtext.train.optim import AdamAtan2, local

_LAYER = re.compile(r"model\.([HL])_module\.layers\.(\d+)\.(attn|mlp)\.")
_PARTS = {"attn": "attention", "mlp": "mlp"}


def module_of(parameter_name: str) -> str:
    """`H.3.attention`, `L.0.mlp`, `embedding`, `head`; any other parameter is its own module."""
    layer = _LAYER.match(parameter_name)
    if layer is not None:
        stack, index, part = layer.groups()
        return f"{stack}.{index}.{_PARTS[part]}"
    known = {"model.embed_tokens.": "embedding", "lm_head.": "head"}
    return next((name for part, name in known.items() if parameter_name.startswith(part)),
                parameter_name)  # fmt: skip


class Modules:
    """The parameters of a model, whole or this rank's parts of them, grouped by module."""

    def __init__(
        self,
        named: Mapping[str, torch.nn.Parameter],
        sum_over_shards: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> None:
        """`sum_over_shards` adds up what ranks found on their parts; whole ones need nothing."""
        self.parameters = list(named.values())
        self.sum_over_shards = sum_over_shards
        self.names = list(dict.fromkeys(module_of(name) for name in named))
        self._index = [self.names.index(module_of(name)) for name in named]
        pairs = list(zip(self.parameters, self._index, strict=True))
        self._members = [[p for p, of in pairs if of == m] for m in range(len(self.names))]

    def members(self, module: int) -> list[torch.nn.Parameter]:
        """The parameters of a module, by its index."""
        return self._members[module]

    def sums(self, by_parameter: Sequence[float]) -> npt.NDArray[np.float64]:
        """(P) values added up by module: (M)."""
        sums = [0.0] * len(self.names)
        for module, value in zip(self._index, by_parameter, strict=True):
            sums[module] += value
        return np.array(sums)

    @torch.no_grad()
    def gradient_squares(self, optimizer: AdamAtan2) -> torch.Tensor:
        """(P) fp64 on the device: squared L2 norm of every gradient, over all shards; 0 where None.

        The gradients are summed over ranks already.
        """
        gradients = [p.grad for p in self.parameters]
        found = [local(gradient) for gradient in gradients if gradient is not None]
        if len(found) == len(gradients):
            return self.sum_over_shards(optimizer.squares(found))
        device = self.parameters[0].device
        squares = torch.zeros(len(gradients), dtype=torch.float64, device=device)
        if found:
            present = [index for index, gradient in enumerate(gradients) if gradient is not None]
            where = torch.tensor(present).to(device, non_blocking=True)
            squares.index_copy_(0, where, optimizer.squares(found))
        return self.sum_over_shards(squares)

    @torch.no_grad()
    def update_squares(self, optimizer: AdamAtan2, module: int) -> torch.Tensor:
        """(2) fp64 on the device: squared norms of a module's last update at lr 1 and its weights.

        Of this rank's shards only. Weight decay is not counted as update.
        """
        return optimizer.update_squares(self.members(module))
