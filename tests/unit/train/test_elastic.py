"""Depth-elastic training: against the recurrence written out, and the same however it is run."""

import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from memory_source import MemorySource, random_rows, small_config

from hrmtext.artifacts import read_tensors
from hrmtext.batch import PackedBatch
from hrmtext.config import preset
from hrmtext.config.train import TrainConfig, run_differences
from hrmtext.errors import ConfigError
from hrmtext.model import Depth, build_model
from hrmtext.model.flops import training_flops
from hrmtext.model.layers import rotary_tables
from hrmtext.runtime.rng import numpy_generator
from hrmtext.train import train_on
from hrmtext.train.elastic import H_cycles_at, gradient_depth, num_losses
from hrmtext.train.loss import Microbatch, forward_loss
from hrmtext.train.metrics import read_metrics
from hrmtext.train.schedule import depth_at

MODEL = preset("test")
WEIGHT, SCALE = 0.3, 0.125


def elastic_config(**changes):
    given = {"H_cycles": [1, 2], "probabilities": [0.3, 0.7], "early_loss_weight": WEIGHT}
    return small_config(elastic={**given, **changes})


def model_and_batch():
    model = build_model(MODEL, seed=3).double()
    batch = PackedBatch.from_rows(random_rows(5))
    micro = Microbatch.prepare(
        batch, device=torch.device("cpu"), dtype=torch.float64, backend="reference"
    )
    return model, micro


def by_hand(model, micro, H_cycles, bp_steps):
    """H_cycles <= 2, L_cycles=3: detached where no loss behind wants the call's gradient."""
    config = model.config
    cos, sin = rotary_tables(micro.positions, config.head_dim, config.rope_theta, torch.float64)

    def L(x):
        return model.model.L_module(x, cos, sin, micro.plan, 0)

    def H(x):
        return model.model.H_module(x, cos, sin, micro.plan, 0)

    def loss(z_H):
        logits = model.lm_head(z_H[micro.select])
        return SCALE * F.cross_entropy(logits, micro.labels, reduction="sum")

    z_H = model.model.embed_tokens(micro.tokens) * config.scale
    z_L = model.model.z_L_init.expand_as(z_H)
    # The first cycle ends in a loss: of its calls L1 L2 L3 H1 the last bp_steps carry gradient.
    for call in (1, 2, 3):
        z_L = L(z_L + z_H)
        if bp_steps < 5 - call:
            z_L = z_L.detach()
    z_H = H(z_H + z_L)
    if H_cycles == 1:
        return loss(z_H)
    early = loss(z_H)
    # Of the second cycle: H2, then (H1 from 3 steps on, and it carries gradient anyway) L6, L5, L4.
    for needed in (5, 4, 2):  # of L4, L5, L6
        z_L = L(z_L + z_H)
        if bp_steps < needed:
            z_L = z_L.detach()
    z_H = H(z_H + z_L)
    return loss(z_H) + WEIGHT * early


@pytest.mark.parametrize("H_cycles", [1, 2])
@pytest.mark.parametrize("bp_steps", [2, 3, 4, 5])
def test_loss_and_gradients_equal_the_recurrence_written_out(H_cycles, bp_steps):
    model, micro = model_and_batch()
    expected = by_hand(model, micro, H_cycles, bp_steps)
    expected.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss = forward_loss(
        model, micro, depth=gradient_depth(elastic_config(), MODEL, bp_steps, H_cycles),
        scale=SCALE, chunk_bytes=700, early_weight=WEIGHT,
    )  # fmt: skip
    loss.total.backward()
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        # 1e3 roundings of a gradient whose entries are of order one.
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-12, msg=name)


def test_the_logged_loss_is_the_last_cycles_alone():
    model, micro = model_and_batch()
    arguments = {"depth": Depth.full(MODEL), "scale": 1.0, "chunk_bytes": 1 << 20}
    plain = forward_loss(model, micro, **arguments)
    elastic = forward_loss(model, micro, **arguments, early_weight=WEIGHT)
    assert torch.equal(plain.losses, elastic.losses)
    assert torch.equal(plain.correct, elastic.correct)
    assert elastic.total > plain.total


def test_routing_at_fewer_cycles_is_that_of_a_model_of_so_many():
    plain = small_config()
    shallow = MODEL.with_changes(H_cycles=1)
    for bp_steps, there in ((2, 2), (4, 4), (5, 4), (8, 4)):
        found = gradient_depth(plain, MODEL, bp_steps, 1)
        assert found == Depth.from_bp_steps(shallow, there)
    fixed = small_config(L_bp_cycles=[1, 3])
    assert gradient_depth(fixed, MODEL, 5, 1) == Depth.from_L_bp_cycles(shallow, [3])
    assert gradient_depth(fixed, MODEL, 5, 2) == Depth.from_L_bp_cycles(MODEL, [1, 3])


def test_a_recipe_without_elastic_keys_is_as_before():
    plain = small_config()
    for step in range(20):
        depth = depth_at(step, plain, MODEL, 20)
        assert depth.H_cycles == MODEL.H_cycles
        assert 2 <= depth.num_gradient_calls <= 5
    assert num_losses(plain, depth) == 1


