"""Our transformers classes give what transformers' own `hrm_text` gives."""

from __future__ import annotations

import warnings

import pytest
import torch
from hf_helpers import cached_logits, loaded_class, our_class
from parity_helpers import padded, random_case

NUM_CASES = 50
SIDES = ("left", "right")
BACKENDS = ("sdpa", "eager", "prefix_varlen", "flex_attention")
BUDGET = 1e-4
"""Largest difference of fp32 logits, which are of order 1."""
CLEAR_MARGIN = 0.05
"""The two best fp32 logits of a token lie at least this far apart: bf16 must agree on the best."""


def run(model, batch, backend, **kwargs):
    """(B, S, V) logits; flex runs uncompiled, as torch's CPU compiler fails on a second shape."""
    model.set_attn_implementation(backend)
    stance = "force_eager" if backend == "flex_attention" else "default"
    with torch.compiler.set_stance(stance), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*flex_attention called without.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # inside torch
        return model(**batch, **kwargs, use_cache=False).logits


@pytest.mark.parametrize("index", range(NUM_CASES))
@torch.no_grad()
def test_logits_equal_transformers_on_every_path(index, tmp_path):
    """50 random shapes and batches x both padding sides x all backends, and x cached.

    The weights come from files of both layouts, which load to the same bits.
    """
    case = random_case(1_000 + index)
    ours, other = (
        loaded_class(case, tmp_path / layout, layout)
        for layout in (("fused", "split"), ("split", "fused"))[index % 2]
    )
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    batches, expected = [], []
    for side in SIDES:
        batch = padded(case.rows, case.prefixes, side)
        real = batch["attention_mask"].bool()
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        theirs = case.theirs(**batch, use_cache=False).logits
        assert float(theirs[real].std()) > 0.01
        for backend in BACKENDS:
            if backend != "flex_attention":
                worst = float((run(ours, batch, backend) - theirs)[real].abs().max())
                assert worst < BUDGET, f"{backend}, {side}: {worst}"
        batches.append(batch)
        expected.append(theirs)
    # Uncompiled flex costs the same for any number of rows: both sides in one pass.
    batch = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
    found, real = run(ours, batch, "flex_attention"), batch["attention_mask"].bool()
    worst = float((found - torch.cat(expected))[real].abs().max())
    assert worst < BUDGET, f"flex_attention: {worst}"
    # In left-padded batches of equal prompts and answers the cache serves every row.
    prompt, answer = 6, 5
    rows = [(row * 11)[: prompt + answer - index % 3 * number] for number, row in
            enumerate(case.rows[:3])]  # fmt: skip
    batch = padded(rows, [len(row) - answer for row in rows], "left")
    columns = batch["input_ids"].shape[1] - answer
    real = batch["attention_mask"].bool()
    theirs = cached_logits(case.theirs, batch, columns)[real]
    for backend in ("sdpa", "eager", "prefix_varlen"):
        ours.set_attn_implementation(backend)
        found = cached_logits(ours, batch, columns)[real]
        assert float((found - theirs).abs().max()) < BUDGET, backend


@torch.no_grad()
def test_bf16_agrees_on_the_best_token_where_fp32_is_clear():
    agreed = clear = 0
    for index in range(NUM_CASES):
        case = random_case(1_000 + index)
        batch = padded(case.rows, case.prefixes, SIDES[index % 2])
        real = batch["attention_mask"].bool()
        wide = case.theirs(**batch, use_cache=False).logits[real]
        best = wide.topk(2).values
        sure = (best[:, 0] - best[:, 1]) > CLEAR_MARGIN * wide.std()
        narrow = our_class(case).bfloat16()
        found = run(narrow, batch, BACKENDS[index % 3])[real]
        agreed += int((found.argmax(-1) == wide.argmax(-1))[sure].sum())
        clear += int(sure.sum())
    assert clear > 1_000
    assert agreed / clear >= 0.995, f"{agreed} of {clear}"


@pytest.mark.parametrize("index", range(0, NUM_CASES, 2))
def test_loss_and_gradients_equal_transformers_under_L_bp_cycles(index):
    case = random_case(1_000 + index)
    ours = our_class(case, BACKENDS[index // 2 % 3])
    batch = padded(case.rows, case.prefixes, SIDES[index // 2 % 2])
    real = batch["attention_mask"] == 1
    # The last row is never all prompt; a row's first token follows padding or nothing.
    batch["token_type_ids"][-1] = 0
    opens = real & (batch["attention_mask"].cumsum(1) == 1)
    hidden = ~real | opens | (batch["token_type_ids"] == 1)
    labels = batch["input_ids"].masked_fill(hidden, -100)
    for model in (ours, case.theirs):
        model.train()
    expected = case.theirs(**batch, labels=labels, use_cache=False).loss
    found = ours(**batch, labels=labels, use_cache=False).loss
    assert float((found - expected).detach().abs()) < 1e-5
    expected.backward()
    found.backward()
    wanted = gradients_of(case.theirs)
    for name, weight in ours.named_parameters():
        if weight.grad is None:
            assert float(wanted[name].abs().max()) == 0.0, f"{name} has no gradient here"
            continue
        scale = float(wanted[name].abs().max())
        worst = float((weight.grad - wanted[name]).abs().max())
        assert worst <= 1e-4 * scale + 1e-7, f"{name}: {worst} at scale {scale}"


def gradients_of(model):
    """Gradients of transformers' parameters by our fused names; zeros where there are none."""
    from hrmtext.artifacts.hf_folder import to_fused

    state = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in model.named_parameters()
    }
    return to_fused(state)
