"""The check behind every GGUF file: llama.cpp's logits against ours, under the prefix mask.

Two questions are kept apart. Does llama.cpp compute from the file what the file says? Our model is
run on the tensors read back from it, in fp32; the difference is arithmetic alone and has a budget.
And what did rounding the weights cost? Our model on the source's tensors answers; that is reported.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hrmtext.artifacts.gguf_file import PLAIN, TYPES, GgufFile, open_gguf, shape_values
from hrmtext.artifacts.names import tensor_names
from hrmtext.artifacts.stored import StoredModel
from hrmtext.config.model import ModelConfig
from hrmtext.convert.verify import PROMPTS, computing_in_fp32, forget
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.errors import CheckpointError
from hrmtext.generate.llama_cpp import LlamaCppModel
from hrmtext.generate.reference import Distance, reference_logits
from hrmtext.model import HrmLM, empty_model

RESPONSE = "The answer is 42.\nB"
"""Decoded behind every prompt, token by token, so that the causal part is checked too."""

MAX_KL = 1e-4
"""Nats; of an fp32 file, whose argmax must agree everywhere as well."""
RELATIVE_BUDGET = {"f32": 1e-3, "f16": 0.02, "bf16": 0.06}
"""Most that logits may differ, as root mean square over that of the logits, by number format.

llama.cpp rounds what it multiplies to the weights' format: measured 1e-6, 0.1 %, 1 % of small
models. A wrong mask, scale or gate gives 20 % and more.
"""
QUANTISED_BUDGET = 0.15
"""Of quantised formats: llama.cpp rounds activations to 8 bits; measured up to 4 %."""

WEIGHT_BUDGET = 0.6
"""Of a quantised tensor's rounding error, as a share of its norm; 2 bits give 0.4, a swap 1.4."""
ROWS_AT_ONCE = 4_096
QUANTISED = frozenset(TYPES) - frozenset(PLAIN)


@dataclasses.dataclass(frozen=True)
class GgufComparison:
    """How llama.cpp's logits compare with ours."""

    against_file: Distance
    """With our model run on the tensors that the file holds: llama.cpp's arithmetic."""
    against_source: Distance
    """With our model run on the source's tensors: what rounding the weights costs, too."""
    num_positions: int


class TensorSource(Protocol):
    """A model read tensor by tensor."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor by `HrmLM`'s name."""
        ...


def compare_with_llama_cpp(
    source: TensorSource, tokenizer: PromptTokenizer, path: Path, file_type: str
) -> GgufComparison:
    """Run the file in llama.cpp and compare logits on fixed prompts and a fixed response.

    Raises:
        CheckpointError: llama.cpp reads other tokens, or its logits are over the budget.
        BackendError: llama.cpp is not installed, or refuses the file.
    """
    stored = open_gguf(path)
    if header_numbers(stored.config) != header_numbers(source.config):
        raise CheckpointError("the file's header does not state the model's shape; it was not kept")
    rows = [
        (tokenizer.encode_prompt(text, condition), tokenizer.encode_texts([RESPONSE])[0])
        for condition, text in PROMPTS
    ]
    rows = [row for row in rows if len(row[0]) + len(row[1]) <= source.config.max_seq_len]
    if not rows:
        raise CheckpointError(
            f"max_seq_len {source.config.max_seq_len} is too short for the prompts of the check; "
            "convert with verify off"
        )
    # One model in memory at a time: the file's, then the source's, then llama.cpp's.
    model, same = _read_back(source, stored, path)
    with computing_in_fp32(model):
        from_file = reference_logits(model, rows)
        causal = reference_logits(model, rows, prefix=False)
    del model
    forget()
    from_source = from_file
    if not same:
        model = _model_of(source.config, {n: source.tensor(n) for n in tensor_names(source.config)})
        with computing_in_fp32(model):
            from_source = reference_logits(model, rows)
        del model
        forget()
    with LlamaCppModel(path, cache="f32") as model:
        for _, text in PROMPTS:
            if model.tokenise(text) != tokenizer.encode_texts([text])[0]:
                raise CheckpointError(
                    f"llama.cpp splits {text!r} into other tokens than this tokenizer; the file "
                    "was not kept"
                )
        found = torch.cat([model.logits(prompt, response) for prompt, response in rows])
    result = GgufComparison(
        against_file=Distance.between(from_file, found),
        against_source=Distance.between(from_source, found),
        num_positions=len(found),
    )
    _require_budget(result, file_type)
    if Distance.between(causal, found).relative < result.against_file.relative:
        raise CheckpointError(
            "llama.cpp's logits are nearer to those of a causal mask than to those of the prefix "
            "mask; the file was not kept"
        )
    return result


