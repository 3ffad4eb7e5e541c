"""The model: recurrence, stacks, attention, KV cache, initial weights, counts."""

from hrmtext.model.attention import AttentionPlan, make_plan
from hrmtext.model.cache import KVCache
from hrmtext.model.depth import Depth, bp_steps_at
from hrmtext.model.hrm import HrmLM, LMOutput
from hrmtext.model.init import build_model, empty_model, init_weights

__all__ = [
    "AttentionPlan",
    "Depth",
    "HrmLM",
    "KVCache",
    "LMOutput",
    "bp_steps_at",
    "build_model",
    "empty_model",
    "init_weights",
    "make_plan",
]
