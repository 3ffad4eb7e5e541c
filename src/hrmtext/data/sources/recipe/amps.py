"""AMPS: exercises from Khan Academy, and exercises generated with Mathematica."""

from __future__ import annotations

from hrmtext.data.example import Example
from hrmtext.data.sources.source import Origin, Outcome, Part, Row, Source, stratum_name

CITATION = "Hendrycks et al., Measuring Mathematical Problem Solving With the MATH Dataset, 2021"
LICENCE = "MIT, as its repository; Khan Academy's own text: see its terms"


def amps_khan_rule(row: Row, origin: Origin) -> Outcome:
    """Problem -> hints joined by newlines, noisy+cot."""
    hints = row["hints"]
    if not hints:
        yield "no hints"
    elif not all(isinstance(hint, str) for hint in hints):
        yield "a hint is not a string"
    else:
        yield Example("noisy,cot", row["problem"], "\n".join(hints))


def amps_mathematica_rule(row: Row, origin: Origin) -> Outcome:
    """Text between "Problem:" and "Answer:" -> the rest, white space around them removed.

    noisy+cot where the file's folder ends in `w_steps`, else noisy+direct.
    """
    _, start, rest = row["text"].partition("Problem:")
    problem, end, answer = rest.partition("Answer:")
    if not start:
        yield "no Problem: in the file"
    elif not end:
        yield "no Answer: in the file"
    else:
        steps = origin.path.parent.name.endswith("w_steps")
        condition = "noisy,cot" if steps else "noisy,direct"
        yield Example(condition, problem.strip(), answer.strip())


def amps_mathematica_stratum(row: Row, origin: Origin) -> str:
    """One stratum a `<topic>_<task>`, the two folders above the file."""
    task = origin.path.parent
    return stratum_name("amps_mathematica", f"{task.parent.name}_{task.name}")


AMPS_KHAN = Source(
    name="amps_khan",
    rule=amps_khan_rule,
    columns={"problem": str, "hints": list},
    parts=(Part(files=("*.json",)),),
    hub=None,
    where="the folder `khan` of AMPS (json files), or a tar of it",
    conditions=("noisy,cot",),
    licence=LICENCE,
    citation=CITATION,
)
AMPS_MATHEMATICA = Source(
    name="amps_mathematica",
    rule=amps_mathematica_rule,
    columns={"text": str},
    parts=(Part(files=("*/*/*.txt",)),),
    hub=None,
    where="the tar `mathematica` of AMPS, with <topic>/<task>/*.txt in it, or its folder",
    conditions=("noisy,cot", "noisy,direct"),
    licence=LICENCE,
    citation=CITATION,
    max_rows=10_000,
    stratum=amps_mathematica_stratum,
)
