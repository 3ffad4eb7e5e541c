"""Our model against transformers' own hrm_text, on the same random weights."""

import pytest
import torch
from parity_helpers import (
    NUM_CASES,
    in_fp64,
    packed_logits,
    padded,
    random_case,
    their_logits,
    training_batch,
    twin_of,
)

from hrmtext.artifacts.hf_folder import to_fused
from hrmtext.batch import RowLayout
from hrmtext.config import preset
from hrmtext.model import Depth, KVCache, build_model, make_plan

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("index", range(NUM_CASES))
def test_logits_agree_within_a_budget_from_fp64(index):
    case = random_case(index)
    assert case.ours.model.z_L_init.abs().max() > 0
    with torch.no_grad():
        ours = packed_logits(case.ours, case.rows, case.prefixes)
        theirs = their_logits(case.theirs, case.rows, case.prefixes)
        exact = packed_logits(in_fp64(case.ours), case.rows, case.prefixes, backend="reference")
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4
    our_error = (ours - exact).abs().max()
    their_error = (theirs - exact).abs().max()
    floor = 8 * EPS * exact.abs().max()
    assert our_error <= 4 * max(their_error, floor)
    assert their_error <= 100 * floor, "the fp64 run is not the same function"


@pytest.mark.parametrize("index", range(NUM_CASES))
def test_loss_and_every_gradient_agree_under_L_bp_cycles(index):
    case = random_case(index)
    packed, batch = training_batch(case)
    depth = Depth.from_L_bp_cycles(case.config, case.L_bp_cycles)
    if index % 8 == 0:  # transformers' default, stated by leaving the list out
        case.theirs = twin_of(case.ours)
        depth = Depth.from_L_bp_cycles(case.config, [min(2, case.config.L_cycles)])

    def loss_of(model):
        plan = make_plan(packed.layout, dtype=model.lm_head.weight.dtype)
        select = packed.supervised()
        out = model(packed.tokens, packed.positions, plan, depth=depth, select=select)
        return torch.nn.functional.cross_entropy(out.logits, packed.labels[select])

    ours, theirs = loss_of(case.ours), case.theirs(**batch).loss
    wide = in_fp64(case.ours)
    exact = loss_of(wide)
    for loss in (ours, theirs, exact):
        loss.backward()
    assert abs(ours - theirs) <= 1e-5
    our_grads = {n: p.grad for n, p in case.ours.named_parameters()}
    wide_grads = {n: p.grad for n, p in wide.named_parameters()}
    their_grads = to_fused(
        {n: p.grad for n, p in case.theirs.named_parameters() if p.grad is not None}
    )
    # Without any L call that carries gradient, the L stack has none on either side.
    assert {n for n, grad in our_grads.items() if grad is not None} == set(their_grads)
    assert any("L_module" in name for name in their_grads) == any(case.L_bp_cycles)
    for name in their_grads:
        grad = our_grads[name]
        true = wide_grads[name]
        floor = 64 * EPS * true.abs().max()
        their_error = (their_grads[name] - true).abs().max()
        assert (grad - true).abs().max() <= 4 * max(their_error, floor), name
        assert their_error <= 1e-4 * max(1.0, float(true.abs().max())), name


@pytest.mark.parametrize("index", [0, 1, 4, 9, 14, 22])
def test_greedy_generation_is_identical_token_for_token(index):
    case = random_case(index)
    prompts, num_tokens = [row[:20] for row in case.rows], 24
    batch = padded(prompts, [len(p) for p in prompts], side="left")
    generated = case.theirs.generate(
        **batch, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    theirs = generated[:, batch["input_ids"].shape[1] :].tolist()
    assert cached_greedy(case.ours, prompts, num_tokens) == theirs


@pytest.mark.parametrize("index", [0, 3, 7, 10, 17, 23])
def test_cached_decoding_equals_one_uncached_pass(index):
    case = random_case(index)
    model = in_fp64(case.ours)
    rows = [row + row[::-1] for row in case.rows]
    prefixes = [len(row) for row in case.rows]
    num_tokens = min(prefixes)
    with torch.no_grad():
        plain = [
            packed_logits(model, [row[: p + num_tokens]], [p], backend="reference")
            for row, p in zip(rows, prefixes, strict=True)
        ]
        cache = KVCache(model.config, len(rows), 64, dtype=torch.float64)
        layout = RowLayout.from_prefixes(prefixes, prefixes)
        plan = cache.prefill(layout, make_plan(layout, dtype=torch.float64))
        tokens = torch.tensor([t for row, p in zip(rows, prefixes, strict=True) for t in row[:p]])
        positions = torch.cat([torch.arange(p) for p in prefixes])
        ends = torch.tensor(prefixes).cumsum(0) - 1
        cached = [model(tokens, positions, plan, select=ends).logits]
        plan.commit()
        for step in range(num_tokens):
            decode = cache.decode()
            tokens = torch.tensor([row[p + step] for row, p in zip(rows, prefixes, strict=True)])
            cached.append(model(tokens, decode.positions, decode).logits)
            decode.commit()
    for r, prefix in enumerate(prefixes):
        for step in range(num_tokens + 1):
            torch.testing.assert_close(
                cached[step][r], plain[r][prefix - 1 + step], rtol=1e-10, atol=1e-10
            )


def test_the_causal_form_agrees_too():
    config = preset("test", prefix_lm=False)
    model = build_model(config, seed=5)
    rows = [[3, 9, 4, 33, 12], [7, 7, 8]]
    with torch.no_grad():
        ours = packed_logits(model, rows, [0, 0])
        theirs = their_logits(twin_of(model), rows, [0, 0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@torch.no_grad()
def cached_greedy(model, prompts, num_tokens):
    """Greedy tokens through the KV cache, straight from model/."""
    lengths = [len(p) for p in prompts]
    cache = KVCache(model.config, len(prompts), max(lengths) + num_tokens)
    layout = RowLayout.from_prefixes(lengths, lengths)
    plan = cache.prefill(layout, make_plan(layout))
    tokens = torch.tensor([t for p in prompts for t in p])
    positions = torch.cat([torch.arange(n) for n in lengths])
    logits = model(tokens, positions, plan, select=torch.tensor(lengths).cumsum(0) - 1).logits
    plan.commit()
    steps = [logits.argmax(-1)]
    while len(steps) < num_tokens:
        decode = cache.decode()
        steps.append(model(steps[-1], decode.positions, decode).logits.argmax(-1))
        decode.commit()
    return torch.stack(steps, 1).tolist()
