"""The tokenizer: training, prompts and responses as ids, the form exported to transformers."""

from __future__ import annotations

import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from hrmtext.data.encoder import PlainTextEncoder, plain_text_form
from hrmtext.data.example import DEFAULT_CONDITION, Turn
from hrmtext.errors import DataError
from hrmtext.runtime.io import fingerprint, write_json, write_text
from hrmtext.runtime.log import logger

if TYPE_CHECKING:
    from hrmtext.batch import TokenTurn

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|PAD|>", "<|direct|>", "<|cot|>", "<|noisy|>", "<|synth|>", "<|endoftext|>",
    "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
"""Special tokens in the order of their ids, 0 to 30."""

CONDITIONS: dict[str, str] = {
    "direct": "<|object_ref_start|>",
    "cot": "<|object_ref_end|>",
    "noisy": "<|quad_start|>",
    "synth": "<|quad_end|>",
}
"""Condition name -> the special token that stands for it in a prompt."""

BEGIN, PROMPT_END, END, PAD = "<|im_start|>", "<|im_end|>", "<|box_end|>", "<|endoftext|>"

NUM_BYTES = 256
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + NUM_BYTES
"""Special tokens and one token for each byte: any text can be encoded."""

# Qwen's split pattern: contractions, words with one leading mark, single digits, marks, line
# ends, spaces.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


def condition_names(condition: str) -> list[str]:
    """The names in a comma list, in the given order; empty: none.

    Raises:
        DataError: an unknown name, with the nearest match.
    """
    if not condition.strip():
        return []
    names = [name.strip() for name in condition.split(",")]
    for name in names:
        if name not in CONDITIONS:
            from hrmtext.config.base import nearest  # workers start sooner without it

            raise DataError(f"unknown condition {name!r}{nearest(name, list(CONDITIONS))}")
    return names


