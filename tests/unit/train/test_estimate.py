"""The estimate: equal to what can be counted, near to what can be measured."""

import itertools

import pytest
import torch
from memory_source import MemorySource, random_rows, small_config

from hrmtext.config.base import load
from hrmtext.config.model import preset
from hrmtext.config.train import TrainConfig
from hrmtext.model import build_model
from hrmtext.model.depth import Depth
from hrmtext.train.estimate import activation_bytes, estimate, format_bytes
from hrmtext.train.loss import Microbatch
from hrmtext.train.probe import PROBE_BATCHES, measure_speed, random_batch
from hrmtext.train.step import TrainStep

CPU = torch.device("cpu")


def test_the_published_run_costs_its_published_operations():
    config = load(TrainConfig, None, ["max_steps=305000"])
    found = estimate(config, device=CPU, num_devices=16)
    assert found.stored_parameters == 1_182_793_728
    assert found.total_tokens == pytest.approx(60e9, rel=0.01)
    assert found.total_flops == pytest.approx(1.0e21, rel=0.05)
    assert found.memory.weights == 4 * found.stored_parameters
    assert found.seconds is None
    assert "--measure" in found.text()


def test_steps_come_from_the_data_and_speed_from_a_probe():
    config = small_config(epochs=3)
    source = MemorySource(random_rows(20))
    found = estimate(config, source=source, device=CPU, measure=True)
    assert found.total_steps == 9
    assert found.tokens_per_s > 0
    # The depth warmup makes the mean step cheaper than the deepest one.
    assert 0 < found.seconds < 9 * 256 / found.tokens_per_s
    for part in ("preset: test", "measured here", "steps:", "memory:", "time:"):
        assert part in found.text()
    assert estimate(config, device=CPU).total_steps is None


@pytest.mark.parametrize("name", ["micro", "mini"])
def test_activation_memory_is_what_autograd_saves(name):
    model_config = preset(name)
    config = small_config(model={"preset": name}, batch_tokens=2048)
    depth = Depth.from_bp_steps(model_config, 5)
    model = build_model(model_config, seed=0)
    packed = random_batch(config, model_config).bins[0]
    micro = Microbatch.prepare(packed, device=CPU, dtype=torch.float32)
    known = [*model.parameters(), *(g.mask for g in micro.plan.groups if g.mask is not None)]
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.model(micro.tokens, micro.positions, micro.plan, depth)
    assert states[-1].requires_grad
    measured = sum(saved.values()) / len(micro.tokens)
    assert activation_bytes(model_config, depth, torch.float32) == pytest.approx(measured, rel=0.1)


def test_the_probe_batch_is_valid_full_and_fits_padding():
    config = small_config(batch_tokens=512, bin_tokens=128, pad_bins=True)
    batch = random_batch(config, config.model.resolve())
    assert [b.layout.num_tokens for b in batch.bins] == [128] * 4
    for packed in batch.bins:
        packed.validate(config.model.vocab_size)
    assert batch.num_supervised_tokens == sum(len(b.supervised()) for b in batch.bins) > 0


def test_the_probe_trains_on_the_first_batches_of_the_data_in_turn(monkeypatch):
    config = small_config(batch_tokens=128)
    source = MemorySource(random_rows(20))
    seen, honest = [], TrainStep.run

    def run(self, batch, **named):
        seen.append(batch.bins[0].tokens.tolist())
        return honest(self, batch, **named)

    monkeypatch.setattr(TrainStep, "run", run)
    measure_speed(config, config.model.resolve(), CPU, source)
    batches = itertools.islice(source.loader(config, 0, 1), PROBE_BATCHES)
    expected = [batch.bins[0].tokens.tolist() for batch in batches]
    assert len(seen) > PROBE_BATCHES and expected[0] != expected[1]
    assert seen[: PROBE_BATCHES + 1] == [*expected, expected[0]]


def test_sizes_read_well():
    assert [format_bytes(x) for x in (512, 3.2 * 2**20, 28.13 * 2**30, 5000 * 2**30)] == [
        "512 B", "3.2 MiB", "28.1 GiB", "5,000.0 GiB",
    ]  # fmt: skip


def test_frozen_weights_have_no_moments_no_average_and_no_gradient():
    everything = estimate(load(TrainConfig, None, ["precision=bf16"]), device=CPU)
    adapters = estimate(load(TrainConfig, None, ["precision=bf16", "lora={rank: 8}"]), device=CPU)
    # By hand at XL: A is 8 x in for each part, B is out x 8: q, k, v, gate, o, then gate, up, down.
    layer = 8 * (5 * (1536 + 1536) + 3 * (1536 + 4096))
    assert adapters.trained_parameters == 32 * layer
    assert adapters.stored_parameters == everything.stored_parameters
    memory, stored = adapters.memory, everything.stored_parameters
    ends = 65_536 * 1536  # numbers of the embedding, and of the head
    assert (memory.optimizer, memory.ema, memory.gradients) == (
        8 * 32 * layer, 4 * 32 * layer, 4 * 32 * layer,
    )  # fmt: skip
    assert memory.weights == 4 * (stored + 32 * layer)
    assert memory.compute_copy == 2 * (stored - 2 * ends) + 4 * 32 * layer  # of the stacks alone
    saved = everything.memory.total - memory.total
    assert saved > (8 + 4 + 4) * 0.99 * stored  # moments, average, gradients
    assert adapters.flops_per_token < everything.flops_per_token
    assert "in adapters (0.7" in adapters.text() and "adapters" not in everything.text()
