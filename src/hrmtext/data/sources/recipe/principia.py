"""Principia: derive a mathematical object or a number from a problem."""

from __future__ import annotations

from hrmtext.data.example import Example
from hrmtext.data.sources.source import Origin, Outcome, Part, Row, Source


def principia_rule(row: Row, origin: Origin) -> Outcome:
    """Problem statement -> answer, synth+direct."""
    yield Example("synth,direct", row["problem_statement"], row["answer"])


PRINCIPIA = Source(
    name="principia",
    rule=principia_rule,
    columns={"problem_statement": str, "answer": str},
    parts=(Part(split=None, files=("data/*.parquet",)),),
    hub="facebook/principia-collection",
    conditions=("synth,direct",),
    licence="CC-BY-NC-SA-4.0",
    citation="facebook/principia-collection",
)
