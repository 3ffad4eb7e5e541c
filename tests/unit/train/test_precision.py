"""The bf16 compute copy equals one made by hand, and the guard stops before any change."""

import copy

import pytest
import torch
from memory_source import random_rows, small_config
from test_loss import CONFIG, CPU, step_batch

from hrmtext.config.model import preset
from hrmtext.errors import ConfigError, NonFiniteError
from hrmtext.model import build_model, make_plan
from hrmtext.model.depth import Depth
from hrmtext.runtime.native import compiler
from hrmtext.train.loss import Microbatch, forward_loss
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.precision import ComputeModel
from hrmtext.train.step import TrainStep


def make_step(dtype, config=CONFIG, **changes):
    model = build_model(config, seed=0)
    compute = ComputeModel(model, dtype)
    optimizer = AdamAtan2(model.parameters(), lr=0.1, ema_decay=0.9)
    return TrainStep(compute, optimizer, small_config(**changes), CPU)


SHARED = ("model.embed_tokens.weight", "lm_head.weight")


def test_bf16_gradients_are_summed_in_fp32_over_a_hand_made_copy():
    step = make_step(torch.bfloat16)
    batch = step_batch(random_rows(10), 4)
    depth = Depth.from_bp_steps(CONFIG, 5)
    expected = {}
    for packed in batch.bins:
        by_hand = copy.deepcopy(step.compute.master).to(torch.bfloat16)
        micro = Microbatch.prepare(packed, device=CPU, dtype=torch.bfloat16)
        forward_loss(
            by_hand, micro, depth=depth, scale=1 / batch.num_supervised_tokens, chunk_bytes=1 << 20
        ).total.backward()
        for name, p in by_hand.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad.float()
    for _ in range(2):  # the second time with buffers that hold old values
        step.accumulate(batch, depth)
        for name, p in step.compute.master.named_parameters():
            assert p.grad.dtype == torch.float32
            if name in SHARED:  # the copy's are rounded to bf16
                error = (p.grad - expected[name]).abs().max()
                assert error <= 2**-7 * expected[name].abs().max(), name
                assert not torch.equal(p.grad, p.grad.bfloat16().float())
            else:
                assert torch.equal(p.grad, expected[name]), name


def test_after_a_step_the_stacks_are_the_rounded_master_and_the_rest_is_its_own():
    step = make_step(torch.bfloat16)
    before = [p.detach().clone() for p in step.compute.module.parameters()]
    step.run(step_batch(random_rows(4), 4), depth=Depth.from_bp_steps(CONFIG, 5), lr=0.1, step=0)
    master = dict(step.compute.master.named_parameters())
    named = step.compute.module.named_parameters()
    for (name, computed), old in zip(named, before, strict=True):
        assert master[name].dtype == torch.float32
        assert (computed is master[name]) == (name in SHARED)
        assert torch.equal(master[name].to(computed.dtype), computed)
        assert not torch.equal(computed, old), name


def test_at_two_backward_steps_the_master_embedding_has_no_gradient_either():
    step = make_step(torch.bfloat16)
    batch = step_batch(random_rows(4), 2)
    step.accumulate(batch, Depth.from_bp_steps(CONFIG, 3))
    assert step.compute.master.model.embed_tokens.weight.grad is not None
    step.accumulate(batch, Depth.from_bp_steps(CONFIG, 2))
    assert step.compute.master.model.embed_tokens.weight.grad is None


