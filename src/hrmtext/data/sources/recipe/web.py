"""Questions from the web and from people: NaturalReasoning, WebInstruct-verified, No Robots."""

from __future__ import annotations

from hrmtext.data.example import Example
from hrmtext.data.sources.source import (
    Origin,
    Outcome,
    Part,
    Row,
    Source,
    asks_for_proof,
    is_empty,
)


def natural_reasoning_rule(row: Row, origin: Origin) -> Outcome:
    """Question -> reference answer, noisy+direct; an empty answer or a proof is left out.

    "prove" and "show that" count anywhere in the question, in capitals or not.
    """
    if is_empty(row["reference_answer"]):
        yield "empty reference answer"
    elif asks_for_proof(row["question"]):
        yield "asks for a proof"
    else:
        yield Example("noisy,direct", row["question"], row["reference_answer"])


def webinstruct_verified_rule(row: Row, origin: Origin) -> Outcome:
    """Question -> answer, direct."""
    yield Example("direct", row["question"], row["answer"])


def no_robots_rule(row: Row, origin: Origin) -> Outcome:
    """First user turn -> the assistant's answer to it, cot; system text in front, a line between.

    System text is what stands in system messages before that turn.
    """
    system: list[str] = []
    user: str | None = None
    for message in row["messages"]:
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str):
            yield "a message without text"
            return
        if role == "system" and user is None:
            system.append(content)
        elif role == "user" and user is None:
            user = content
        elif role == "assistant" and user is not None:
            yield Example("cot", "\n\n".join([*system, user]), content)
            return
        else:
            break
    yield "does not begin with a user's and an assistant's turn"


NATURAL_REASONING = Source(
    name="natural_reasoning",
    rule=natural_reasoning_rule,
    columns={"question": str, "reference_answer": str},
    nullable=frozenset({"reference_answer"}),
    parts=(Part(files=("*.jsonl", "train-*.parquet")),),
    hub="facebook/natural_reasoning",
    conditions=("noisy,direct",),
    licence="CC-BY-NC-4.0",
    citation="Yuan et al., NaturalReasoning: Reasoning in the Wild with 2.8M Challenging "
    "Questions, 2025",
)
WEBINSTRUCT_VERIFIED = Source(
    name="webinstruct_verified",
    rule=webinstruct_verified_rule,
    columns={"question": str, "answer": str},
    parts=(Part(files=("data/train-*.parquet",)),),
    hub="TIGER-Lab/WebInstruct-verified",
    conditions=("direct",),
    licence="Apache-2.0",
    citation="Ma et al., General-Reasoner: Advancing LLM Reasoning Across All Domains, 2025",
    repeat=10,
)
NO_ROBOTS = Source(
    name="no_robots",
    rule=no_robots_rule,
    columns={"messages": list},
    parts=(Part(split=None, files=("data/*.parquet",)),),
    hub="HuggingFaceH4/no_robots",
    conditions=("cot",),
    licence="CC-BY-NC-4.0",
    citation="Rajani et al., No Robots, 2023",
    repeat=10,
)
