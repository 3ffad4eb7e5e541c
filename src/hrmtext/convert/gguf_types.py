"""Which number format each tensor of a GGUF file gets, and the quantising itself, by ggml.

The mixtures are those of llama.cpp's file types: a base format, the head in 6 bits or more, and for
some a finer one for values and down projections of some blocks, which hurt most when coarse.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from hrmtext.artifacts.gguf_file import PLAIN, TYPES
from hrmtext.errors import BackendError
from hrmtext.generate.llama_cpp_library import library

VALUES, DOWN, OUTPUT = "attn_v", "ffn_down", "attn_output"
ALL, SOME = "all", "some"
"""Blocks that a finer format is for: all of them; or the first and last eighth and every third."""


@dataclasses.dataclass(frozen=True)
class FileType:
    """A mixture of number formats."""

    number: int
    """llama.cpp's number of it."""
    base: str
    """Number format of most tensors."""
    head: str | None = None
    """Of the output head; None: as `base`."""
    finer: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """Part of a block -> a number format and the blocks, `all` or `some`."""


FILE_TYPES: dict[str, FileType] = {
    "f32": FileType(0, "f32"),
    "f16": FileType(1, "f16"),
    "bf16": FileType(32, "bf16"),
    "q8_0": FileType(7, "q8_0"),
    "q6_k": FileType(18, "q6_k"),
    "q5_k_m": FileType(17, "q5_k", "q6_k", {VALUES: ("q6_k", SOME), DOWN: ("q6_k", SOME)}),
    "q5_k_s": FileType(16, "q5_k", "q6_k"),
    "q5_0": FileType(8, "q5_0", "q6_k"),
    "q5_1": FileType(9, "q5_1", "q6_k"),
    "q4_k_m": FileType(15, "q4_k", "q6_k", {VALUES: ("q6_k", SOME), DOWN: ("q6_k", SOME)}),
    "q4_k_s": FileType(14, "q4_k", "q6_k"),
    "q4_0": FileType(2, "q4_0", "q6_k"),
    "q4_1": FileType(3, "q4_1", "q6_k"),
    "q3_k_l": FileType(
        13, "q3_k", "q6_k", {VALUES: ("q5_k", ALL), DOWN: ("q5_k", ALL), OUTPUT: ("q5_k", ALL)}
    ),
    "q3_k_m": FileType(
        12, "q3_k", "q6_k", {VALUES: ("q4_k", ALL), DOWN: ("q4_k", ALL), OUTPUT: ("q4_k", ALL)}
    ),
    "q3_k_s": FileType(11, "q3_k", "q6_k"),
    "q2_k": FileType(
        10, "q2_k", "q6_k", {VALUES: ("q3_k", ALL), DOWN: ("q3_k", ALL), OUTPUT: ("q3_k", ALL)}
    ),
}
"""File types by the names that llama.cpp's tools use."""

# Where a row is no multiple of 256: formats with blocks of 32 and at least as many bits.
_SMALL_BLOCKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def kind_of(name: str, shape: tuple[int, ...], file_type: str, num_blocks: int) -> str:
    """Number format of a tensor: the mixture's, or the next that its row length allows.

    Args:
        name: its GGUF name. num_blocks: blocks of the file, both stacks together.
    """
    mixture = FILE_TYPES[file_type]
    if len(shape) == 1:
        return "f32"
    kind = mixture.base
    if name == "output.weight":
        kind = mixture.head or kind
    block = _BLOCK.fullmatch(name)
    if block is not None and block[2] in mixture.finer:
        finer, which = mixture.finer[block[2]]
        if which == ALL or _gets_more_bits(int(block[1]), num_blocks):
            kind = finer
    if shape[-1] % TYPES[kind].block_values:
        kind = _SMALL_BLOCKS.get(kind, kind)
    return kind if shape[-1] % TYPES[kind].block_values == 0 else "f16"


def encode(tensor: torch.Tensor, kind: str) -> np.ndarray:
    """A tensor's bytes in a number format: (bytes) uint8.

    Raises:
        BackendError: a quantised format, and llama.cpp is not installed.
    """
    if kind in PLAIN:
        return tensor.to(PLAIN[kind]).contiguous().view(-1).view(torch.uint8).numpy()
    values = tensor.float().contiguous()
    width = values.shape[-1]
    num_rows = values.numel() // width
    row_bytes = width // TYPES[kind].block_values * TYPES[kind].block_bytes
    out = np.empty(num_rows * row_bytes, np.uint8)
    lib = library()
    source = ctypes.cast(values.data_ptr(), ctypes.POINTER(ctypes.c_float))

    def quantise(first: int, count: int) -> int:
        return lib.ggml_quantize_chunk(
            TYPES[kind].number, source, out.ctypes.data, first * width, count, width, None
        )

    threads = max(1, min(torch.get_num_threads(), num_rows))
    step = -(-num_rows // threads)
    parts = [(first, min(step, num_rows - first)) for first in range(0, num_rows, step)]
    with ThreadPoolExecutor(threads) as pool:  # ctypes lets other threads run meanwhile
        written = sum(pool.map(lambda part: quantise(*part), parts))
    if written != len(out):
        raise BackendError(f"ggml wrote {written} bytes of {kind}, expected {len(out)}")
    return out


def _gets_more_bits(block: int, num_blocks: int) -> bool:
    eighth = num_blocks // 8
    return block < eighth or block >= 7 * num_blocks // 8 or (block - eighth) % 3 == 2
