"""The mistakes that paths make with HRM-Text, each as the real model changed so that it makes it.

A variant shares the model's weights and runs the same code; only its config or a few tensors
differ. Comparing with all of them tells which mistake a path makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from hrmtext.config.model import ModelConfig
from hrmtext.model import HrmLM, empty_model

State = dict[str, torch.Tensor]

WRONG_SCALES = (1.0, 50.0)
"""Forgotten; and transformers' default where a config does not state it."""
WRONG_THETAS = (1e4, 1e5, 5e5, 1e6)


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One way to be wrong."""

    name: str
    advice: str
    """What to look at."""
    change: Callable[[ModelConfig, State], tuple[ModelConfig, State]] = dataclasses.field(
        repr=False, compare=False
    )

    def variant(self, model: HrmLM) -> HrmLM:
        """The model that makes this mistake; it shares what it does not change."""
        config, state = self.change(model.config, dict(model.state_dict()))
        weight = model.lm_head.weight
        made = empty_model(config, device="meta", dtype=weight.dtype)
        made.load_state_dict(state, assign=True)
        return made.eval()


def mistakes(config: ModelConfig) -> Iterator[Mistake]:
    """Every mistake that is one for a model of this shape, the commonest first."""
    if config.prefix_lm:
        yield Mistake(
            "causal instead of prefix",
            "the prompt must see itself in both directions: pass token_type_ids = 1 for the prompt "
            "in the first forward (transformers), or run llama.cpp through hrm-text",
            lambda config, state: (config.with_changes(prefix_lm=False), state),
        )
    else:
        yield Mistake(
            "prefix instead of causal",
            "this model was trained causally: its prompt must not see ahead",
            lambda config, state: (config.with_changes(prefix_lm=True), state),
        )
    for scale in WRONG_SCALES:
        if abs(scale / config.scale - 1) > 0.02:
            yield Mistake(
                f"embedding scale {scale:g} instead of {config.scale:g}",
                "the token embedding must be multiplied by the config's embedding_scale",
                lambda config, state, s=scale: (config.with_changes(embedding_scale=s), state),
            )
    yield Mistake(
        "attention without its gate",
        "attention's output must be multiplied by sigmoid(gate) before o_proj",
        lambda config, state: (config, _constant_gate(state, factor=2.0)),
    )
    yield Mistake(
        "a constant gate",
        "the gate's weights do not reach it: check the order gate, q, k, v of the fused matrix",
        lambda config, state: (config, _constant_gate(state, factor=1.0)),
    )
    for H_cycles in range(config.H_cycles, 0, -1):
        for L_cycles in range(config.L_cycles, 0, -1):
            if (H_cycles, L_cycles) != (config.H_cycles, config.L_cycles):
                yield Mistake(
                    f"{H_cycles} x {L_cycles} cycles instead of "
                    f"{config.H_cycles} x {config.L_cycles}",
                    "the recurrence must run H_cycles times (L_cycles L calls, then an H call)",
                    lambda config, state, h=H_cycles, n=L_cycles: (
                        config.with_changes(H_cycles=h, L_cycles=n),
                        state,
                    ),
                )
    for theta in WRONG_THETAS:
        if theta != config.rope_theta:
            yield Mistake(
                f"rope theta {theta:g} instead of {config.rope_theta:g}",
                "the rotary base must be the config's rope_theta",
                lambda config, state, t=theta: (config.with_changes(rope_theta=t), state),
            )
    yield Mistake(
        "neighbouring dimensions turned together",
        "rotary embedding pairs dimension i with i + head_dim / 2 (rotate half, NeoX)",
        _neighbouring_pairs,
    )
    if not config.shared_stack:
        yield Mistake(
            "the H and the L stack swapped",
            "L runs L_cycles times, then H; in GGUF the L stack's blocks come first",
            lambda config, state: (config, _swapped(state)),
        )
    if not config.L_cycles:
        return
    yield Mistake(
        "z_L started at zero",
        "the low state starts at the saved vector z_L_init",
        lambda config, state: (
            config,
            state | {"model.z_L_init": torch.zeros_like(state["model.z_L_init"])},
        ),
    )


def _constant_gate(state: State, factor: float) -> State:
    """sigmoid(0) = 1/2 everywhere; the output projection makes up for it by `factor`."""
    changed = dict(state)
    for name, tensor in state.items():
        if name.endswith("gqkv_proj.weight"):
            gate, *rest = tensor.chunk(4)
            changed[name] = torch.cat([torch.zeros_like(gate), *rest])
        elif name.endswith("o_proj.weight") and factor != 1:
            changed[name] = tensor * factor
    return changed


def _neighbouring_pairs(config: ModelConfig, state: State) -> tuple[ModelConfig, State]:
    """Queries and keys reordered so that the half-split rotation turns neighbours."""
    order = torch.arange(config.head_dim).view(-1, 2).T.flatten()
    changed = dict(state)
    for name, tensor in state.items():
        if name.endswith("gqkv_proj.weight"):
            parts = tensor.view(4, config.num_heads, config.head_dim, -1)
            qk = parts[1:3].index_select(2, order.to(tensor.device))
            changed[name] = torch.cat([parts[:1], qk, parts[3:]]).view_as(tensor)
    return config, changed


def _swapped(state: State) -> State:
    def other(name: str) -> str:
        if "H_module" in name:
            return name.replace("H_module", "L_module")
        return name.replace("L_module", "H_module")

    return {name: state[other(name)] for name in state}