def header_numbers(config: ModelConfig) -> dict[str, Any]:
    """What a header says of a shape, at the precision that it has."""
    values = shape_values(config)
    return {
        key: float(np.float32(value)) if isinstance(value, float) else value
        for key, value in values.items()
    }


def _read_back(source: TensorSource, stored: StoredModel, path: Path) -> tuple[HrmLM, bool]:
    """The file's model, and whether its tensors are the source's own, bit for bit.

    Raises:
        CheckpointError: one is not what its number format makes of the source's.
    """
    kinds = GgufFile(path).kinds
    rounded = torch.bfloat16 if "bf16" in kinds else torch.float16
    state = {}
    same = True
    for name in tensor_names(source.config):
        expected, found = source.tensor(name), stored.tensor(name)
        equal, error = _rounding(expected, found)
        same &= equal
        # Equal values are held in the narrower format: fp32 files of bf16 models are large.
        state[name] = expected if equal and expected.itemsize < found.itemsize else found
        if equal:
            continue
        if found.dtype == torch.float32 and not QUANTISED.isdisjoint(kinds):
            sound = error < WEIGHT_BUDGET
        else:
            sound = found.dtype == rounded and torch.equal(found, expected.to(rounded))
        if not sound:
            raise CheckpointError(f"{name} read back is not what was written; it was not kept")
    return _model_of(source.config, state), same


def _rounding(expected: torch.Tensor, found: torch.Tensor) -> tuple[bool, float]:
    """Whether two tensors hold the same values, and their distance as a share of the norm."""
    equal, off, total = True, 0.0, 0.0
    # Row blocks: the widened embedding alone would be half a gigabyte, several times over.
    for a, b in zip(expected.split(ROWS_AT_ONCE), found.split(ROWS_AT_ONCE), strict=True):
        a, b = a.float(), b.float()
        equal &= torch.equal(a, b)
        off += float((b - a).square().sum(dtype=torch.float64))
        total += float(a.square().sum(dtype=torch.float64))
    return equal, (off / total) ** 0.5 if total else float(off > 0)


def _model_of(config: ModelConfig, state: dict[str, torch.Tensor]) -> HrmLM:
    """The model of these tensors, each in its own number format."""
    model = empty_model(config, device="meta", dtype=torch.float32)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _require_budget(result: GgufComparison, file_type: str) -> None:
    found = result.against_file
    budget = RELATIVE_BUDGET.get(file_type, QUANTISED_BUDGET)
    problems = []
    if not found.relative <= budget:  # not-a-number is over every budget
        problems.append(f"they differ by {found.relative:.2%} (budget {budget:.2%})")
    if file_type == "f32" and not found.kl < MAX_KL:
        problems.append(f"divergence {found.kl:.1e} nats (budget {MAX_KL:.0e})")
    if file_type == "f32" and found.argmax_agreement < 1:
        problems.append(f"same most probable token at {found.argmax_agreement:.1%} only")
    if problems:
        raise CheckpointError(
            f"llama.cpp's logits are not ours under the prefix mask: {'; '.join(problems)}; the "
            "file was not kept"
        )
