"""Mathematics of schools and competitions: GSM8K, MATH, Omni-MATH, NuminaMath."""

from __future__ import annotations

from hrmtext.data.example import Example
from hrmtext.data.sources.source import Origin, Outcome, Part, Row, Source, is_empty
from hrmtext.data.text import boxed_answer

MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
    "prealgebra", "precalculus",
)  # fmt: skip
TRANSLATION_REQUEST = "Translate the text above into English"
NO_ANSWER = ("proof", "notfound")
"""What NuminaMath's answer column holds where there is no answer."""


def gsm8k_rule(row: Row, origin: Origin) -> Outcome:
    """Question -> text after `####`, direct. A row without the mark is left out."""
    _, mark, answer = row["answer"].rpartition("####")
    if mark:
        yield Example("direct", row["question"], answer.strip())
    else:
        yield "no #### in the answer"


def hendrycks_math_rule(row: Row, origin: Origin) -> Outcome:
    r"""Problem -> solution, cot; and problem -> contents of the last `\boxed{}`, direct."""
    yield Example("cot", row["problem"], row["solution"])
    answer = boxed_answer(row["solution"])
    if answer is None:
        yield "no boxed answer in the solution"
    else:
        yield Example("direct", row["problem"], answer)


def omni_math_rule(row: Row, origin: Origin) -> Outcome:
    """Problem -> solution, cot; problem -> answer, direct. An empty one is left out."""
    for condition, column in (("cot", "solution"), ("direct", "answer")):
        if is_empty(row[column]):
            yield f"empty {column}"
        else:
            yield Example(condition, row["problem"], row[column])


def numina_math_rule(row: Row, origin: Origin) -> Outcome:
    """Problem -> solution, noisy+cot; where it is not a proof also -> answer, noisy+direct.

    Kept: not synthetic, problem and solution marked valid (`Yes`), no "http" and no request to
    translate in either. The table is silent on answers that say that there is none (`proof`,
    `notfound`, empty): they are left out.
    """
    problem, solution = row["problem"], row["solution"]
    if row["synthetic"]:
        yield "synthetic"
    elif row["problem_is_valid"] != "Yes" or row["solution_is_valid"] != "Yes":
        yield "problem or solution not valid"
    elif "http" in problem or "http" in solution:
        yield "http in the text"
    elif TRANSLATION_REQUEST in problem or TRANSLATION_REQUEST in solution:
        yield "request to translate"
    else:
        yield Example("noisy,cot", problem, solution)
        if row["question_type"] == "proof":
            return
        if is_empty(row["answer"]) or row["answer"].strip() in NO_ANSWER:
            yield "no answer given"
        else:
            yield Example("noisy,direct", problem, row["answer"])


GSM8K = Source(
    name="gsm8k",
    rule=gsm8k_rule,
    columns={"question": str, "answer": str},
    parts=(Part(name="main", config="main", files=("main/train-*.parquet",)),),
    hub="openai/gsm8k",
    conditions=("direct",),
    licence="MIT",
    citation="Cobbe et al., Training Verifiers to Solve Math Word Problems, 2021",
    repeat=10,
)
HENDRYCKS_MATH = Source(
    name="hendrycks_math",
    rule=hendrycks_math_rule,
    columns={"problem": str, "solution": str},
    parts=tuple(
        Part(name=subject, config=subject, files=(f"{subject}/train-*.parquet",))
        for subject in MATH_SUBJECTS
    ),
    hub="EleutherAI/hendrycks_math",
    conditions=("cot", "direct"),
    licence="MIT",
    citation=(
        "Hendrycks et al., Measuring Mathematical Problem Solving With the MATH Dataset, 2021"
    ),
    repeat=10,
)
OMNI_MATH = Source(
    name="omni_math",
    rule=omni_math_rule,
    columns={"problem": str, "solution": str, "answer": str},
    nullable=frozenset({"solution", "answer"}),
    parts=(Part(split="test", files=("test.jsonl", "test-*.parquet")),),
    hub="KbsdJames/Omni-MATH",
    conditions=("cot", "direct"),
    licence="Apache-2.0",
    citation=(
        "Gao et al., Omni-MATH: A Universal Olympiad Level Mathematic Benchmark for Large "
        "Language Models, 2024"
    ),
    repeat=10,
)
NUMINA_MATH = Source(
    name="numina_math",
    rule=numina_math_rule,
    columns={
        "problem": str, "solution": str, "answer": str, "question_type": str, "synthetic": bool,
        "problem_is_valid": str, "solution_is_valid": str,
    },
    nullable=frozenset({"answer", "question_type", "problem_is_valid", "solution_is_valid"}),
    parts=(Part(files=("data/train-*.parquet",)),),
    hub="AI-MO/NuminaMath-1.5",
    conditions=("noisy,cot", "noisy,direct"),
    licence="Apache-2.0",
    citation="Li et al., NuminaMath, 2024 (data set NuminaMath-1.5)",
)  # fmt: skip
