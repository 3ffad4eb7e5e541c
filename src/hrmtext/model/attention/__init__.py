"""Packed attention: one specification, several backends."""

from hrmtext.model.attention.api import BACKENDS, AttentionPlan, make_plan

__all__ = ["BACKENDS", "AttentionPlan", "make_plan"]
