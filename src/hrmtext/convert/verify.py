"""The check behind every export: transformers' logits against ours, on fixed prompts, in fp32."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hrmtext.batch import RowLayout
from hrmtext.data.tokenizer import BEGIN, CONDITIONS, PROMPT_END
from hrmtext.errors import CheckpointError
from hrmtext.generate.runner import TextModel
from hrmtext.model import make_plan

PROMPTS = (
    ("direct", "What is 12 + 30?"),
    ("synth,cot", "Sort these words: pear, apple, fig."),
    ("cot", "Zähle die Buchstaben in „naïve“.\nAntworte kurz."),
)
"""Condition and text; different lengths, characters beyond ASCII, a line end."""

BUDGET = 2e-4
"""Largest difference of two fp32 runs, as a share of the largest logit.

A wrong mask or a swapped matrix gives 1e-2 and more.
"""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far transformers' logits are from ours."""

    max_difference: float
    """Largest absolute difference under the prefix mask (token_type_ids from the tokenizer)."""
    max_difference_causal: float
    """The same without token_type_ids: everything causal."""
    argmax_agreement: float
    """Share of positions whose most probable token is the same, under the prefix mask."""
    largest_logit: float
    num_positions: int


@torch.inference_mode()
def compare_with_transformers(ours: TextModel, folder: Path) -> Comparison:
    """Compare `ours` (fp32) with what transformers loads from `folder`.

    Raises:
        CheckpointError: transformers cannot load the folder, its tokenizer gives other ids or no
            prefix mask, or the logits differ beyond the budget.
    """
    model, tokenizer = _load_with_transformers(folder)
    differences, causal_differences, agreements, largest = [], [], [], 0.0
    for condition, text in PROMPTS:
        ids = ours.tokenizer.encode_prompt(text, condition)
        encoded = _encode(tokenizer, condition, text)
        if encoded["input_ids"][0].tolist() != ids:
            raise CheckpointError("the exported tokenizer gives other ids than ours")
        if encoded.get("token_type_ids") is None or not bool(
            (encoded["token_type_ids"] == 1).all()
        ):
            raise CheckpointError("the exported tokenizer does not mark the prompt as a prefix")
        theirs = model(**encoded).logits[0]
        expected = ours.logits(text, condition=condition)
        differences.append(float((theirs - expected).abs().max()))
        agreements.append((theirs.argmax(-1) == expected.argmax(-1)).float())
        largest = max(largest, float(expected.abs().max()))
        causal = model(input_ids=encoded["input_ids"]).logits[0]
        causal_differences.append(float((causal - _causal_logits(ours, ids)).abs().max()))
    agreement = torch.cat(agreements)
    result = Comparison(
        max_difference=max(differences),
        max_difference_causal=max(causal_differences),
        argmax_agreement=float(agreement.mean()),
        largest_logit=largest,
        num_positions=len(agreement),
    )
    for kind, found in (
        ("under the prefix mask", result.max_difference),
        ("without it", result.max_difference_causal),
    ):
        if not found <= BUDGET * largest:
            raise CheckpointError(
                f"transformers' logits differ from ours by {found:.2e} {kind}, expected at most "
                f"{BUDGET * largest:.2e}; the export was not kept"
            )
    return result


def _load_with_transformers(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load the export: {error}") from error
    return model.eval(), tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _encode(tokenizer: Any, condition: str, text: str) -> dict[str, torch.Tensor]:
    head = BEGIN + "".join(CONDITIONS[name] for name in condition.split(","))
    return dict(tokenizer(head + text + PROMPT_END, return_tensors="pt"))


def _causal_logits(ours: TextModel, ids: list[int]) -> torch.Tensor:
    layout = RowLayout.from_prefixes([len(ids)], [0])
    plan = make_plan(layout, device=ours.device, dtype=ours.dtype)
    tokens = torch.tensor(ids, device=ours.device)
    return ours.model(tokens, torch.arange(len(ids), device=ours.device), plan).logits
