"""The stability guard: silent on a healthy run, acts on planted spikes, resumes exactly."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from memory_source import MemorySource, random_rows, small_config

from hrmtext.artifacts import RunFolder, read_tensors
from hrmtext.config.stability import StabilityLimits
from hrmtext.errors import CheckpointError, ConfigError, NonFiniteError
from hrmtext.model import build_model
from hrmtext.model.depth import Depth
from hrmtext.runtime.rng import numpy_generator
from hrmtext.train import train_on
from hrmtext.train.history import History
from hrmtext.train.metrics import read_metrics
from hrmtext.train.modules import Modules, module_of
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.stability import Observation, StabilityGuard
from hrmtext.train.step import TrainStep

NAMES = ["embedding", "H.0.mlp", "head"]
DEPTH = Depth(2, 3, (False,) * 3 + (True,) * 5)
SHALLOW = Depth(2, 3, (False,) * 6 + (True,) * 2)


def seen(loss=2.0, norms=(1.0, 2.0, 0.5), tokens=1000):
    return Observation(loss=loss, supervised_tokens=tokens, gradient_norms=np.array(norms))


def noisy(count, seed=0):
    """Losses and norms that fall slowly and vary as those of a small run do."""
    generator = numpy_generator(seed, "noise")
    for step in range(count):
        spread = np.exp(0.3 * generator.standard_normal(3))
        level = 2.0 * math.exp(-step / 300)
        yield seen(level + 0.1 * generator.standard_normal(), np.array([1, 2, 0.5]) * spread)


def trained_guard(steps=80, **limits):
    guard = StabilityGuard(StabilityLimits(**limits), NAMES, applied=True)
    for step, one in enumerate(noisy(steps)):
        guard.note_update(step % 3, 0.04, 1.0)
        assert guard.decide(one, lr=1e-3, depth=DEPTH).record is None
    return guard


def test_a_history_has_the_medians_of_its_newest_known_values():
    generator = numpy_generator(0, "history")
    values = generator.standard_normal((50, 4))
    values[:40, 1] = np.nan  # known of late
    values[::3, 2] = np.nan
    values[:, 3] = np.nan
    history = History(16)
    for count, row in enumerate(values, 1):
        history.append(row)
        newest = values[max(0, count - 16) : count]
        assert np.array_equal(history.rows(), newest, equal_nan=True)
        found, known = history.statistics(8), np.isfinite(newest).sum(0) >= 8
        if not known.any():
            assert found is None
            continue
        median = np.nanmedian(newest[:, known], axis=0)
        spread = 1.4826 * np.nanmedian(np.abs(newest[:, known] - median), axis=0)
        for ours, expected in zip(found, (median, spread), strict=True):
            assert np.array_equal(ours[known], expected)
            assert np.isnan(ours[~known]).all()


@pytest.mark.parametrize("at_least", [2, 8])
def test_floors_are_below_the_medians_of_this_row_and_some_more(at_least):
    generator = numpy_generator(1, "floors")
    values = np.cumsum(generator.standard_normal((300, 4)), axis=0)  # medians move
    values[150:, 0] -= 100.0
    values[::2, 1] = np.nan
    values[:200, 2] = np.nan
    values[100:, 3] = np.nan
    history, near = History(16), 0
    for count, row in enumerate(values):
        floors, statistics = history.floors(at_least), history.statistics(at_least)
        assert (floors is None) == (count == 0)
        if floors is not None and statistics is not None:
            known = ~np.isnan(statistics[0])
            assert (floors[known] <= statistics[0][known]).all()
            near += int((floors[known] > -np.inf).sum())
        history.append(row)
    assert near > 300


@pytest.mark.parametrize("applied", [True, False])
def test_steps_that_are_plainly_usual_are_decided_as_by_the_medians(monkeypatch, applied):
    """The short way changes no decision, whatever comes: spikes, gaps, depths, rates."""
    kinds = []

    def decisions(*, with_short_way):
        guard = StabilityGuard(StabilityLimits(), NAMES, applied=applied)
        honest = StabilityGuard._is_usual

        def is_usual(self, *arguments):
            return with_short_way and bool(kinds.append(honest(self, *arguments)) or kinds[-1])

        monkeypatch.setattr(StabilityGuard, "_is_usual", is_usual)
        generator, found = numpy_generator(3, "faults"), []
        for step, one in enumerate(noisy(3_000, seed=5)):
            fault = generator.random()
            size, loss = 1.0, one.loss
            if fault < 0.01:
                size = math.exp(2 + 5 * generator.random())
            elif fault < 0.02:
                loss += 2 * generator.random()
            norms = one.gradient_norms * np.where(generator.random(3) < 0.5, size, 1.0)
            if 1_000 <= step < 1_015 or 2_000 <= step < 2_200:
                loss += 0.6  # stays: a brake
            if 500 <= step < 700:
                norms[0] = 0.0  # a module without gradient
            factor = 8.0 if 1_500 <= step < 1_530 else 1.0
            guard.note_update(step % 3, (0.2 * factor) ** 2, 1.0)
            depth = SHALLOW if step % 400 < 100 else DEPTH
            lr = 0.0 if step == 900 else 1e-3 * min(1.0, (step + 1) / 100)
            decision = guard.decide(seen(loss, norms, tokens=500 + step % 600), lr=lr, depth=depth)
            found.append(decision)
        monkeypatch.undo()
        return found

    short, long = decisions(with_short_way=True), decisions(with_short_way=False)
    assert short == long
    assert sum(kinds) > 1_000, "most steps take the short way"
    acted = {decision.record["action"] for decision in short if decision.record}
    assert {"skip", "damp", "brake"} <= acted


def test_noise_warmup_and_a_change_of_depth_are_no_outliers():
    guard = StabilityGuard(StabilityLimits(), NAMES, applied=True)
    for step, one in enumerate(noisy(600)):
        guard.note_update(step % 3, 0.05 * math.exp(-step / 500), 1.0)
        depth = SHALLOW if step < 200 else DEPTH
        norms = one.gradient_norms * (30.0 if step >= 200 else 1.0)
        one = seen(one.loss, norms)
        lr = 1e-3 * min(1.0, (step + 1) / 100)
        assert guard.decide(one, lr=lr, depth=depth).record is None
    assert guard.totals == {"skip": 0, "damp": 0, "brake": 0}


def test_a_step_far_outside_is_left_out_for_its_gradient_or_its_loss():
    guard = trained_guard()
    decision = guard.decide(seen(norms=(1e4, 2e4, 5e3)), lr=1e-3, depth=DEPTH)
    assert decision.skip
    assert "gradient" in decision.record["reason"]
    decision = guard.decide(seen(loss=7.0), lr=1e-3, depth=DEPTH)
    assert decision.skip
    assert "loss 7.000" in decision.record["reason"]
    assert guard.totals == {"skip": 2, "damp": 0, "brake": 0}
    assert guard.decide(seen(loss=1.6), lr=1e-3, depth=DEPTH).record is None


def test_one_module_is_damped_to_its_bound_and_the_others_are_left_alone():
    guard = trained_guard()
    decision = guard.decide(seen(loss=1.6, norms=(60.0, 2.0, 0.5)), lr=1e-3, depth=DEPTH)
    assert not decision.skip
    assert decision.damp.keys() == {0}
    assert decision.record["damped"].keys() == {"embedding"}
    assert 30 * 0.8 < 60 * decision.damp[0] < 30 * 1.25  # 30 times the median, which is about 1


def test_a_small_batch_has_wider_bounds():
    for tokens, is_damped in ((1000, True), (2, False)):
        guard = trained_guard()
        one = seen(loss=1.6, norms=(60.0, 2.0, 0.5), tokens=tokens)
        assert bool(guard.decide(one, lr=1e-3, depth=DEPTH).damp) == is_damped


def test_updates_ten_times_as_large_are_braked_to_their_median_until_they_are_usual():
    guard = trained_guard()
    rates = []
    for one in noisy(20, seed=1):
        decision = guard.decide(seen(1.6, one.gradient_norms), lr=1e-2, depth=DEPTH)
        rates.append(decision.rate)
    assert rates == pytest.approx([0.1] * 20)
    assert guard.decide(seen(1.6), lr=1e-3, depth=DEPTH).rate == 1.0
    for one in noisy(40, seed=2):  # a rate that stays is taken for what it is
        last = guard.decide(seen(1.6, one.gradient_norms), lr=1e-2, depth=DEPTH)
    assert last.rate == 1.0


def test_a_jump_of_the_rate_is_seen_while_a_schedule_lets_it_fall():
    guard = StabilityGuard(StabilityLimits(), NAMES, applied=True)
    for step, one in enumerate(noisy(90)):
        guard.note_update(step % 3, 0.04, 1.0)
        factor = 10.0 if step >= 80 else 1.0
        lr = 1e-3 * math.exp(-step / 60)  # the median of the window is 1.7 times as high
        rate = guard.decide(one, lr=lr * factor, depth=DEPTH).rate
        assert (rate == 1.0) if step < 80 else (0.08 < rate < 0.2)


def test_a_lasting_rise_of_the_loss_brakes_and_the_rate_comes_back():
    guard = trained_guard()
    rates = [guard.decide(seen(loss=2.3), lr=1e-3, depth=DEPTH).rate for _ in range(9)]
    assert rates[:2] == [1.0, 1.0]
    assert 0.5 in rates
    assert 0.25 in rates
    back = [guard.decide(seen(loss=1.5), lr=1e-3, depth=DEPTH).rate for _ in range(30)]
    assert back[-1] == 1.0
    assert sorted(back) == back


def test_a_lasting_change_of_the_data_is_accepted_in_the_end():
    guard = trained_guard()
    skips = [guard.decide(seen(loss=9.0), lr=1e-3, depth=DEPTH).skip for _ in range(60)]
    assert skips[:9] == [True] * 8 + [False]
    assert not any(skips[-10:])


def test_log_only_finds_the_same_and_does_nothing():
    guard = StabilityGuard(StabilityLimits(), NAMES, applied=False)
    for one in noisy(80):
        guard.decide(one, lr=1e-3, depth=DEPTH)
    decision = guard.decide(seen(loss=9.0), lr=1e-3, depth=DEPTH)
    assert (decision.skip, decision.damp, decision.rate) == (False, {}, 1.0)
    assert decision.record["action"] == "skip"
    assert not decision.record["applied"]


def test_the_state_goes_through_json_and_goes_on_exactly():
    one, two = trained_guard(), StabilityGuard(StabilityLimits(), NAMES, applied=True)
    two.restore(json.loads(json.dumps(one.state())))
    spikes = [seen(loss=9.0), seen(norms=(99.0, 1, 1)), *[seen(loss=2.4)] * 9, *noisy(30, seed=3)]
    for spike in spikes:
        a, b = (guard.decide(spike, lr=5e-3, depth=DEPTH) for guard in (one, two))
        assert a == b
    assert one.state() == two.state()
    assert one.totals["skip"]
    assert one.totals["brake"]
    with pytest.raises(CheckpointError, match="3 modules"):
        StabilityGuard(StabilityLimits(), ["head"], applied=True).restore(one.state())


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"history_steps": 3}, "from 8 to window_steps=64"), ({"damp_factor": 0.5}, "above 1"),
     ({"skip_factor": 2.0}, "at least damp_factor")],
)  # fmt: skip
def test_limits_that_make_no_sense_are_refused(limits, message):
    with pytest.raises(ConfigError, match=message):
        small_config(stability_limits=limits)


def test_a_bare_off_in_yaml_is_off():
    values = yaml.safe_load("stability: off")
    assert small_config(**values).stability == "off"


def test_norms_are_those_of_every_module_computed_plainly():
    model = build_model(small_config().model.resolve(), seed=0)
    optimizer = AdamAtan2(model.parameters(), lr=1e-2)
    modules = Modules(dict(model.named_parameters()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if name.startswith("lm_head"):
                parameter.grad = None
        squares = modules.sums(modules.gradient_squares(optimizer).tolist())
        optimizer.step()
    for index, name in enumerate(modules.names):
        own = {n: p for n, p in model.named_parameters() if module_of(n) == name}
        grads = [p.grad.double().square().sum() for p in own.values() if p.grad is not None]
        assert squares[index] == pytest.approx(float(sum(grads)), rel=1e-6)
        update, weights = modules.update_squares(optimizer, index).tolist()
        assert weights == pytest.approx(
            sum(float(p.detach().double().square().sum()) for p in own.values())
        )
        # p' = p (1 - lr wd) - lr * direction
        moved = sum(
            (((1 - 1e-3) * before[n].double() - p.detach().double()) / 1e-2).square().sum()
            for n, p in own.items() if name != "head"
        )  # fmt: skip
        assert update == pytest.approx(float(moved), rel=1e-4)
    assert set(modules.names) >= {"embedding", "head", "H.1.attention", "L.0.mlp"}


LONG = {
    "model": {"preset": "test", "num_layers_per_stack": 1, "L_cycles": 2},
    "epochs": 6, "checkpoint_every": 35, "validate_every": 0, "bp_warmup_ratio": 0.0,
}  # fmt: skip


def spoiled(monkeypatch, at, factor):
    """Gradients of some steps are multiplied, by the step's number since the start."""
    original = TrainStep.run

    def run(self, batch, *, depth, lr, step):
        self.factor = factor if step in at else 1.0
        return original(self, batch, depth=depth, lr=lr, step=step)

    def accumulate(self, batch, depth, *more):
        sums = plain(self, batch, depth, *more)
        for parameter in self.compute.master.parameters():
            if parameter.grad is not None:
                parameter.grad *= self.factor
        return sums

    plain = TrainStep.accumulate
    monkeypatch.setattr(TrainStep, "run", run)
    monkeypatch.setattr(TrainStep, "accumulate", accumulate)


