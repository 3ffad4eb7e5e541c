"""The sets that Platypus collects: ARB, OpenBookQA, ReClor, SciBench, ScienceQA, TheoremQA."""

from __future__ import annotations

from hrmtext.data.example import Example
from hrmtext.data.sources.source import (
    Origin,
    Outcome,
    Part,
    Row,
    Source,
    is_empty,
    letter,
    lettered,
)

ARB_LINES = {
    "math": "Here is a problem in advanced mathematics.",
    "reading": "Here is a question on a text to be read closely.",
    "law": "Here is a question of law; choose the right answer.",
    "science": "Here is a question from the natural sciences.",
    "physics": "Here is a problem in physics.",
}
"""The line in front of a problem, by file."""
NO_SUCH_CHOICE = "the answer is none of the choices"


def arb_rule(row: Row, origin: Origin) -> Outcome:
    """A line on the kind of problem, the instruction -> response; law direct, the others cot."""
    condition = "direct" if origin.part == "law" else "cot"
    yield Example(condition, f"{ARB_LINES[origin.part]}\n{row['instruction']}", row["response"])


def openbookqa_rule(row: Row, origin: Origin) -> Outcome:
    """Question stem, lettered choices, fact -> the key's letter, direct."""
    texts, letters = row["choices"].get("text"), row["choices"].get("label")
    if not texts or not letters or len(texts) != len(letters):
        yield "choices and letters do not match"
    elif row["answerKey"] not in letters:
        yield NO_SUCH_CHOICE
    else:
        question = f"{row['question_stem']}\n{lettered(texts, letters)}\n{row['fact1']}"
        yield Example("direct", question, row["answerKey"])


def reclor_rule(row: Row, origin: Origin) -> Outcome:
    """Question, context, lettered answers -> letter of the label, direct."""
    answer = letter(row["label"], len(row["answers"]))
    if answer is None:
        yield NO_SUCH_CHOICE
    else:
        question = f"{row['question']}\n{row['context']}\n{lettered(row['answers'])}"
        yield Example("direct", question, answer)


def scibench_rule(row: Row, origin: Origin) -> Outcome:
    """Problem -> solution where there is one, cot; and -> answer_latex, direct.

    Where answer_latex is only the number in dollars, the bare number. Spaces around it, which most
    have, are dropped.
    """
    problem, latex = row["problem_text"], row["answer_latex"]
    if not is_empty(row["solution"]):
        yield Example("cot", problem, row["solution"])
    if is_empty(latex):
        yield "empty answer_latex"
        return
    latex, number = latex.strip(), str(row["answer_number"]).strip()
    only_number = latex.startswith("$") and latex.strip("$").strip() == number
    yield Example("direct", problem, number if only_number else latex)


def scienceqa_rule(row: Row, origin: Origin) -> Outcome:
    """Question, lettered choices, lecture where there is one -> letter, direct.

    Where there is a solution also -> the solution and, on a line of its own, the letter, cot.
    """
    answer = letter(row["answer"], len(row["choices"]))
    if answer is None:
        yield NO_SUCH_CHOICE
        return
    question = f"{row['question']}\n{lettered(row['choices'])}"
    if not is_empty(row["lecture"]):
        question = f"{question}\n{row['lecture']}"
    yield Example("direct", question, answer)
    if not is_empty(row["solution"]):
        yield Example("cot", question, f"{row['solution']}\n{answer}")


def theoremqa_rule(row: Row, origin: Origin) -> Outcome:
    """Question -> Answer, direct; rows with a picture are left out."""
    if row["Picture"] is not None:
        yield "has a picture"
    else:
        yield Example("direct", row["Question"], row["Answer"])


ARB = Source(
    name="platypus_arb",
    rule=arb_rule,
    columns={"instruction": str, "response": str},
    parts=tuple(Part(name=kind, files=(f"{kind}.json",)) for kind in ARB_LINES),
    hub=None,
    where="a folder with math.json, reading.json, law.json, science.json and physics.json",
    conditions=("direct", "cot"),
    licence="MIT",
    citation="Sawada et al., ARB: Advanced Reasoning Benchmark for Large Language Models, 2023",
    repeat=10,
)
OPENBOOKQA = Source(
    name="platypus_openbookqa",
    rule=openbookqa_rule,
    columns={"question_stem": str, "choices": dict, "fact1": str, "answerKey": str},
    parts=tuple(
        Part(
            name=split, config="additional", split=split,
            files=(f"additional/{split}-*.parquet",),
        )
        for split in ("train", "validation")
    ),
    hub="allenai/openbookqa",
    conditions=("direct",),
    licence="see the data set's page",
    citation=(
        "Mihaylov et al., Can a Suit of Armor Conduct Electricity? A New Dataset for Open Book "
        "Question Answering, 2018"
    ),
    repeat=10,
)  # fmt: skip
RECLOR = Source(
    name="platypus_reclor",
    rule=reclor_rule,
    columns={"question": str, "context": str, "answers": list, "label": int},
    parts=tuple(
        Part(name=split, split=split, files=(f"{split}-*.parquet", *files))
        for split, files in (
            ("train", ("train.json", "train.jsonl")),
            ("validation", ("val.json", "val.jsonl", "validation.jsonl")),
        )
    ),
    hub="metaeval/reclor",
    conditions=("direct",),
    licence="see the data set's page (research use)",
    citation=(
        "Yu et al., ReClor: A Reading Comprehension Dataset Requiring Logical Reasoning, 2020"
    ),
    repeat=10,
)
SCIBENCH = Source(
    name="platypus_scibench",
    rule=scibench_rule,
    columns={"problem_text": str, "solution": str, "answer_latex": str, "answer_number": object},
    nullable=frozenset({"solution", "answer_latex"}),
    parts=(Part(files=("*.json",)),),
    hub=None,
    where="the json files of SciBench's problem sets",
    conditions=("cot", "direct"),
    licence="MIT",
    citation=(
        "Wang et al., SciBench: Evaluating College-Level Scientific Problem-Solving Abilities of "
        "Large Language Models, 2023"
    ),
    repeat=10,
)
SCIENCEQA = Source(
    name="platypus_scienceqa",
    rule=scienceqa_rule,
    columns={"question": str, "choices": list, "answer": int, "lecture": str, "solution": str},
    nullable=frozenset({"lecture", "solution"}),
    parts=(Part(split=None, files=("data/*.parquet",)),),
    hub="metaeval/ScienceQA_text_only",
    conditions=("direct", "cot"),
    licence="CC-BY-NC-SA-4.0 (ScienceQA)",
    citation=(
        "Lu et al., Learn to Explain: Multimodal Reasoning via Thought Chains for Science "
        "Question Answering, 2022"
    ),
    repeat=10,
)
THEOREMQA = Source(
    name="platypus_theoremqa",
    rule=theoremqa_rule,
    columns={"Question": str, "Answer": str, "Picture": object},
    parts=(Part(split="test", files=("test-*.parquet",)),),
    hub="TIGER-Lab/TheoremQA",
    conditions=("direct",),
    licence="MIT",
    citation="Chen et al., TheoremQA: A Theorem-driven Question Answering Dataset, 2023",
    repeat=10,
)
