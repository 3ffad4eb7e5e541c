"""Limits of the stability guard; what it does with them is said in `train/stability.py`."""

from __future__ import annotations

from hrmtext.config.base import config_class
from hrmtext.errors import ConfigError


@config_class
class StabilityLimits:
    """When a step counts as an outlier; every bound is relative to the run's own recent past."""

    window_steps: int = 64
    """Steps over which running medians and spreads are taken, for each depth apart."""
    history_steps: int = 20
    """Steps that must have been seen, at the same depth, before anything is judged."""
    sigmas: float = 8.0
    """Bounds are at least so many robust standard deviations away from the running median."""
    damp_factor: float = 30.0
    """A module's gradient is never scaled down while below so many times its median norm; in small
    batches of a healthy run a single module was seen at nine times."""
    skip_factor: float = 100.0
    """A step is never left out for its gradient while that is below so many times its median."""
    loss_rise: float = 0.7
    """A step is never left out for its loss (nats a token) while that is less above its median;
    half of it, held over five steps, brakes."""
    update_factor: float = 6.0
    """Updates, relative to the weights, above so many times those of late are braked to these; they
    must be above the root of it times the median of the window as well."""
    max_skips: int = 8
    """Steps left out in a row before the next one counts again: the data may have changed."""

    def __post_init__(self) -> None:
        checks = {
            "window_steps": (self.window_steps >= 8, "at least 8"),
            "history_steps": (
                8 <= self.history_steps <= self.window_steps,
                f"from 8 to window_steps={self.window_steps}",
            ),
            "sigmas": (self.sigmas > 0, "above 0"),
            "damp_factor": (self.damp_factor > 1, "above 1"),
            "skip_factor": (
                self.skip_factor >= self.damp_factor,
                f"at least damp_factor={self.damp_factor}",
            ),
            "loss_rise": (self.loss_rise > 0, "above 0"),
            "update_factor": (self.update_factor > 1, "above 1"),
            "max_skips": (self.max_skips >= 1, "at least 1"),
        }
        for name, (fits, expected) in checks.items():
            if not fits:
                raise ConfigError(
                    f"stability_limits.{name} is {getattr(self, name)}, expected {expected}"
                )
