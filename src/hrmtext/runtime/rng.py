"""Random numbers keyed by (seed, purpose, step): the same whatever the order of calls or ranks."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

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


def mix64(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit words one to one (the finaliser of SplitMix64, Steele et al. 2014).

    Of distinct words it makes words that look drawn at random: a permutation of any number of rows,
    a piece at a time, the same on every machine.
    """
    z = words + np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def torch_generator(seed: int, *key: str | int, device: str = "cpu") -> torch.Generator:
    """A torch generator on `device` for (seed, *key)."""
    import torch

    return torch.Generator(device=device).manual_seed(keyed_seed(seed, *key))
