"""Training rows to batches for `Trainer`: padding, the prompt's mask, labels, packing.

Letters: B rows, S columns of a padded batch, T tokens of a packed one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from hrmtext.batch import IGNORE
from hrmtext.data.example import DEFAULT_CONDITION, HISTORY
from hrmtext.data.sources.chat import CHAT_KEYS, read_conversation
from hrmtext.errors import ConfigError, DataError
from hrmtext.hf.prompts import plain_tokenizer
from hrmtext.runtime.log import warn_once

ID_PAIRS = (("instruction_ids", "response_ids"), ("prompt_ids", "completion_ids"))
NO_LIMIT = 1 << 30
"""Tokenizers that know no longest row say so by a number beyond this."""
EXPECTED = (
    "expected instruction_ids and response_ids; instruction and response (texts, with a "
    "tokenizer); or input_ids with one of prompt_length, token_type_ids, completion_mask, labels. "
    "Trainer drops columns that the model does not take: set remove_unused_columns=False"
)


@dataclasses.dataclass
class _Row:
    ids: list[int]
    prompt_length: int
    labels: list[int]


class PrefixLMCollator:
    """Batches of prompt/response rows as `HrmTextForCausalLM`, ours or transformers', takes them.

    A row is a mapping in one of these forms, and other columns of it are left alone:

    - `instruction_ids` and `response_ids` (or `prompt_ids` and `completion_ids`): token ids;
    - `instruction` and `response`, texts, and `condition` (default direct): needs a tokenizer,
      and special tokens written in the texts are plain text; `messages` of one turn as well;
    - `input_ids` and what tells the prompt's end: `prompt_length`, or `token_type_ids` (1 on the
      prompt), or `completion_mask` (0 on the prompt), or `labels` (-100 on the prompt; TRL's
      `SFTTrainer` prepares this form). An `attention_mask` with zeros takes padding out first.
      `labels` beside one of the others choose which response tokens bear loss.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        pad_token_id: int | None = None,
        padding_side: Literal["right", "left"] = "right",
        pad_to_multiple_of: int = 1,
        max_length: int | None = None,
        too_long: Literal["refuse", "cut_response"] = "refuse",
        pack_for: Any = None,
    ) -> None:
        """Say how rows become batches.

        Args:
            tokenizer: transformers' fast tokenizer, needed for rows of text only.
            pad_token_id: None: the tokenizer's, or 0. Padding is masked, so any id will do.
            pad_to_multiple_of: columns S (packed: tokens T) are rounded up to a multiple of it.
            max_length: most tokens a row; None: the tokenizer's `model_max_length`, if it has one.
            too_long: raise for a longer row, or cut the end of its response (the end token too),
                count it in `num_cut` and warn once. A prompt is never cut.
            pack_for: the model to train, one of ours: all rows then lie in one sequence without
                padding, told apart by `position_ids`; None: no packing.

        Raises:
            ConfigError: an option out of range, or packing for another class of model.
        """
        if padding_side not in ("right", "left"):
            raise ConfigError(f"padding_side is {padding_side!r}, expected 'right' or 'left'")
        if too_long not in ("refuse", "cut_response"):
            raise ConfigError(f"too_long is {too_long!r}, expected 'refuse' or 'cut_response'")
        if pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of is {pad_to_multiple_of}, expected at least 1")
        if pack_for is not None:
            _require_packing(pack_for)
        known = getattr(tokenizer, "model_max_length", NO_LIMIT)
        self.max_length = max_length or (known if known < NO_LIMIT else None)
        given = getattr(tokenizer, "pad_token_id", None) if pad_token_id is None else pad_token_id
        self.pad_token_id = given or 0
        self.tokenizer = None if tokenizer is None else plain_tokenizer(tokenizer)
        self.padding_side, self.multiple = padding_side, pad_to_multiple_of
        self.too_long, self.packs = too_long, pack_for is not None
        self.num_cut = 0
        """Responses cut so far, in this process."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of `rows`.

        Returns:
            (B, S) int64 `input_ids`, `token_type_ids` (1 on the prompt), `attention_mask` (0 on
            padding) and `labels` (-100 on prompt and padding; not shifted, the model does that).
            Packed: (1, T), with `position_ids` from 0 in every row instead of `attention_mask`.

        Raises:
            DataError: a row of no known form, without prompt or without a supervised token, with a
                label on its prompt, with several prompts, or too long.
        """
        if not rows:
            raise DataError("the batch has no rows")
        read = [self._read(index, row) for index, row in enumerate(rows)]
        return self._packed(read) if self.packs else self._padded(read)

    def _padded(self, rows: list[_Row]) -> dict[str, torch.Tensor]:
        width = self._rounded(max(len(row.ids) for row in rows))
        ids = torch.full((len(rows), width), self.pad_token_id)  # (B, S)
        types, real = torch.zeros_like(ids), torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORE)
        for index, row in enumerate(rows):
            start = width - len(row.ids) if self.padding_side == "left" else 0
            end = start + len(row.ids)
            ids[index, start:end] = torch.tensor(row.ids)
            types[index, start : start + row.prompt_length] = 1
            real[index, start:end] = 1
            labels[index, start:end] = torch.tensor(row.labels)
        return {
            "input_ids": ids,
            "token_type_ids": types,
            "attention_mask": real,
            "labels": labels,
        }

    def _packed(self, rows: list[_Row]) -> dict[str, torch.Tensor]:
        used = sum(len(row.ids) for row in rows)
        tail = self._rounded(used) - used
        lengths = [len(row.ids) for row in rows] + [tail]
        columns = {
            "input_ids": [i for row in rows for i in row.ids] + [self.pad_token_id] * tail,
            "token_type_ids": [
                int(at < row.prompt_length) for row in rows for at in range(len(row.ids))
            ]
            + [0] * tail,
            # The padding at the end is a row of its own: nobody sees it, and it bears no loss.
            "position_ids": [at for length in lengths for at in range(length)],
            "labels": [label for row in rows for label in row.labels] + [IGNORE] * tail,
        }
        return {name: torch.tensor([values]) for name, values in columns.items()}  # (1, T)

    def _rounded(self, count: int) -> int:
        return -(-count // self.multiple) * self.multiple

    def _read(self, index: int, row: Mapping[str, Any]) -> _Row:
        found = self._form(index, row)
        prompt, length = found.prompt_length, len(found.ids)
        if not 0 < prompt < length:
            raise DataError(
                f"row {index}: {prompt} prompt and {length - prompt} response tokens, expected at "
                "least one of each. Tokenizers exported by hrm-text mark all that they are given "
                "as prompt; TRL marks prompts with completion_only_loss=True"
            )
        if any(label != IGNORE for label in found.labels[:prompt]):
            raise DataError(
                f"row {index}: a label lies on the prompt, whose tokens see one another, so that "
                "it would be read off and not predicted; set the prompt's labels to -100"
            )
        if self.max_length is not None and length > self.max_length:
            self._cut(index, found, self.max_length)
        if all(label == IGNORE for label in found.labels):
            raise DataError(f"row {index}: no token bears loss, all labels are -100")
        return found

    def _cut(self, index: int, row: _Row, limit: int) -> None:
        if self.too_long == "refuse" or row.prompt_length >= limit:
            raise DataError(
                f"row {index} has {len(row.ids)} tokens, {row.prompt_length} of them prompt; at "
                f"most {limit} were allowed. Leave it out, raise max_length, or"
                + (" shorten the prompt" if row.prompt_length >= limit else "")
                + (" cut responses by too_long='cut_response'" * (row.prompt_length < limit))
            )
        self.num_cut += 1
        warn_once(
            f"a response was cut at max_length={limit} and lost its end token; the number of such "
            "rows is in PrefixLMCollator.num_cut"
        )
        del row.ids[limit:], row.labels[limit:]

    def _form(self, index: int, row: Mapping[str, Any]) -> _Row:
        for prompt_name, response_name in ID_PAIRS:
            if prompt_name in row and response_name in row:
                prompt, response = _ints(row[prompt_name]), _ints(row[response_name])
                labels = [IGNORE] * len(prompt) + response
                return _Row(prompt + response, len(prompt), labels)
        row = _single_turn(index, row)
        if "instruction" in row and "response" in row:
            if self.tokenizer is None:
                raise DataError(
                    f"row {index} is text: give the tokenizer, PrefixLMCollator(tokenizer)"
                )
            condition = row.get("condition")
            prompt = self.tokenizer.encode_prompt(
                row["instruction"], DEFAULT_CONDITION if condition is None else condition
            )
            response = self.tokenizer.encode_response(row["response"])
            return _Row(prompt + response, len(prompt), [IGNORE] * len(prompt) + response)
        if "input_ids" in row:
            return _from_ids(index, row)
        raise DataError(f"row {index} has the columns {sorted(row)}; {EXPECTED}")


def _single_turn(index: int, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A conversation of one turn as instruction and response; other rows as they are.

    Raises:
        DataError: several turns, which need one block each: token types can mark one only.
    """
    if any(row.get(key) for key in CHAT_KEYS):
        example = read_conversation(dict(row))
        if isinstance(example, str):
            raise DataError(f"row {index}: {example}")
        row = example.to_mapping()
    if row.get(HISTORY):
        raise DataError(
            f"row {index} has several turns. Each prompt is a block of its own in training, but "
            "all tokens of type 1 form one, so that the first prompt would see later answers. "
            "Train on conversations with `hrm-text train`, or split them into rows of one turn"
        )
    return row


def _from_ids(index: int, row: Mapping[str, Any]) -> _Row:
    """A tokenised row; the prompt's end is taken from the first of the forms that is there."""
    columns = {
        name: _ints(row[name])
        for name in ("input_ids", "token_type_ids", "completion_mask", "labels", "attention_mask")
        if row.get(name) is not None
    }
    length = len(columns["input_ids"])
    for name, values in columns.items():
        if len(values) != length:
            raise DataError(f"row {index}: {name} has {len(values)} entries for {length} tokens")
    real = columns.pop("attention_mask", [1] * length)
    columns = {
        name: [value for value, keep in zip(values, real, strict=True) if keep]
        for name, values in columns.items()
    }
    ids, labels = columns["input_ids"], columns.get("labels")
    if row.get("prompt_length") is not None:
        prompt_length = int(row["prompt_length"])
        is_prompt = [at < prompt_length for at in range(len(ids))]
    elif "token_type_ids" in columns:
        is_prompt = [value == 1 for value in columns["token_type_ids"]]
    elif "completion_mask" in columns:
        is_prompt = [value == 0 for value in columns["completion_mask"]]
    elif labels is not None:
        borne = [at for at, label in enumerate(labels) if label != IGNORE]
        first = borne[0] if borne else len(ids)
        if borne and borne[-1] - first >= len(borne):
            raise DataError(
                f"row {index}: its labels have a gap, as of several prompts or packed rows, and "
                "there can be one prompt; if it is one, say by prompt_length where it ends"
            )
        is_prompt = [at < first for at in range(len(ids))]
    else:
        raise DataError(f"row {index} does not say where its prompt ends; {EXPECTED}")
    prompt_length = sum(is_prompt)
    if is_prompt != [at < prompt_length for at in range(len(ids))]:
        raise DataError(
            f"row {index}: its prompt has a gap or does not open the row. transformers joins all "
            "tokens of type 1 to one block, so that a second prompt would be seen before its time"
        )
    if labels is None:
        labels = [IGNORE if prompt else token for token, prompt in zip(ids, is_prompt, strict=True)]
    return _Row(ids, prompt_length, labels)


def _ints(values: Any) -> list[int]:
    return [int(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]


def _require_packing(model: Any) -> None:
    from hrmtext.hf.attention import transformers_keeps_packed_prompts_apart
    from hrmtext.hf.modeling import HrmTextPreTrainedModel

    inner = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if isinstance(inner, HrmTextPreTrainedModel):
        return
    theirs = getattr(getattr(inner, "config", None), "model_type", None) == "hrm_text"
    if not (theirs and transformers_keeps_packed_prompts_apart()):
        raise ConfigError(
            f"pack_for is a {type(inner).__module__}.{type(inner).__name__}; only hrmtext.hf's "
            "classes keep the prompts of packed rows apart (transformers' own class does so from "
            "release 5.24 on; before, all tokens of type 1 see one another). Load the model by "
            "hrmtext.hf.HrmTextForCausalLM, or leave pack_for out"
        )
