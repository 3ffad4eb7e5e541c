"""Solutions and answers written by models: OpenMathInstruct-2, TextbookReasoning, SYNTH."""

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
    stratum_name,
)

SELF_KNOWLEDGE = "Pleias self-knowledge"
SYNTH_CONDITIONS = {
    "creative writing": "synth,cot",
    "rag": "synth,cot",
    "memorization": "synth,cot",
    "constrained writing": "synth,cot",
    "editing": "synth,cot",
    "math mcq": "synth,direct",
    "mcq": "synth,direct",
    "math exercise": "synth,noisy,cot",
}
"""Exercise -> condition; others have none."""


def openmathinstruct2_rule(row: Row, origin: Origin) -> Outcome:
    """Problem -> generated solution, synth+cot.

    Where problem_source is neither math nor gsm8k also -> expected answer, synth+direct.
    """
    yield Example("synth,cot", row["problem"], row["generated_solution"])
    if row["problem_source"] not in ("math", "gsm8k"):
        yield Example("synth,direct", row["problem"], row["expected_answer"])


def textbook_reasoning_rule(row: Row, origin: Origin) -> Outcome:
    """Question -> answer, synth+cot; no proof also -> reference answer, noisy+direct.

    An empty reference answer gives no second example (the table is silent).
    """
    yield Example("synth,cot", row["question"], row["answer"])
    if asks_for_proof(row["question"]):
        return
    if is_empty(row["reference_answer"]):
        yield "empty reference answer"
    else:
        yield Example("noisy,direct", row["question"], row["reference_answer"])


def synth_rule(row: Row, origin: Origin) -> Outcome:
    """Query -> synthetic answer, with a condition by exercise (`SYNTH_CONDITIONS`).

    Kept: English, not about Pleias itself, no cooking. rag: the constraints (the sources to use)
    follow the query after a blank line, where there are any.
    """
    exercise = row["exercise"]
    if row["language"] != "en":
        yield "not English"
    elif SELF_KNOWLEDGE in (row["query_seed_url"] or ""):
        yield "self-knowledge"
    elif exercise == "cooking":
        yield "cooking"
    else:
        query = row["query"]
        if exercise == "rag" and not is_empty(row["constraints"]):
            query = f"{query}\n\n{row['constraints']}"
        yield Example(SYNTH_CONDITIONS.get(exercise, ""), query, row["synthetic_answer"])


def openmathinstruct2_stratum(row: Row, origin: Origin) -> str:
    """One stratum a file."""
    return stratum_name("openmathinstruct2", origin.path.stem)


def synth_stratum(row: Row, origin: Origin) -> str:
    """One stratum a file."""
    return stratum_name("synth", origin.path.stem)


OPENMATHINSTRUCT2 = Source(
    name="openmathinstruct2",
    rule=openmathinstruct2_rule,
    columns={
        "problem": str, "generated_solution": str, "expected_answer": str, "problem_source": str,
    },
    # `train_1M` and its like are samples of train, and would double rows.
    parts=(Part(files=("data/train-*.parquet",)),),
    hub="nvidia/OpenMathInstruct-2",
    by_file=True,
    conditions=("synth,cot", "synth,direct"),
    licence="CC-BY-4.0",
    citation=(
        "Toshniwal et al., OpenMathInstruct-2: Accelerating AI for Math with Massive Open-Source "
        "Instruction Data, 2024"
    ),
    max_rows=2_000_000,
    stratum=openmathinstruct2_stratum,
)  # fmt: skip
TEXTBOOK_REASONING = Source(
    name="textbook_reasoning",
    rule=textbook_reasoning_rule,
    columns={"question": str, "answer": str, "reference_answer": str},
    nullable=frozenset({"reference_answer"}),
    parts=(Part(files=("*.parquet", "*.jsonl")),),
    hub="MegaScience/TextbookReasoning",
    conditions=("synth,cot", "noisy,direct"),
    licence="CC-BY-NC-SA-4.0",
    citation=(
        "Fan et al., MegaScience: Pushing the Frontiers of Post-Training Datasets for Science "
        "Reasoning, 2025"
    ),
)
SYNTH = Source(
    name="synth",
    rule=synth_rule,
    columns={
        "language": str, "exercise": str, "query": str, "query_seed_url": str,
        "constraints": str, "synthetic_answer": str,
    },
    nullable=frozenset({"language", "exercise", "query_seed_url", "constraints"}),
    parts=(Part(files=("*.parquet",)),),
    hub="PleIAs/SYNTH",
    by_file=True,
    conditions=("synth,cot", "synth,direct", "synth,noisy,cot", ""),
    licence="CC-BY-4.0 (first published under CDLA-Permissive-2.0)",
    citation="PleIAs/SYNTH, 2025",
    max_rows=20_000,
    stratum=synth_stratum,
)  # fmt: skip
