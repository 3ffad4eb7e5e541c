"""Plain texts to token ids: special tokens in them stay text, and NFC costs nothing if it may."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, normalizers

from hrmtext.errors import DataError

# Latin, Greek, Cyrillic, Hebrew, Arabic letters; punctuation, symbols; kana, Han, Hangul; emoji.
COMPOSED_RANGES = (
    "\u0000-\u02ff\u0384-\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u0482\u048a-\u052f"
    "\u05d0-\u05ea\u0621-\u064a\u0660-\u066f\u0671-\u06d5\u1e00-\u1eff\u2002-\u2027\u202a-\u2064"
    "\u2070-\u2071\u2074-\u208e\u20a0-\u20bf\u2100-\u2125\u2127-\u2129\u212c-\u218b\u2190-\u2328"
    "\u232b-\u2426\u2440-\u244a\u2460-\u2adb\u3001-\u3029\u3030-\u303f\u3041-\u3096\u30a0-\u30ff"
    "\u3105-\u312f\u4e00-\u9fef\uac00-\ud7a3\ufe0f\uff01-\uff60"
    "\U0001f300-\U0001f64f\U0001f680-\U0001f6c5\U0001f900-\U0001f978\U0001f97a-\U0001f9cb"
)
"""Characters of a regular expression's set: what `is_composed` vouches for."""
_NOT_SURELY_COMPOSED = re.compile(f"[^{COMPOSED_RANGES}]")


def is_composed(text: str) -> bool:
    """Whether NFC surely leaves the text as it is, by any version of Unicode; False: perhaps not.

    The characters of COMPOSED_RANGES are assigned, are no combining marks, and are not changed by
    NFC, alone or behind another; Unicode promises that this stays so.
    """
    return text.isascii() or _NOT_SURELY_COMPOSED.search(text) is None


class PlainTextEncoder:
    """Encodes with a tokenizer's model, but knows no added token and neither pads, cuts nor wraps.

    Nearly every text has the form of NFC already: those that `is_composed` vouches for are spared
    the pass.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Share the model of `tokenizer`, which is not changed."""
        self._normalizing = _bare(tokenizer)
        self._normalizing.normalizer = tokenizer.normalizer
        is_nfc = isinstance(tokenizer.normalizer, normalizers.NFC)
        self._sparing = _bare(tokenizer) if is_nfc else None

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """The `tokenizers` encodings of texts, in order; uses all cores for many texts.

        Raises:
            DataError: text that is not valid Unicode.
        """
        try:
            composed = [self._sparing is not None and is_composed(text) for text in texts]
            groups: dict[bool, list[str]] = {True: [], False: []}
            for is_so, text in zip(composed, texts, strict=True):
                groups[is_so].append(text)
            encoded = {
                is_so: iter(encoder.encode_batch_fast(groups[is_so], add_special_tokens=False))
                for is_so, encoder in ((True, self._sparing), (False, self._normalizing))
                if encoder is not None
            }
        except (AttributeError, TypeError, UnicodeError) as error:
            raise DataError(_describe_bad_text(texts, error)) from error
        return [next(encoded[is_so]) for is_so in composed]


def plain_text_form(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that says how plain text is encoded and nothing else, for a fingerprint."""
    fields = json.loads(tokenizer.to_str())
    fields["post_processor"] = fields["padding"] = fields["truncation"] = None
    for token in fields["added_tokens"]:
        # Published files leave some (`<think>`, `<tool_call>`) unmarked; plain text they are all.
        token["special"] = True
    return Tokenizer.from_str(json.dumps(fields))


def _bare(tokenizer: Tokenizer) -> Tokenizer:
    """The same model and way to split, no normalizer, nothing else."""
    bare = Tokenizer(tokenizer.model)
    bare.pre_tokenizer = tokenizer.pre_tokenizer
    return bare


def _describe_bad_text(texts: Sequence[str], error: Exception) -> str:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            return f"text {index} is {type(text).__name__}, expected a string"
        try:
            text.encode()
        except UnicodeEncodeError as bad:
            return f"text {index} is not valid Unicode at character {bad.start}: lone surrogate"
    return str(error)
