"""The gate behind every conversion: the target's own reader against the source, on fixed prompts.

Both sides compute in fp32 whatever the number format of their weights, which are widened one matrix
at a time. The source's logits come first and its model is gone before the target's is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hrmtext.artifacts.opening import open_stored
from hrmtext.batch import RowLayout
from hrmtext.convert.write import CastReader
from hrmtext.data.tokenizer import BEGIN, CONDITIONS, PROMPT_END, PromptTokenizer
from hrmtext.errors import CheckpointError
from hrmtext.model import HrmLM, make_plan
from hrmtext.runtime.memory import release_free_memory

PROMPTS = (
    ("direct", "What is 12 + 30?"),
    ("synth,cot", "Sort these words: pear, apple, fig."),
    ("cot", "Zähle die Buchstaben in „naïve“.\nAntworte kurz."),
)
"""Condition and text; different lengths, characters beyond ASCII, a line end."""

RESPONSE = " 42, because it is so."
"""Follows every prompt: in one row, some tokens see both ways and some only back."""

LENGTHS_WITHOUT_TOKENIZER = ((9, 4), (17, 11), (30, 0))
"""Of prompt and response."""

BUDGET = 2e-4
"""Largest difference of two fp32 runs, as a share of the largest logit.

A wrong mask or a swapped matrix gives 1e-2 and more.
"""
KL_BUDGET = 1e-6
"""Largest mean Kullback-Leibler divergence in nats; it is quadratic in the differences above."""


@dataclasses.dataclass(frozen=True)
class Logits:
    """What one side computes for the probe rows: (T, V) fp32 over all rows, on the CPU."""

    prefix: torch.Tensor
    """Under the prefix mask."""
    causal: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far the target's logits are from the source's."""

    max_difference: float
    """Largest absolute difference under the prefix mask."""
    max_difference_causal: float
    """The same with everything causal."""
    argmax_agreement: float
    """Share of positions whose most probable token is the same, under the prefix mask."""
    argmax_agreement_causal: float
    kl: float
    """Mean divergence in nats of the target's distribution, under the prefix mask."""
    kl_causal: float
    largest_logit: float
    num_positions: int


@dataclasses.dataclass(frozen=True)
class Probe:
    """One row of the comparison."""

    ids: list[int]
    num_prompt: int
    """Tokens that see each other both ways under the prefix mask."""


def probes(tokenizer: PromptTokenizer | None, vocab_size: int, longest: int) -> list[Probe]:
    """The fixed prompts and response, cut to `longest`; without a tokenizer, ids from all over."""
    if tokenizer is None:
        found = [
            ([(7 + 7919 * (position + 31 * prompt)) % vocab_size for position in range(length)],
             prompt)
            for prompt, response in LENGTHS_WITHOUT_TOKENIZER
            for length in (prompt + response,)
        ]  # fmt: skip
    else:
        prompts = [tokenizer.encode_prompt(text, condition) for condition, text in PROMPTS]
        response = tokenizer.encode_texts([RESPONSE])[0]
        found = [([*prompt, *response], len(prompt)) for prompt in prompts]
    return [Probe(ids[:longest], min(prompt, longest)) for ids, prompt in found]


def our_logits(model: HrmLM, rows: Sequence[Probe]) -> Logits:
    """Logits of our implementation, all rows and both masks in one packed pass."""
    lengths = [len(row.ids) for row in rows]
    prefixes = [row.num_prompt if model.config.prefix_lm else 0 for row in rows]
    layout = RowLayout.from_prefixes([*lengths, *lengths], [*prefixes, *[0] * len(rows)])
    device = model.lm_head.weight.device
    plan = make_plan(layout, device=device, dtype=torch.float32)
    tokens = torch.tensor([token for row in (*rows, *rows) for token in row.ids], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in (*lengths, *lengths)])
    with torch.no_grad(), computing_in_fp32(model):
        found = model(tokens, positions, plan).logits[: 2 * sum(lengths)].cpu()
    return Logits(*found.float().chunk(2))


def transformers_logits(folder: Path, rows: Sequence[Probe], dtype: torch.dtype) -> Logits:
    """Logits of transformers' own classes, loaded from `folder` in the file's number format.

    Raises:
        CheckpointError: transformers cannot load the folder.
    """
    from transformers import AutoModelForCausalLM

    with _explained(), _quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        start = width - len(row.ids)
        ids[index, start:] = torch.tensor(row.ids)
        mask[index, start:] = 1
        kinds[index, start : start + row.num_prompt] = 1
    kept = mask.bool()
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad(), computing_in_fp32(model):
        causal = model(**given).logits[kept]
        prefix = causal
        if model.config.prefix_lm:
            prefix = model(**given, token_type_ids=kinds).logits[kept]
    return Logits(prefix.float(), causal.float())


