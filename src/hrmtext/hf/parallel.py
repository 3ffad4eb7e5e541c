"""Tensor parallelism of the fused projections, in the terms of transformers."""

from __future__ import annotations

from typing import Any

PACKED_OF_4 = "packed_colwise_of_4"
"""Style of gqkv_proj: its four parts are cut alike, so that a rank holds whole heads of each."""


def register_parallel_styles() -> None:
    """Make transformers know PACKED_OF_4; nothing where torch has no distributed package."""
    import torch.distributed

    if not torch.distributed.is_available():
        return
    from transformers.distributed import tensor_parallel

    style: Any = tensor_parallel.PackedColwiseParallel(split_factor=4)
    tensor_parallel.ALL_PARALLEL_STYLES.register(PACKED_OF_4, style)