def test_cycles_are_drawn_with_their_probabilities_and_do_not_depend_on_the_order_of_calls():
    config = elastic_config()
    drawn = [H_cycles_at(step, config, MODEL) for step in range(4_000)]
    assert [H_cycles_at(step, config, MODEL) for step in reversed(range(4_000))] == drawn[::-1]
    share = Counter(drawn)[1] / len(drawn)
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / len(drawn)) ** 0.5)
    other = small_config(elastic={"H_cycles": [1, 2]}, seed=1)
    assert [H_cycles_at(step, other, MODEL) for step in range(4_000)] != drawn


def test_operations_follow_the_calls_that_run():
    config = elastic_config()
    shape = {"context_tokens": 12.0, "head_share": 0.5}
    shallow = MODEL.with_changes(H_cycles=1)
    one = gradient_depth(config, MODEL, 5, 1)
    alone = training_flops(shallow, Depth.full(shallow), **shape)
    assert training_flops(MODEL, one, **shape, losses=num_losses(config, one)) == alone
    both = gradient_depth(config, MODEL, 5, 2)
    assert both.num_gradient_calls == 8, "three L calls of each cycle and two H calls"
    head = 6.0 * MODEL.vocab_size * MODEL.hidden_size * 0.5
    more = training_flops(MODEL, both, **shape, losses=num_losses(config, both))
    assert more == training_flops(MODEL, Depth.full(MODEL), **shape) + head


@pytest.mark.parametrize("recomputed", ["none", "all"])
def test_an_interrupted_elastic_run_ends_with_the_same_weights(tmp_path, recomputed):
    config = elastic_config()
    config = dataclasses.replace(config, activation_checkpointing=recomputed)
    whole = train_on(config, source(), run_folder=tmp_path / "whole", progress="none")
    stopped = source(stop_after=7)
    with pytest.raises(KeyboardInterrupt):
        train_on(config, stopped, run_folder=tmp_path / "parts", progress="none")
    rest = train_on(config, source(), run_folder=tmp_path / "parts", progress="none", resume="must")
    for name in ("model.safetensors", "ema.safetensors"):
        ours, theirs = (read_tensors(run.checkpoint / name) for run in (rest, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    lines = read_metrics(whole.run_folder / "metrics.jsonl")
    assert {line["H_cycles"] for line in lines if line["kind"] == "train"} == {1, 2}


class StoppingSource(MemorySource):
    """Breaks off when step `stop_after` asks for its rows."""

    stop_after: int | None = None

    def loader(self, config, rank, world_size):
        inner = super().loader(config, rank, world_size)
        if self.stop_after is None:
            return inner
        plain = inner.__class__.__iter__

        class Stopping(inner.__class__):
            def __iter__(self):
                for index, batch in enumerate(plain(self)):
                    if index == stop_after:
                        raise KeyboardInterrupt
                    yield batch

        stop_after = self.stop_after
        inner.__class__ = Stopping
        return inner


def source(stop_after=None):
    found = StoppingSource(random_rows(60))
    found.stop_after = stop_after
    return found


def test_a_draw_is_keyed_by_seed_and_step():
    config = elastic_config()
    drawn = numpy_generator(config.seed, "H_cycles", 11).random()
    assert H_cycles_at(11, config, MODEL) == (1 if drawn < 0.3 else 2)


def test_a_checkpoint_from_before_these_keys_can_be_gone_on_with():
    from hrmtext.config.base import to_mapping

    config = small_config()
    saved = to_mapping(config)
    del saved["elastic"]
    assert run_differences(saved, config) == []
    assert "elastic" in run_differences(saved, elastic_config())[0]


@pytest.mark.parametrize(
    ("elastic", "words"),
    [
        ({"H_cycles": [1]}, "expected 2, the model's own, as its largest entry"),
        ({"H_cycles": [1, 2, 3]}, "expected 2"),
        ({"H_cycles": [2, 2]}, "different numbers"),
        ({"H_cycles": [0, 2]}, "at least 1"),
        ({"H_cycles": [1, 2], "probabilities": [0.5]}, "2 shares above 0"),
        ({"H_cycles": [1, 2], "probabilities": [0.5, 0.6]}, "sum to 1"),
        ({"probabilities": [1.0]}, "0 shares"),
        ({"early_loss_weight": -1}, "at least 0"),
        ({"early_los_weight": 1}, "perhaps you meant 'early_loss_weight'"),
    ],
)
def test_wrong_settings_are_refused(elastic, words):
    with pytest.raises(ConfigError, match=words):
        small_config(elastic=elastic)


def test_a_model_of_one_cycle_has_no_early_state():
    with pytest.raises(ConfigError, match="no earlier state"):
        small_config(
            model={"preset": "test", "architecture": "ut"}, bp_last=2,
            elastic={"early_loss_weight": 0.5},
        )  # fmt: skip
    assert TrainConfig().elastic.H_cycles == ()