def run_of(folder, source, **changes):
    result = train_on(small_config(**LONG, **changes), source, run_folder=folder, progress="none")
    return result, read_metrics(RunFolder(folder).metrics_file)


def test_planted_spikes_are_left_out_logged_counted_and_resumed_exactly(tmp_path, monkeypatch):
    source = MemorySource(random_rows(60), heldout=random_rows(20, seed=5))
    calm, records = run_of(tmp_path / "calm", source)
    assert not [r for r in records if r["kind"] == "stability"]
    spoiled(monkeypatch, at=(26, 40), factor=1e4)
    whole, records = run_of(tmp_path / "whole", source)
    actions = [r for r in records if r["kind"] == "stability"]
    assert [(r["step"], r["action"]) for r in actions] == [(27, "skip"), (41, "skip")]
    assert actions[-1]["totals"]["skip"] == 2
    assert actions[0]["gradient_factor"] == pytest.approx(1e4, rel=0.9)
    bare, _ = run_of(tmp_path / "bare", source, stability="off")
    calm, whole, bare = (one.validation.ema["loss"] for one in (calm, whole, bare))
    assert whole == pytest.approx(calm, rel=0.05)
    assert abs(bare - calm) > abs(whole - calm)
    # Stopped between the two and resumed: the same weights, log and counts.
    folder = tmp_path / "cut"
    original = TrainStep.run

    def stop_at(self, batch, **named):
        if named["step"] == 37:
            raise KeyboardInterrupt
        return original(self, batch, **named)

    monkeypatch.setattr(TrainStep, "run", stop_at)
    with pytest.raises(KeyboardInterrupt):
        run_of(folder, source)
    monkeypatch.setattr(TrainStep, "run", original)
    result, resumed = run_of(folder, source)
    strip = lambda rs: [{k: v for k, v in r.items() if k != "timing"} for r in rs]  # noqa: E731
    assert strip(resumed) == strip(records)
    for name in ("model.safetensors", "optimizer.safetensors"):
        first = read_tensors(RunFolder(tmp_path / "whole").latest() / name)
        second = read_tensors(result.checkpoint / name)
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_the_guard_changes_no_bit_of_a_healthy_run(tmp_path):
    source = MemorySource(random_rows(60))
    checkpoints = []
    for mode in ("off", "log", "guard"):
        result, records = run_of(tmp_path / mode, source, stability=mode, max_steps=30)
        assert not [r for r in records if r["kind"] == "stability"]
        checkpoints.append(read_tensors(result.checkpoint / "model.safetensors"))
    for key, tensor in checkpoints[0].items():
        assert all(torch.equal(tensor, other[key]) for other in checkpoints[1:])


def test_a_loss_that_is_not_finite_stops_the_run_with_the_guard_too(tmp_path, monkeypatch):
    spoiled(monkeypatch, at=(3,), factor=float("nan"))
    with pytest.raises(NonFiniteError, match="step 3: the gradient is not finite"):
        run_of(tmp_path / "run", MemorySource(random_rows(60)))