def prompt_text(instruction: str, condition: str = DEFAULT_CONDITION) -> str:
    """The prompt written out, for tokenizers that read special tokens in a text.

    `instruction` must hold none; `PromptTokenizer.encode_prompt` takes any text.
    """
    head = "".join(CONDITIONS[name] for name in condition_names(condition))
    return BEGIN + head + instruction + PROMPT_END


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, allow_fewer: bool = False
) -> Tokenizer:
    """Train a byte-level BPE tokenizer with `vocab_size` entries.

    NFC, Qwen's split pattern with single digits, no prefix space; the special tokens hold the
    first ids and all 256 bytes are in the alphabet.

    Args:
        allow_fewer: take as many entries as the texts give, and log how many those are.

    Raises:
        DataError: `vocab_size` below 287, or the texts are too few to fill it.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size is {vocab_size}, expected at least {MIN_VOCAB_SIZE}: "
            f"{len(SPECIAL_TOKENS)} special tokens and {NUM_BYTES} bytes"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        fewer = f"the texts give {reached} vocabulary entries, {vocab_size} were asked for"
        if not allow_fewer:
            raise DataError(f"{fewer}; lower vocab_size to at most {reached} or give more text")
        logger.warning("%s: the tokenizer has %d", fewer, reached)
    return tokenizer


class PromptTokenizer:
    """Instructions and responses to token ids and back.

    Text is always plain: a special token written inside an instruction or a response is encoded
    letter by letter, so no user can end the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, *, known_fingerprint: str | None = None) -> None:
        """Wrap `tokenizer`; DataError if it lacks a token that prompts are built from.

        Args:
            known_fingerprint: as computed before for this very tokenizer; None: when asked for.
        """
        self._fingerprint = known_fingerprint
        self.tokenizer = tokenizer
        self._encoder = PlainTextEncoder(tokenizer)
        self._conditions = {name: self._id(token) for name, token in CONDITIONS.items()}
        self.bos_id = self._id(BEGIN)
        self.prompt_end_id = self._id(PROMPT_END)
        self.eos_id = self._id(END)
        self.pad_id = self._id(PAD)

    @classmethod
    def load(cls, path: str | Path, *, known_fingerprint: str | None = None) -> PromptTokenizer:
        """Read a tokenizer.json, or a folder that holds one.

        Args:
            known_fingerprint: see `__init__`.

        Raises:
            DataError: no such file, not a tokenizer, or one without the special tokens.
        """
        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"no tokenizer at {path}; expected {TOKENIZER_FILE} or its folder")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises a bare Exception for whatever is wrong
            raise DataError(f"{file} is not a tokenizers file: {error}") from error
        try:
            return cls(tokenizer, known_fingerprint=known_fingerprint)
        except DataError as error:
            raise DataError(f"{file}: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers reads, atomically."""
        folder = Path(folder)
        write_text(folder / TOKENIZER_FILE, self.tokenizer.to_str(pretty=True))
        write_json(folder / TOKENIZER_CONFIG_FILE, _tokenizer_config())

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, special tokens included; not padded."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def fingerprint(self) -> str:
        """16 hex digits; equal exactly where the same text gives the same ids."""
        if self._fingerprint is not None:
            return self._fingerprint
        text = plain_text_form(self.tokenizer).to_str()
        self._fingerprint = fingerprint(text, self._conditions)
        return self._fingerprint

    def parse_condition(self, condition: str) -> list[int]:
        """Token ids of a comma list of condition names, in the given order; empty: none.

        Raises:
            DataError: an unknown name, with the nearest match.
        """
        return [self._conditions[name] for name in condition_names(condition)]

    def encode_prompt(self, instruction: str, condition: str = DEFAULT_CONDITION) -> list[int]:
        """`<|im_start|>`, condition tokens, the text, `<|im_end|>`."""
        return self.encode_prompts([instruction], condition)[0]

    def encode_prompts(
        self, instructions: Sequence[str], conditions: str | Sequence[str] = DEFAULT_CONDITION
    ) -> list[list[int]]:
        """Prompts of many instructions; `conditions` is one for all or one each.

        Raises:
            DataError: an unknown condition, or text that is not valid Unicode.
        """
        if isinstance(conditions, str):
            conditions = [conditions] * len(instructions)
        if len(conditions) != len(instructions):
            raise DataError(f"{len(instructions)} instructions but {len(conditions)} conditions")
        heads = {c: [self.bos_id, *self.parse_condition(c)] for c in set(conditions)}
        texts = self.encode_texts(instructions)
        return [
            [*heads[condition], *text, self.prompt_end_id]
            for condition, text in zip(conditions, texts, strict=True)
        ]

    def encode_response(self, text: str) -> list[int]:
        """The text, `<|box_end|>`."""
        return self.encode_responses([text])[0]

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Responses of many texts; DataError for text that is not valid Unicode."""
        return [[*text, self.eos_id] for text in self.encode_texts(texts)]

    def encode_rows(
        self, conditions: Sequence[str], instructions: Sequence[str], responses: Sequence[str]
    ) -> tuple[array.array[int], list[int]]:
        """Many rows end to end: prompt, response, prompt, response, ...; and the length of each.

        What `encode_prompts` and `encode_responses` give, faster.

        Returns:
            Token ids as unsigned 32-bit values, and 2 lengths a row.

        Raises:
            DataError: an unknown condition, or text that is not valid Unicode.
        """
        heads = {
            c: array.array("I", [self.bos_id, *self.parse_condition(c)]) for c in set(conditions)
        }
        encodings = self._encoder.encode([*instructions, *responses])
        count = len(instructions)
        tokens = array.array("I")
        lengths: list[int] = []
        at = 0
        for condition, prompt, response in zip(
            conditions, encodings[:count], encodings[count:], strict=True
        ):
            # Text by text, so that the Python integers of one are let go before the next.
            tokens += heads[condition]
            tokens += array.array("I", prompt.ids)
            tokens.append(self.prompt_end_id)
            middle = len(tokens)
            tokens += array.array("I", response.ids)
            tokens.append(self.eos_id)
            lengths += (middle - at, len(tokens) - middle)
            at = len(tokens)
        return tokens, lengths

    def encode_turns(
        self, turns: Sequence[Turn], condition: str = DEFAULT_CONDITION
    ) -> list[TokenTurn]:
        """The turns of one conversation, each as a prompt with `condition` and a response."""
        from hrmtext.batch import TokenTurn  # torch comes with it; tokenising rows does without

        prompts = self.encode_prompts([turn.instruction for turn in turns], condition)
        responses = self.encode_responses([turn.response for turn in turns])
        return [
            TokenTurn(prompt, response, turn.train)
            for prompt, response, turn in zip(prompts, responses, turns, strict=True)
        ]

    def encode_question(
        self, history: Sequence[Turn], instruction: str, condition: str = DEFAULT_CONDITION
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """A conversation that waits for an answer: its ids, and (start, end) of its prompts."""
        ids: list[int] = []
        blocks = []
        for prompt, response, _ in self.encode_turns(history, condition):
            blocks.append((len(ids), len(ids) + len(prompt)))
            ids += [*prompt, *response]
        prompt = self.encode_prompt(instruction, condition)
        blocks.append((len(ids), len(ids) + len(prompt)))
        return ids + prompt, blocks

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts, without any special token; uses all cores for many texts."""
        return [encoding.ids for encoding in self._encoder.encode(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out, and nothing else is."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def decode_batch(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of many sequences."""
        return self.tokenizer.decode_batch([list(s) for s in sequences], skip_special_tokens=True)

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise DataError(
                f"the tokenizer has no token {token!r}; HRM-Text prompts need it. "
                "Train one with `hrm-text data tokenizer`, or use a released one"
            )
        return found


def export_tokenizer(tokenizer: PromptTokenizer, folder: str | Path, model_max_length: int) -> None:
    """Write the form for plain transformers users, in which the tokenizer carries the mask.

    Calling the loaded tokenizer on a hand-written prompt gives `token_type_ids` = 1 for the whole
    text (0 on padding, which is on the left), so that `HrmTextForCausalLM` applies the prefix mask.
    Unlike `PromptTokenizer`, this form reads special tokens typed in the text as special tokens.
    `apply_chat_template` renders conversations; its variable `condition` defaults to direct.

    Args:
        model_max_length: longest row of the model, in tokens.
    """
    folder = Path(folder)
    exported = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    exported.no_padding()
    exported.no_truncation()
    exported.post_processor = TemplateProcessing(single="$A:1", pair="$A:1 $B:0")
    write_text(folder / TOKENIZER_FILE, exported.to_str(pretty=True))
    write_text(folder / CHAT_TEMPLATE_FILE, chat_template())
    config = _tokenizer_config() | {
        "model_max_length": model_max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "padding_side": "left",
    }
    write_json(folder / TOKENIZER_CONFIG_FILE, config)


def chat_template() -> str:
    """Jinja template: user turns as prompts, assistant turns as responses.

    A system message is put in front of the next user turn, with a blank line between. The
    variable `condition` is a comma list of condition names, applied to every user turn.
    """
    tokens = ", ".join(f"'{name}': '{token}'" for name, token in CONDITIONS.items())
    return "".join(
        [
            "{%- set tokens = {" + tokens + "} -%}",
            "{%- set state = namespace(system='', head='') -%}",
            "{%- for part in (condition if condition is defined else 'direct').split(',') -%}",
            "{%- set name = part | trim -%}",
            "{%- if name in tokens -%}{%- set state.head = state.head + tokens[name] -%}",
            "{%- elif name or loop.length > 1 -%}",
            "{{- raise_exception('unknown condition ' + name + '; known: ' + "
            "tokens.keys() | join(', ')) -}}",
            "{%- endif -%}{%- endfor -%}",
            "{%- for message in messages -%}",
            "{%- if message.role == 'system' -%}",
            "{%- set state.system = message.content + '\\n\\n' -%}",
            "{%- elif message.role == 'user' -%}",
            "{{- '" + BEGIN + "' + state.head + state.system + message.content + '" + PROMPT_END,
            "' -}}{%- set state.system = '' -%}",
            "{%- elif message.role == 'assistant' -%}",
            "{{- message.content + '" + END + "' -}}",
            "{%- else -%}",
            "{{- raise_exception('unknown role ' + message.role + "
            "'; known: system, user, assistant') -}}",
            "{%- endif -%}{%- endfor -%}",
        ]
    )


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
