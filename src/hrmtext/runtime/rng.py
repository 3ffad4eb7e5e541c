"""Random numbers keyed by (seed, purpose, step): the same whatever the order of calls or ranks."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def keyed_seed(seed: int, *key: str | int) -> int:
    """A 63-bit seed that depends on `seed` and every part of `key`, and on nothing else."""
    text = "\x1f".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in key)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(seed: int, *key: str | int) -> np.random.Generator:
    """A counter-based numpy generator for (seed, *key)."""
    return np.random.Generator(np.random.Philox(keyed_seed(seed, *key)))


def torch_generator(seed: int, *key: str | int, device: str = "cpu") -> torch.Generator:
    """A torch generator on `device` for (seed, *key)."""
    import torch

    return torch.Generator(device=device).manual_seed(keyed_seed(seed, *key))