@pytest.mark.skipif(compiler() is None, reason="the C++ optimizer needs a compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_of_many_rows_looked_up_change_nothing_but_the_memory(dtype, monkeypatch):
    batch = step_batch(random_rows(6), 2)  # three bins
    found = {}
    for least in (1 << 22, 1):
        monkeypatch.setattr("hrmtext.train.step.SPARSE_TABLE", least)
        step = make_step(dtype, batch_tokens=8, telemetry_every=2)
        table = step.compute.master.model.embed_tokens.weight
        for index in range(4):
            result = step.run(batch, depth=Depth.from_bp_steps(CONFIG, 5), lr=0.01, step=index)
            assert table.grad.is_sparse == (least == 1)
        found[least] = [p.detach() for p in step.compute.master.parameters()], result
    (dense, expected), (sparse, result) = found.values()
    for a, b in zip(dense, sparse, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    assert result.records[0].keys() == expected.records[0].keys()
    with torch.no_grad():
        table[4] = torch.nan  # a row that is looked up
    with pytest.raises(NonFiniteError, match=r"model\.embed_tokens\.weight"):
        step.run(batch, depth=Depth.from_bp_steps(CONFIG, 5), lr=0.01, step=4)


def test_the_rounded_module_is_called_like_any_other():
    compute = make_step(torch.bfloat16).compute
    packed = step_batch(random_rows(4), 4).bins[0]
    logits = {}
    for module, dtype in ((compute.master, torch.float32), (compute.module, torch.bfloat16)):
        plan = make_plan(packed.layout, device=CPU, dtype=dtype)
        logits[dtype] = module(packed.tokens, packed.positions, plan).logits
    assert logits[torch.bfloat16].dtype == torch.float32
    error = (logits[torch.bfloat16] - logits[torch.float32]).abs().max()
    assert 0 < error < 0.02 * logits[torch.float32].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_borrowed_weights_are_used_and_the_own_come_back_bit_for_bit(dtype):
    compute = make_step(dtype).compute
    own = [p.detach().clone() for p in compute.module.parameters()]
    other = [torch.full_like(p, 0.25, dtype=torch.float32) for p in own]
    with pytest.raises(RuntimeError, match="inside"), compute.using(other) as module:
        assert all(bool((p == 0.25).all()) for p in module.parameters())
        raise RuntimeError("inside")
    for p, q in zip(compute.module.parameters(), own, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_planted_non_finite_value_stops_before_anything_changes(dtype, bad):
    step = make_step(dtype)
    batch = step_batch(random_rows(8), 4)
    step.run(batch, depth=Depth.from_bp_steps(CONFIG, 5), lr=0.01, step=0)
    with torch.no_grad():
        step.compute.module.lm_head.weight[3, 2] = bad
    optimizer = step.optimizer
    tensors = [*step.compute.master.parameters(), *optimizer.averages()]
    tensors += [s[n] for s in optimizer.state.values() for n in ("exp_avg", "exp_avg_sq")]
    before = [t.detach().clone() for t in tensors]
    counts = [s["step"] for s in optimizer.state.values()]
    with pytest.raises(NonFiniteError, match="step 7: the gradient is not finite"):
        step.run(batch, depth=Depth.from_bp_steps(CONFIG, 5), lr=0.01, step=7)
    for t, b in zip(tensors, before, strict=True):
        torch.testing.assert_close(t.detach(), b, rtol=0, atol=0, equal_nan=True)
    assert counts == [s["step"] for s in optimizer.state.values()]


def test_bf16_master_weights_are_refused():
    with pytest.raises(ConfigError, match="master weights"):
        ComputeModel(build_model(CONFIG, seed=0, dtype=torch.bfloat16), torch.bfloat16)


def test_eight_rows_are_learned_by_heart_in_fp32_and_bf16():
    rows = random_rows(8, seed=4)
    batch = step_batch(rows, 8)
    config = preset("test", num_layers_per_stack=1, L_cycles=2)
    for dtype in (torch.float32, torch.bfloat16):
        step = make_step(dtype, config)
        for index in range(90):
            lr = 0.01 if index < 70 else 0.002
            result = step.run(batch, depth=Depth.from_bp_steps(config, 5), lr=lr, step=index)
        loss, _, exact, _ = result.sums.tolist()
        assert loss / batch.num_supervised_tokens < 0.02, dtype
        assert exact == 8, dtype