def compare(expected: Logits, found: Logits) -> Comparison:
    """Differences of two sides; nothing is judged."""
    prefix, causal = (
        _differences(a, b)
        for a, b in ((expected.prefix, found.prefix), (expected.causal, found.causal))
    )
    return Comparison(
        max_difference=prefix[0],
        max_difference_causal=causal[0],
        argmax_agreement=prefix[1],
        argmax_agreement_causal=causal[1],
        kl=prefix[2],
        kl_causal=causal[2],
        largest_logit=float(expected.prefix.abs().max()),
        num_positions=len(expected.prefix),
    )


def require_within_budget(comparison: Comparison, reader: str) -> None:
    """CheckpointError where the target computes something else than the source."""
    budget = BUDGET * comparison.largest_logit
    for kind, difference, kl in (
        ("under the prefix mask", comparison.max_difference, comparison.kl),
        ("without it", comparison.max_difference_causal, comparison.kl_causal),
    ):
        if not (difference <= budget and kl <= KL_BUDGET):
            raise CheckpointError(
                f"{reader} logits differ from the source's by {difference:.2e} {kind} (KL "
                f"{kl:.1e}), expected at most {budget:.2e} (KL {KL_BUDGET:.0e}); what was written "
                "is not kept"
            )


def require_equal_content(reader: CastReader, folder: Path) -> None:
    """Read back what was written: the same shape of model, and tensor by tensor the same bits.

    Raises:
        CheckpointError: the shape or a tensor differs, or tensors do not fit.
    """
    written = open_stored(folder)
    shapes = [config.canonical() for config in (reader.source.config, written.config)]
    # Forms that state the inverse of the scale may lose its last bit.
    if shapes[0].with_changes(embedding_scale=shapes[1].embedding_scale) != shapes[1] or (
        not math.isclose(shapes[0].scale, shapes[1].scale, rel_tol=1e-15)
    ):
        raise CheckpointError(
            f"the config read back is {shapes[1]}, the source's is {shapes[0]}; what was written "
            "is not kept"
        )
    names = reader.source.names()
    for done, name in enumerate(names, start=1):
        meant, found = reader.tensor(name), written.tensor(name)
        if meant.dtype != found.dtype or not torch.equal(_bits(meant), _bits(found)):
            raise CheckpointError(f"{name} read back differs from what was written")
        if reader.progress is not None:
            reader.progress("reading back", done, len(names))


def require_same_tokenizer(tokenizer: PromptTokenizer, folder: Path) -> None:
    """Prove that transformers' tokenizer gives our prompts and marks them as a prefix.

    Raises:
        CheckpointError: other ids, or token_type_ids that are missing or not all 1.
    """
    from transformers import AutoTokenizer

    with _explained(), _quiet():
        theirs: Any = AutoTokenizer.from_pretrained(folder)
    for condition, text in PROMPTS:
        head = BEGIN + "".join(CONDITIONS[name] for name in condition.split(","))
        encoded = theirs(head + text + PROMPT_END)
        if list(encoded["input_ids"]) != tokenizer.encode_prompt(text, condition):
            raise CheckpointError("the exported tokenizer gives other ids than ours")
        if set(encoded.get("token_type_ids") or ()) != {1}:
            raise CheckpointError("the exported tokenizer does not mark the prompt as a prefix")


@contextlib.contextmanager
def computing_in_fp32(model: nn.Module) -> Iterator[None]:
    """Widen every matrix to fp32 while it is in use: exactly the fp32 model, in little memory."""
    narrow: dict[Any, torch.Tensor] = {}

    def widen(module: Any, _: Any) -> None:
        narrow[module] = module.weight.data
        module.weight.data = module.weight.data.float()

    def restore(module: Any, _: Any, __: Any) -> None:
        module.weight.data = narrow.pop(module)

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.dtype != torch.float32:
            handles += [
                module.register_forward_pre_hook(widen),
                module.register_forward_hook(restore),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forget() -> None:
    """Give the memory of a dropped model back before the next one is loaded."""
    gc.collect()
    release_free_memory()


def _differences(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float, float]:
    """Largest absolute difference, argmax agreement, mean KL divergence."""
    agreement = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    reference, other = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = (reference.exp() * (reference - other)).sum(-1).mean()
    return float((expected - found).abs().max()), float(agreement), float(kl)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes: unlike values, equal for the same NaN and different for 0 and -0."""
    return tensor.contiguous().view(-1).view(torch.uint8)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load what was written: {error}") from error


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
