"""Rows that are ready to use: the published cleaned corpus, and the pairs of the `evals` wheel."""

from __future__ import annotations

from typing import Any

from hrmtext.data.example import DEFAULT_CONDITION, Example
from hrmtext.data.sources.source import Origin, Outcome, Part, Row, Source, stratum_name

EVALS_LEFT_OUT = ("steganography", "schelling_point", "text_compression")
"""Sets whose licence is not that of the wheel."""
EVALS_FOLDER = ("registry", "data")


def cleaned_rule(row: Row, origin: Origin) -> Outcome:
    """Instruction -> response with the condition that the row states; direct if it states none."""
    condition = DEFAULT_CONDITION if row["condition"] is None else row["condition"]
    yield Example(condition, row["instruction"], row["response"])


def cleaned_stratum(row: Row, origin: Origin) -> str:
    """The file's path without its ending, `/` as `__`."""
    return stratum_name(str(origin.path.with_suffix("")))


def evals_rule(row: Row, origin: Origin) -> Outcome:
    """System and user messages, a blank line between them -> the (first) ideal answer, direct."""
    if any(name in origin.path.parts for name in EVALS_LEFT_OUT):
        yield "set that is left out"
        return
    ideal = row["ideal"]
    if isinstance(ideal, list) and ideal:
        ideal = ideal[0]
    prompt = _prompt(row["input"])
    if prompt is None:
        yield "input is no text and no list of system and user messages"
    elif not isinstance(ideal, str):
        yield "ideal is no text"
    else:
        yield Example("direct", prompt, ideal)


def evals_stratum(row: Row, origin: Origin) -> str:
    """One stratum a set, the folder below `registry/data`."""
    parts = origin.path.parts
    for at in range(len(parts) - 2):
        if parts[at : at + 2] == EVALS_FOLDER:
            return stratum_name("evals", parts[at + 2].removesuffix(".jsonl"))
    return stratum_name("evals", origin.path.stem)


def _prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        return None
    texts = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user"):
            return None
        if not isinstance(message.get("content"), str):
            return None
        texts.append(message["content"])
    return "\n\n".join(texts)


CLEANED = Source(
    name="hrm_text_cleaned",
    rule=cleaned_rule,
    columns={"condition": str, "instruction": str, "response": str},
    nullable=frozenset({"condition"}),
    parts=(Part(files=("*.parquet", "*.jsonl")),),
    hub="sapientinc/HRM-Text-data-io-cleaned-20260515",
    by_file=True,
    conditions=("as the rows state",),
    licence="see the data set's page; each source has its own",
    citation="HRM-Text: Efficient Pretraining Beyond Scaling, 2026",
    stratum=cleaned_stratum,
)
EVALS = Source(
    name="evals",
    rule=evals_rule,
    columns={"input": object, "ideal": object},
    parts=(Part(files=("*.jsonl",)),),
    hub=None,
    where="the wheel of the package `evals` (pip download --no-deps evals==3.0.1.post1)",
    conditions=("direct",),
    licence="MIT; three sets with other licences are left out",
    citation="the package evals 3.0.1.post1",
    stratum=evals_stratum,
)
