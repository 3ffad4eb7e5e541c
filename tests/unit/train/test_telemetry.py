"""Telemetry: values computed by hand on a tiny model, and a training that does not notice it."""

import pytest
import torch
from memory_source import MemorySource, random_rows, small_config

from hrmtext.artifacts import RunFolder, read_tensors
from hrmtext.batch import PackedBatch
from hrmtext.model import build_model
from hrmtext.model.depth import Depth
from hrmtext.model.layers import rms_norm, rotary_tables
from hrmtext.train import train_on
from hrmtext.train.loss import Microbatch, forward_loss
from hrmtext.train.metrics import read_metrics
from hrmtext.train.recompute import recomputing
from hrmtext.train.telemetry import CallProbe, tail_ratio

CPU = torch.device("cpu")
CALLS = ["1.L1", "1.L2", "1.L3", "1.H", "2.L1", "2.L2", "2.L3", "2.H"]


@pytest.fixture(scope="module")
def setting():
    model = build_model(small_config().model.resolve(), seed=3).double()
    packed = PackedBatch.from_rows(random_rows(6, seed=1))
    return model, Microbatch.prepare(packed, device=CPU, dtype=torch.float64)


def by_hand(model, micro, depth):
    """The recurrence written out: outputs of all calls, and outputs before their exit norm."""
    core, config = model.model, model.config
    cos, sin = rotary_tables(micro.positions, config.head_dim, config.rope_theta, torch.float64)
    z_H = core.embed_tokens(micro.tokens) * config.scale
    z_L = core.z_L_init.to(z_H).expand_as(z_H)
    outputs, residuals = [], []

    def call(stack, x, slot):
        for index, layer in enumerate(stack.layers):
            x = layer(x, cos, sin, micro.plan, slot + index)
        residuals.append(x)
        outputs.append(rms_norm(x, config.rms_norm_eps))
        return outputs[-1]

    flags = iter(depth.carries_gradient)
    for h in range(2):
        for index in range(3):
            with torch.set_grad_enabled(next(flags)):
                z_L = call(core.L_module, z_L + z_H, config.slot(h, index, 0))
        with torch.set_grad_enabled(next(flags)):
            z_H = call(core.H_module, z_H + z_L, config.slot(h, 3, 0))
    return outputs, residuals


@pytest.mark.parametrize("recomputed", ["none", "all"])
def test_every_quantity_equals_the_recurrence_written_out(setting, recomputed):
    model, micro = setting
    depth = Depth.from_bp_steps(model.config, 5)
    probe = CallProbe(model, depth)
    with probe.forward(micro, recomputing(model, recomputed)) as call_block:
        loss = forward_loss(
            model, micro, depth=depth, scale=0.1, chunk_bytes=1 << 20, call_block=call_block
        )
    loss.total.backward()
    model.zero_grad()
    found = probe.measurements()

    outputs, residuals = by_hand(model, micro, depth)
    for output in outputs:
        if output.requires_grad:
            output.retain_grad()
    logits = model.head(outputs[-1], micro.select)
    torch.nn.functional.cross_entropy(logits, micro.labels, reduction="sum").mul(0.1).backward()
    model.zero_grad()
    expected = {"gradient_norm": {}, "change": {}, "state_rms": {}, "lens_kl": {}}
    num_tokens = min(32, len(micro.select))
    chosen = micro.select[torch.arange(num_tokens) * len(micro.select) // num_tokens]
    final = model.head(outputs[-1], chosen).log_softmax(-1)
    last = {}
    for name, output, residual in zip(CALLS, outputs, residuals, strict=True):
        rows = micro.select if name == "2.H" else slice(None)
        expected["state_rms"][name] = float(residual.detach()[rows].square().mean().sqrt())
        if output.grad is not None:
            expected["gradient_norm"][name] = float(output.grad.norm())
        role = name[2]
        if role in last:
            before = last[role].detach()[rows]
            moved = (output.detach()[rows] - before).norm() / before.norm()
            expected["change"][name] = float(moved)
        last[role] = output
        kl = final.exp() * (final - model.head(output, chosen).log_softmax(-1))
        expected["lens_kl"][name] = float(kl.sum(-1).mean().detach())
    assert found.keys() == expected.keys()
    for quantity, column in expected.items():
        assert found[quantity] == pytest.approx(column, rel=1e-5, abs=1e-12), quantity
    assert list(found["gradient_norm"]) == CALLS[3:]
    assert found["lens_kl"]["2.H"] == 0


def test_the_tail_of_a_gradient_is_measured_over_its_median_without_zeros():
    values = torch.arange(1, 1001.0)
    gradient = torch.cat([values, torch.zeros(500), -values])
    assert float(tail_ratio([gradient])) == pytest.approx(1000 / 500, rel=0.01)
    heavy = torch.cat([torch.ones(990), torch.full((10,), 50.0)])
    assert float(tail_ratio([heavy])) == pytest.approx(50)
    assert float(tail_ratio([torch.zeros(4)])) != float(tail_ratio([torch.zeros(4)]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_with_and_without_it_is_the_same_bit_for_bit(tmp_path, precision):
    source = MemorySource(random_rows(60))
    runs = []
    for every in (0, 3):
        config = small_config(
            telemetry_every=every, precision=precision, max_steps=12, validate_every=0
        )
        result = train_on(config, source, run_folder=tmp_path / str(every), progress="none")
        runs.append(read_tensors(result.checkpoint / "model.safetensors"))
    assert all(torch.equal(tensor, runs[1][key]) for key, tensor in runs[0].items())
    records = read_metrics(RunFolder(tmp_path / "3").metrics_file)
    inside = [r for r in records if r["kind"] == "telemetry"]
    assert [r["step"] for r in inside] == [3, 6, 9, 12]
    last = inside[-1]
    assert list(last["lens_kl"]) == CALLS
    assert list(last["gradient_norm"]) == CALLS[3:]
    assert set(last["update_ratio"]) == set(last["module_gradient_norm"])
    assert all(value > 1 for value in last["gradient_tail"].values())
    assert not [r for r in read_metrics(RunFolder(tmp_path / "0").metrics_file)
                if r["kind"] == "telemetry"]  # fmt: skip


def test_the_update_ratio_is_what_the_weights_moved(tmp_path):
    config = small_config(
        telemetry_every=1, max_steps=2, weight_decay=0.0, checkpoint_every=1, validate_every=0,
        keep_last=5,
    )  # fmt: skip
    run = RunFolder(tmp_path / "run")
    train_on(config, MemorySource(random_rows(60)), run_folder=run.path, progress="none")
    before, after = (
        read_tensors(run.checkpoint_path(step) / "model.safetensors")["lm_head.weight"].double()
        for step in (1, 2)
    )
    record = [r for r in read_metrics(run.metrics_file) if r["kind"] == "telemetry"][-1]
    moved = float((after - before).norm() / after.norm())
    assert record["update_ratio"]["head"] == pytest.approx(moved, rel=1e-3)
