"""Adam-atan2 with an fp32 average of the weights in the same step.

For each parameter with a gradient g, at its own step count t (from 1):
    p *= 1 - lr * wd
    m  = lerp(m, g, 1 - b1)
    v  = b2 * v + (1 - b2) * g * g
    p -= lr / (1 - b1^t) * atan2(m, sqrt(v) / sqrt(1 - b2^t))
There is no epsilon and no other scale. Source: the HRM-Text paper and its public training code.
Trap: other Adam-atan2 packages divide m by 1 - b1^t inside atan2, so their first steps differ.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from hrmtext.errors import BackendError, CheckpointError, ConfigError
from hrmtext.train.cpp import optimizer as cpp

_MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 1 << 24
"""Weights whose last update is looked at together."""
Kernel = Literal["auto", "foreach", "compiled", "cpp"]


class AdamAtan2(torch.optim.Optimizer):
    """Adam-atan2; state has the number format of the parameters, which must be fp32 or fp64.

    A parameter whose gradient is None is left alone, weight decay included; its average still
    advances. `ema_decay=None` keeps no average. `lr` of a group may be a float or a 0-dim tensor.
    Of sharded weights (DTensor) every rank updates its own part: the update mixes no elements.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        ema_decay: float | None = 0.9999,
        kernel: Kernel = "auto",
    ) -> None:
        """Allocate the state; the average starts as a copy of the parameters of this moment.

        Args:
            kernel: `foreach`: a pass over the weights for each term of the formula; `compiled`: one
                pass for the whole formula and the average, by torch.compile; `cpp`: the same by a
                C++ kernel for fp32 on a CPU; `auto`: compiled on CUDA, cpp on a CPU with a C++
                compiler, else foreach. They agree within rounding.

        Raises:
            BackendError: `cpp`, and a parameter is not for it, or it cannot be built.
            ConfigError: a parameter is not fp32 or fp64: updates this small vanish in bf16.
        """
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "ema_decay": ema_decay}
        super().__init__(params, defaults)
        self.kernel: Kernel = kernel
        if kernel == "cpp":
            cpp.library()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype not in (torch.float32, torch.float64):
                    raise ConfigError(
                        f"a parameter is {parameter.dtype}; AdamAtan2 updates fp32 master weights, "
                        "keep those and compute in a bf16 copy"
                    )
                if kernel == "cpp" and not _suits_cpp(parameter):
                    raise BackendError(
                        f"optimizer_kernel=cpp updates fp32 weights on the CPU, a parameter is "
                        f"{parameter.dtype} on {parameter.device}; use optimizer_kernel=auto"
                    )
                state: dict[str, Any] = {"step": 0}
                for name in _MOMENTS:
                    state[name] = torch.zeros_like(parameter, requires_grad=False)
                if group["ema_decay"] is not None:
                    state["ema"] = parameter.detach().clone()
                self.state[parameter] = state
        self._scales: dict[torch.Tensor, float] = {
            parameter: group.get("lr_scale", 1.0)
            for group in self.param_groups
            for parameter in group["params"]
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, without the wrapper that keeps it out of graphs: nothing traces this.

        The wrapper imports torch._dynamo, two seconds of every run.
        """
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore[bad-override]
        """One update of every parameter that has a gradient, then of every average."""
        if closure is not None:
            raise ConfigError("AdamAtan2.step takes no closure; compute the gradient before it")
        for group in self.param_groups:
            # Parameters can differ in their step: those without gradient did not count some.
            by_step: dict[int, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] += 1
                    by_step.setdefault(state["step"], []).append(parameter)
            averaged: set[torch.Tensor] = set()
            for count, parameters in by_step.items():
                if self._kernel_of(parameters[0]) == "foreach":
                    self._update(parameters, count, group)
                else:
                    self._update_in_one_pass(parameters, count, group)
                    averaged.update(parameters)
            rest = [p for p in group["params"] if p not in averaged]
            if group["ema_decay"] is not None and rest:
                averages = [local(self.state[parameter]["ema"]) for parameter in rest]
                current = [local(parameter) for parameter in rest]
                torch._foreach_lerp_(averages, current, 1.0 - group["ema_decay"])

    def _kernel_of(self, parameter: torch.Tensor) -> Kernel:
        if self.kernel != "auto":
            return self.kernel
        if parameter.device.type == "cuda":
            return "compiled"
        return "cpp" if _suits_cpp(parameter) and cpp.is_usable() else "foreach"

    def _update(self, parameters: list[torch.Tensor], count: int, group: dict[str, Any]) -> None:
        lr, weight_decay = group["lr"], group["weight_decay"]
        beta1, beta2 = group["betas"]
        gradients = [_dense(p.grad) for p in parameters if p.grad is not None]
        first = [local(self.state[parameter]["exp_avg"]) for parameter in parameters]
        second = [local(self.state[parameter]["exp_avg_sq"]) for parameter in parameters]
        parameters = [local(parameter) for parameter in parameters]
        torch._foreach_mul_(parameters, 1.0 - lr * weight_decay)
        torch._foreach_lerp_(first, gradients, 1.0 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1.0 - beta2)
        scale = lr / (1.0 - beta1**count)
        correction = math.sqrt(1.0 - beta2**count)
        # One tensor at a time: temporaries of the size of a parameter, not of the model.
        for parameter, m, v in zip(parameters, first, second, strict=True):
            update = v.sqrt().div_(correction)
            torch.atan2(m, update, out=update)
            parameter.sub_(update.mul_(scale))

    def _update_in_one_pass(
        self, parameters: list[torch.Tensor], count: int, group: dict[str, Any]
    ) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        ema_decay = group["ema_decay"]
        correction = math.sqrt(1.0 - beta2**count)
        numbers = [
            1.0 - lr * group["weight_decay"],
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            lr / (1.0 - beta1**count),
            1.0 / correction,
            0.0 if ema_decay is None else 1.0 - ema_decay,
        ]
        by_cpp = self._kernel_of(parameters[0]) == "cpp"
        updates = []
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None, "only parameters with a gradient are updated"
            state = self.state[parameter]
            as_rows = gradient.is_sparse and self.takes_rows(parameter)
            one = cpp.Update(
                parameter=local(parameter),
                gradient=gradient if as_rows else _dense(gradient).contiguous(),
                first=local(state["exp_avg"]),
                second=local(state["exp_avg_sq"]),
                average=None if ema_decay is None else local(state["ema"]),
            )
            if one.parameter.numel():  # a rank may hold no part of a small parameter
                updates.append(one)
        if by_cpp:
            cpp.update(cpp.library(), updates, numbers)
            return
        # Tensors, not floats: a float that changes would be compiled anew at every step.
        scalars = [torch.as_tensor(x, dtype=parameters[0].dtype) for x in numbers]
        for one in updates:
            # One shape for all; `view`, as what is written must be seen through.
            own = [one.parameter, one.gradient, one.first, one.second]
            own += [] if one.average is None else [one.average]
            _one_pass()(scalars, [tensor.view(-1) for tensor in own])

    def squares(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """(N) fp64 on the device: squared norm of each of these tensors, of parameters' shapes."""
        if all(_suits_cpp(tensor) for tensor in tensors) and self._kernel_of(tensors[0]) == "cpp":
            return torch.tensor(cpp.squares(cpp.library(), tensors), dtype=torch.float64)
        return torch.stack(torch._foreach_norm(list(tensors))).double().square()

    def takes_rows(self, parameter: torch.Tensor) -> bool:
        """Whether a sparse gradient, of some rows, is used as it is; else it is made dense."""
        return self._kernel_of(parameter) == "cpp" and cpp.takes_rows(cpp.library(), parameter)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group: `lr` times its `lr_scale`, where it has one."""
        for group in self.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    @torch.no_grad()
    def update_squares(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """(2) fp64 on the device: squared norms of their last update at lr 1, and of themselves.

        Of this rank's parts. Weight decay is not counted as update.
        """
        weights = [local(parameter) for parameter in parameters]
        states = [self.state[parameter] for parameter in parameters]
        moments = [[local(state[name]) for name in _MOMENTS] for state in states]
        beta1, beta2 = self.param_groups[0]["betas"]
        # A parameter without an update has no moments either.
        counts = [max(1, state["step"]) for state in states]
        corrections = [1.0 / math.sqrt(1.0 - beta2**count) for count in counts]
        rates = [
            self._scales[parameter] / (1.0 - beta1**count)
            for parameter, count in zip(parameters, counts, strict=True)
        ]
        if all(_suits_cpp(one) for one in weights) and self._kernel_of(weights[0]) == "cpp":
            angles, squares = cpp.update_squares(cpp.library(), weights, moments, corrections)
            update = sum(rate**2 * angle for rate, angle in zip(rates, angles, strict=True))
            return torch.tensor([update, sum(squares)], dtype=torch.float64)
        update = torch.zeros((), dtype=torch.float64, device=weights[0].device)
        for (first, second), rate, correction in zip(moments, rates, corrections, strict=True):
            # Piece by piece: the angles of a large embedding would take as much memory as it does.
            pieces = (moment.view(-1).split(PIECE) for moment in (first, second))
            for m, v in zip(*pieces, strict=True):
                scale = v.sqrt().mul_(correction)
                angles = torch.atan2(m, scale, out=scale)
                update += rate**2 * torch.linalg.vector_norm(angles).double().square()
        return torch.stack([update, self.squares(weights).sum()])

    def averages(self) -> list[torch.Tensor]:
        """The averages, in the order of the parameters; ConfigError where none are kept."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if any("ema" not in self.state[parameter] for parameter in parameters):
            raise ConfigError("this optimizer keeps no average: ema_decay is None")
        return [self.state[parameter]["ema"] for parameter in parameters]

    def export_state(self, names: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
        """Moments and step counts as `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME` tensors."""
        tensors = {}
        for name, parameter in names.items():
            state = self.state[parameter]
            for moment in _MOMENTS:
                tensors[f"{moment}.{name}"] = state[moment]
            tensors[f"step.{name}"] = torch.tensor(state["step"], dtype=torch.int64)
        return tensors

    @torch.no_grad()
    def import_state(
        self,
        names: Mapping[str, torch.nn.Parameter],
        tensors: Mapping[str, torch.Tensor],
        averages: Mapping[str, torch.Tensor],
    ) -> None:
        """Take up what `export_state` gave, and the averages by parameter name.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        for name, parameter in names.items():
            state = self.state[parameter]
            for moment in _MOMENTS:
                state[moment].copy_(_tensor(tensors, f"{moment}.{name}", parameter))
            if "ema" in state:
                state["ema"].copy_(_tensor(averages, name, parameter))
            if f"step.{name}" not in tensors:
                raise CheckpointError(f"the optimizer state lacks step.{name}")
            state["step"] = int(tensors[f"step.{name}"])


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, the rows of a sparse one, any other as it is."""
    if tensor.is_sparse:
        return tensor.values()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_dense() if gradient.is_sparse else local(gradient)


def _suits_cpp(parameter: torch.Tensor) -> bool:
    is_plain = parameter.device.type == "cpu" and parameter.is_contiguous()
    return is_plain and parameter.dtype == torch.float32


@functools.cache
def _one_pass() -> Any:
    return torch.compile(_formula, dynamic=True)


def _formula(scalars: list[torch.Tensor], flat: list[torch.Tensor]) -> None:
    """The whole step of one parameter, and its average where `flat` has one, element by element."""
    parameter, gradient, first, second, *average = flat
    decay, one_minus_beta1, beta2, one_minus_beta2, scale, correction, one_minus_ema = scalars
    m = first + (gradient - first) * one_minus_beta1
    v = second * beta2 + gradient * gradient * one_minus_beta2
    p = parameter * decay - torch.atan2(m, v.sqrt() * correction) * scale
    first.copy_(m)
    second.copy_(v)
    parameter.copy_(p)
    if average:
        average[0].copy_(average[0] + (p - average[0]) * one_minus_ema)


def _tensor(
    tensors: Mapping[str, torch.Tensor], name: str, parameter: torch.Tensor
) -> torch.Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != parameter.shape:
        got = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise CheckpointError(
            f"optimizer state: {name} is {got}, expected shape {tuple(parameter.shape)}"
        )
    return tensor
