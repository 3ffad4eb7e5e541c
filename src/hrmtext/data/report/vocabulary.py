"""How a tokenizer serves a corpus: bytes a token by kind of text, entries that nobody uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import pre_tokenizers

from hrmtext.data.tokenizer import PromptTokenizer

KINDS = ("words", "digits", "marks", "spaces", "mixed", "part of a character", "special")
SHOWN = 24
"""Entries listed of the most used and of the unused."""

Counts = npt.NDArray[np.int64]


class Vocabulary:
    """Kind and size of every entry of a byte-level tokenizer. V entries, K kinds."""

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        """Read the entries; bytes are counted as the tokenizer's normaliser leaves them."""
        size = tokenizer.vocab_size
        self.texts = [tokenizer.tokenizer.id_to_token(number) or "" for number in range(size)]
        alphabet = _byte_alphabet()
        added = tokenizer.tokenizer.get_added_tokens_decoder()
        self.kinds = np.zeros(size, dtype=np.int64)
        """(V) place in `KINDS`."""
        self.num_bytes = np.zeros(size, dtype=np.int64)
        """(V) bytes of text that an entry stands for; 0 for special tokens."""
        for number, text in enumerate(self.texts):
            if number in added:
                self.kinds[number] = KINDS.index("special")
                continue
            raw = bytes(alphabet[character] for character in text if character in alphabet)
            self.num_bytes[number] = len(raw)
            self.kinds[number] = KINDS.index(_kind(raw))
            self.texts[number] = raw.decode(errors="replace")

    def by_kind(self, counts: Counts) -> Counts:
        """(2, K) tokens and bytes of each kind, of (V) uses of each entry."""
        tokens = np.bincount(self.kinds, weights=counts, minlength=len(KINDS))
        num_bytes = np.bincount(self.kinds, weights=counts * self.num_bytes, minlength=len(KINDS))
        return np.stack([tokens, num_bytes]).astype(np.int64)

    def report(self, counts: Counts) -> dict[str, Any]:
        """Entries used and not, of (V) uses of each in the whole corpus; plain values."""
        plain = self.kinds != KINDS.index("special")
        unused = np.flatnonzero(plain & (counts == 0))
        used = np.flatnonzero(plain & (counts > 0))
        top = used[np.argsort(-counts[used], kind="stable")][:SHOWN]
        # Later entries are merges of rarer pairs: unused ones among the last are no wonder.
        return {
            "entries": int(plain.sum()),
            "special": int((~plain).sum()),
            "unused": len(unused),
            "used_once": int((plain & (counts == 1)).sum()),
            "unused_bytes": int((self.num_bytes[unused] == 1).sum()),
            "first_unused": [self.texts[number] for number in unused.tolist()][:SHOWN],
            "most_used": [[self.texts[number], int(counts[number])] for number in top.tolist()],
        }


def _byte_alphabet() -> dict[str, int]:
    """Character that stands for a byte -> the byte; the table that byte-level BPE uses."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(value): value for value in visible}
    others = (value for value in range(256) if value not in visible)
    table |= {chr(256 + place): value for place, value in enumerate(others)}
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet()), "the alphabet is tokenizers'"
    return table


def _kind(raw: bytes) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "part of a character"
    core = text.strip()
    if not core:
        return "spaces"
    if core.isnumeric():
        return "digits"
    if core.replace("'", "").isalpha():
        return "words"
    return "mixed" if any(map(str.isalnum, core)) else "marks"
