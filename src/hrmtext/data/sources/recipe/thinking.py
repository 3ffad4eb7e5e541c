"""Reasoning models' answers, their thinking removed: AceReason and OpenThoughts2."""

from __future__ import annotations

from hrmtext.data.example import Example
from hrmtext.data.sources.source import Origin, Outcome, Part, Row, Source
from hrmtext.data.text import has_code_fence, mentions_python, without_thinking

OPENTHOUGHTS2_DROPPED = frozenset({
    "dolphin", "evolcodegolf", "glaive", "magicoder", "sharegpt", "codefeedback", "nvidia_math",
})  # fmt: skip
ENDLESS = "a thought that does not end"


def acereason_rule(row: Row, origin: Origin) -> Outcome:
    """Category math: input -> output without its `<think>` block, synth+cot."""
    if row["category"] != "math":
        yield "not mathematics"
        return
    answer = without_thinking(row["output"])
    yield ENDLESS if answer is None else Example("synth,cot", row["input"], answer)


def openthoughts2_rule(row: Row, origin: Origin) -> Outcome:
    """User's text -> assistant's without its thinking, synth+cot.

    Left out: seven sources, "python" (in capitals or not) in either side, a code fence in the
    output. The table is silent on the order: the filters see the row as it comes, thinking
    included. A row is one question and one answer; others are left out.
    """
    if row["source"] in OPENTHOUGHTS2_DROPPED:
        yield "source that is left out"
        return
    turns = row["conversations"]
    if [turn.get("from") for turn in turns] not in (["user", "assistant"], ["human", "gpt"]):
        yield "not one question and one answer"
        return
    question, output = (turn.get("value") for turn in turns)
    if not isinstance(question, str) or not isinstance(output, str):
        yield "a turn without text"
    elif mentions_python(question) or mentions_python(output):
        yield "mentions python"
    elif has_code_fence(output):
        yield "code fence in the output"
    else:
        answer = without_thinking(output)
        yield ENDLESS if answer is None else Example("synth,cot", question, answer)


ACEREASON = Source(
    name="acereason",
    rule=acereason_rule,
    columns={"category": str, "input": str, "output": str},
    parts=(Part(files=("*train*.parquet", "*.jsonl")),),
    hub="nvidia/AceReason-1.1-SFT",
    conditions=("synth,cot",),
    licence="CC-BY-4.0",
    citation=(
        "Liu et al., AceReason-Nemotron 1.1: Advancing Math and Code Reasoning through SFT and "
        "RL Synergy, 2025"
    ),
    max_rows=2_000_000,
)
OPENTHOUGHTS2 = Source(
    name="openthoughts2",
    rule=openthoughts2_rule,
    columns={"source": str, "conversations": list},
    nullable=frozenset({"source"}),
    parts=(Part(files=("data/train-*.parquet",)),),
    hub="open-thoughts/OpenThoughts2-1M",
    conditions=("synth,cot",),
    licence="Apache-2.0",
    citation="Guha et al., OpenThoughts: Data Recipes for Reasoning Models, 2025",
    max_rows=500_000,
)
