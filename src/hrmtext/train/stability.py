"""The stability guard: rules by which a step is damped, left out, or taken at a lower rate.

An Adam-atan2 update is at most pi/2 * lr a weight, however large the gradient, so clipping the
global norm does little. What a spike harms are the moments: exp_avg points its way for about
1 / (1 - b1) steps, and a gradient F times as large as usual keeps sqrt(exp_avg_sq), by which all
later gradients are divided, too large for about 2 ln(F) / (1 - b2) steps. So outliers are kept out
of the moments (damp, skip), and what a too high rate does is undone by a lower one (brake).

Everything is judged on the host from one fetch of the device, and relative to the run's own past:
running medians, and spreads as 1.4826 times the median absolute deviation. Gradients are compared
with steps of the same backward depth, losses with steps of the same forward depth.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from hrmtext.config.stability import StabilityLimits
from hrmtext.errors import CheckpointError
from hrmtext.model.depth import Depth
from hrmtext.train.history import Array, History

LEAST_LOG_SPREAD = 0.15
"""Spread of the logarithm of a gradient norm, at least; a window may happen to be calm."""
LEAST_LOSS_SPREAD = 0.02
"""The same of the loss, in nats a token."""
RECENT_STEPS = 5
"""Steps over which a rise of the loss must hold to brake, and between two brakings."""
BRAKE, RECOVERY, LEAST_RATE = 0.5, 1.1, 1 / 64
"""Factor of a braking, factor a step on the way back, and the lowest rate."""
LATELY = 16
"""Steps whose updates, as they were applied, stand for what was done lately."""
MAX_DEPTHS = 8
"""Depths with a history of their own; beyond that the one not seen for longest is forgotten."""

EASING = "back to the full rate step by step"
"""Reason of a brake that has not quite gone yet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """What a step's gradient and loss are, over all ranks, before the update."""

    loss: float
    """Nats a supervised token."""
    supervised_tokens: int
    gradient_norms: Array
    """(M) L2 norm of every module's gradient, in the guard's order; 0 without gradient."""

    @property
    def gradient_norm(self) -> float:
        """L2 norm of the whole gradient."""
        return math.hypot(*self.gradient_norms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do with a step."""

    skip: bool = False
    """Change no weight, moment or average."""
    damp: dict[int, float] = dataclasses.field(default_factory=dict)
    """Factor on the gradient by module."""
    rate: float = 1.0
    """Factor on the learning rate."""
    record: dict[str, Any] | None = None
    """Line of the log, without its step; None where nothing was found."""


PROCEED = Decision()


class StabilityGuard:
    """Judges every step of a run; its state is a handful of plain values and bytes as text."""

    def __init__(
        self, limits: StabilityLimits, module_names: Sequence[str], *, applied: bool
    ) -> None:
        """`applied`: the caller does what is decided; False: it only logs it."""
        self.limits = limits
        self.names = list(module_names)
        self.applied = applied
        self.totals = {"skip": 0, "damp": 0, "brake": 0}
        self._gradients: dict[str, History] = {}
        self._losses: dict[str, History] = {}
        self._updates = History(limits.window_steps)
        self._applied = History(LATELY)
        self._log_ratios = np.full(len(self.names), np.nan)
        self._rises: deque[float] = deque(maxlen=RECENT_STEPS)
        self._brake = 1.0
        self._steps_since_brake = RECENT_STEPS
        self._skips_in_a_row = 0

    def note_update(self, module: int, update_square: float, weight_square: float) -> None:
        """Squared norms of a module's last update at lr 1 and of its weights, as last measured."""
        if update_square > 0 and weight_square > 0:
            self._log_ratios[module] = 0.5 * math.log(update_square / weight_square)

    def decide(self, seen: Observation, *, lr: float, depth: Depth) -> Decision:
        """Judge a step by the steps before it, then count it among them.

        Args:
            lr: what the schedule asks for.
        """
        if self._is_usual(seen, lr, depth):
            return PROCEED
        reasons: list[str] = []
        rise, loss_bound = self._judge_loss(seen, depth)
        damp, gradient_factor, skip = self._judge_gradients(seen, depth, reasons)
        if rise > loss_bound:
            reasons.append(f"loss {seen.loss:.3f}, {rise:.3f} above its median")
            skip = True
        if skip and self._skips_in_a_row >= self.limits.max_skips:
            reasons.append(f"{self._skips_in_a_row} steps in a row were left out: this one counts")
            skip = False
        self._skips_in_a_row = self._skips_in_a_row + 1 if skip else 0
        if skip:
            return self._act(seen, gradient_factor, reasons, skip=True)
        rate = min(self._judge_updates(lr, reasons), self._judge_rises(rise, loss_bound, reasons))
        if lr > 0:
            self._applied.append(self._log_ratios + math.log(lr * rate))
        if not damp and rate == 1.0:
            return PROCEED
        if not reasons:
            reasons.append(EASING)
        return self._act(seen, gradient_factor, reasons, damp=damp, rate=rate)

    def _is_usual(self, seen: Observation, lr: float, depth: Depth) -> bool:
        """Whether no rule can find anything, by bounds of the medians; if so, count the step.

        Nearly every step is: its medians, most of the guard's time, need not be known.
        """
        losses = self._losses.get(_cycles(depth))
        gradients = self._gradients.get(_calls(depth))
        if lr <= 0 or self._brake < 1.0 or losses is None or gradients is None:
            return False
        if any(rise > 0.5 for rise in self._rises):  # with them this step might brake
            return False
        at_least = self.limits.history_steps
        of_losses, of_gradients = losses.floors(at_least), gradients.floors(at_least)
        of_updates, lately = self._updates.floors(at_least), self._applied.floors(LATELY // 2)
        if of_losses is None or of_gradients is None or of_updates is None or lately is None:
            return False
        logs, ratios = _logs(seen), self._log_ratios + math.log(lr)
        if (
            not seen.loss - of_losses[1] <= self.limits.loss_rise / 2
            or (logs - of_gradients[1:] > math.log(self.limits.damp_factor)).any()
            or (ratios - lately > math.log(self.limits.update_factor)).any()
        ):
            return False
        self._history(self._losses, _cycles(depth)).append(_row(seen, [seen.loss]))
        self._history(self._gradients, _calls(depth)).append(_row(seen, logs))
        self._updates.append(ratios)
        self._applied.append(ratios)
        self._rises.append(0.0)  # at most 0.5, as all that does not brake
        self._steps_since_brake += 1
        self._skips_in_a_row = 0
        return True

    def _act(
        self,
        seen: Observation,
        gradient_factor: float,
        reasons: list[str],
        *,
        skip: bool = False,
        damp: dict[int, float] | None = None,
        rate: float = 1.0,
    ) -> Decision:
        damp = damp or {}
        done = {"skip": skip, "damp": bool(damp), "brake": rate < 1.0}
        for name, is_done in done.items():
            self.totals[name] += is_done
        record = {
            "kind": "stability",
            "action": "+".join(name for name, is_done in done.items() if is_done),
            "applied": self.applied,
            "reason": "; ".join(reasons),
            "loss": seen.loss,
            "gradient_norm": seen.gradient_norm,
            "gradient_factor": gradient_factor,
            "rate": rate,
            "damped": {self.names[module]: factor for module, factor in damp.items()},
            "totals": dict(self.totals),
        }
        if not self.applied:
            return Decision(record=record)
        return Decision(skip=skip, damp=damp, rate=rate, record=record)

    def _judge_loss(self, seen: Observation, depth: Depth) -> tuple[float, float]:
        """How far the loss is above its median, and how far it may be; nothing while unknown."""
        history = self._history(self._losses, _cycles(depth))
        known = history.statistics(self.limits.history_steps)
        history.append(_row(seen, [seen.loss]))
        if known is None:
            return 0.0, math.inf
        (tokens, loss), (_, spread) = known
        bound = max(self.limits.loss_rise, self.limits.sigmas * max(spread, LEAST_LOSS_SPREAD))
        return seen.loss - float(loss), float(bound) * _widening(tokens, seen.supervised_tokens)

    def _judge_gradients(
        self, seen: Observation, depth: Depth, reasons: list[str]
    ) -> tuple[dict[int, float], float, bool]:
        """Factors for modules to damp, the whole norm as a multiple of its median, and skip."""
        logs = _logs(seen)
        history = self._history(self._gradients, _calls(depth))
        known = history.statistics(self.limits.history_steps)
        history.append(_row(seen, logs))
        if known is None:
            return {}, 1.0, False
        medians, spreads = known
        limits = self.limits
        wider = math.log(_widening(medians[0], seen.supervised_tokens))
        bounds = np.maximum(
            math.log(limits.damp_factor),
            limits.sigmas * np.maximum(spreads[1:], LEAST_LOG_SPREAD),
        )  # (1 + M)
        above = logs - medians[1:] - wider  # (1 + M)
        factor = float(np.exp(_or(logs[0] - medians[1], 0.0)))
        if above[0] > bounds[0] + math.log(limits.skip_factor / limits.damp_factor):
            reasons.append(f"gradient {factor:.3g} times its median")
            skip = True
        else:
            skip = False
        damp = {
            int(module): float(np.exp(bounds[1 + module] - above[1 + module]))
            for module in np.flatnonzero(above[1:] > bounds[1:])
        }
        if damp and not skip:
            worst = min(damp, key=damp.__getitem__)
            times = math.exp(above[1 + worst] + wider)
            more = f" and of {len(damp) - 1} more" if len(damp) > 1 else ""
            reasons.append(f"gradient of {self.names[worst]}{more} {times:.3g} times its median")
        return damp, factor, skip

    def _judge_updates(self, lr: float, reasons: list[str]) -> float:
        """The rate at which no module's update is above its bound, by what was last measured."""
        if lr <= 0:
            return 1.0
        ratios = self._log_ratios + math.log(lr)  # (M) log(|update| / |weights|) at the full rate
        usual = self._updates.statistics(self.limits.history_steps)
        lately = self._applied.statistics(LATELY // 2)
        self._updates.append(ratios)
        if usual is None or lately is None:
            return 1.0
        # Two medians: a falling rate leaves the window's far above what was done lately, while a
        # warmup or a rate that stays soon lifts the window's.
        bound = math.log(self.limits.update_factor)
        above = _or(ratios - lately[0], -np.inf)
        above[~(ratios - usual[0] > bound / 2)] = -np.inf
        worst = int(above.argmax())
        if above[worst] <= bound:
            return 1.0
        times = math.exp(above[worst])
        reasons.append(f"update of {self.names[worst]} {times:.3g} times what it was lately")
        return 1.0 / times

    def _judge_rises(self, rise: float, loss_bound: float, reasons: list[str]) -> float:
        """The rate that a lasting rise of the loss leaves; it comes back step by step."""
        self._rises.append(rise / loss_bound if math.isfinite(loss_bound) else 0.0)
        self._steps_since_brake += 1
        lasting = statistics.median(self._rises) if len(self._rises) == RECENT_STEPS else 0.0
        if lasting <= 0.5:
            self._brake = min(1.0, self._brake * RECOVERY)
        elif self._steps_since_brake >= RECENT_STEPS and self._brake > LEAST_RATE:
            self._brake = max(LEAST_RATE, self._brake * BRAKE)
            self._steps_since_brake = 0
            reasons.append(f"loss {lasting * loss_bound:.3f} above its median over five steps")
        return self._brake

    def _history(self, of: dict[str, History], key: str) -> History:
        history = of.pop(key, None) or History(self.limits.window_steps)
        of[key] = history  # the newest is last
        if len(of) > MAX_DEPTHS:
            del of[next(iter(of))]
        return history

    def state(self) -> dict[str, Any]:
        """Plain values from which `restore` goes on exactly."""
        return {
            "modules": self.names,
            "totals": dict(self.totals),
            "gradients": {key: _pack(value.rows()) for key, value in self._gradients.items()},
            "losses": {key: _pack(value.rows()) for key, value in self._losses.items()},
            "updates": _pack(self._updates.rows()),
            "applied": _pack(self._applied.rows()),
            "log_ratios": _pack([self._log_ratios]),
            "rises": list(self._rises),
            "brake": self._brake,
            "steps_since_brake": self._steps_since_brake,
            "skips_in_a_row": self._skips_in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty one, of a run without the guard, starts anew.

        Raises:
            CheckpointError: of a model with other modules.
        """
        if not state:
            return
        if state["modules"] != self.names:
            raise CheckpointError(
                f"the stability guard's state is of {len(state['modules'])} modules, "
                f"expected {len(self.names)}: {', '.join(self.names[:4])}, ..."
            )
        length = self.limits.window_steps
        self.totals = dict(state["totals"])
        self._gradients = {k: History(length, _unpack(v)) for k, v in state["gradients"].items()}
        self._losses = {k: History(length, _unpack(v)) for k, v in state["losses"].items()}
        self._updates = History(length, _unpack(state["updates"]))
        self._applied = History(LATELY, _unpack(state["applied"]))
        self._log_ratios = _unpack(state["log_ratios"])[0]
        self._rises = deque(state["rises"], maxlen=RECENT_STEPS)
        self._brake = state["brake"]
        self._steps_since_brake = state["steps_since_brake"]
        self._skips_in_a_row = state["skips_in_a_row"]


def describe_action(record: dict[str, Any]) -> str:
    """A stability record of the log as a line for a person."""
    done = {
        "skip": "step left out",
        "damp": "gradient damped",
        "brake": f"lr times {record['rate']:.2g}",
    }
    what = ", ".join(done[name] for name in record["action"].split("+"))
    note = "" if record["applied"] else " (logged only)"
    return f"stability at step {record['step']}: {what}{note}: {record['reason']}"


def _cycles(depth: Depth) -> str:
    return f"{depth.H_cycles}x{depth.L_cycles}"


def _calls(depth: Depth) -> str:
    calls = "".join("+" if carries else "-" for carries in depth.carries_gradient)
    return f"{_cycles(depth)} {calls}"


def _logs(seen: Observation) -> Array:
    """(1 + M) of the whole norm and the modules'; NaN of 0."""
    norms = np.array([seen.gradient_norm, *seen.gradient_norms])
    return np.log(norms, where=norms > 0, out=np.full_like(norms, np.nan))


def _row(seen: Observation, values: Sequence[float] | Array) -> Array:
    return np.array([seen.supervised_tokens, *values], dtype=np.float64)


def _or(values: Array, default: float) -> Array:
    """Another value in the place of NaN."""
    return np.where(np.isnan(values), default, values)


def _widening(usual_tokens: float, tokens: int) -> float:
    """How much wider bounds are for a batch of fewer tokens than usual, whose means vary more."""
    return max(1.0, math.sqrt(usual_tokens / max(1, tokens)))


def _pack(rows: Sequence[Array]) -> dict[str, Any]:
    array = np.stack(rows) if rows else np.zeros((0, 0))
    return {
        "shape": list(array.shape),
        "float64": base64.b64encode(array.astype("<f8").tobytes()).decode("ascii"),
    }


def _unpack(packed: dict[str, Any]) -> list[Array]:
    values = np.frombuffer(base64.b64decode(packed["float64"]), dtype="<f8")
    return list(values.reshape(packed["shape"]).astype(np.float64))
