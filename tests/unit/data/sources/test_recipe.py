"""Every row of the recipe's cleaning table: raw rows of the public schema, examples by hand."""

from __future__ import annotations

import pytest

from hrmtext.data.example import Example
from hrmtext.data.sources.collect import column_problem
from hrmtext.data.sources.recipe.catalog import OTHERS, RECIPE, SOURCES, find_source
from hrmtext.data.sources.recipe.instructions import FLAN_FOLDERS, tasksource_tasks
from hrmtext.data.sources.source import Origin
from hrmtext.data.tokenizer import CONDITIONS
from hrmtext.errors import ConfigError

TABLE = {
    "openai/gsm8k": "gsm8k",
    "EleutherAI/hendrycks_math": "hendrycks_math",
    "KbsdJames/Omni-MATH": "omni_math",
    "AI-MO/NuminaMath-1.5": "numina_math",
    "facebook/natural_reasoning": "natural_reasoning",
    "TIGER-Lab/WebInstruct-verified": "webinstruct_verified",
    "facebook/principia-collection": "principia",
    "HuggingFaceH4/no_robots": "no_robots",
    "AMPS Khan": "amps_khan",
    "AMPS Mathematica": "amps_mathematica",
    "DM Mathematics v1.0": "dm_mathematics",
    "nvidia/OpenMathInstruct-2": "openmathinstruct2",
    "nvidia/AceReason-1.1-SFT": "acereason",
    "open-thoughts/OpenThoughts2-1M": "openthoughts2",
    "MegaScience/TextbookReasoning": "textbook_reasoning",
    "PleIAs/SYNTH": "synth",
    "Open-Orca/FLAN": "flan",
    "tasksource/tasksource-instruct-v0": "tasksource",
    "sapientinc/sudoku-extreme": "sudoku_extreme",
    "Platypus/ARB": "platypus_arb",
    "Platypus: openbookqa": "platypus_openbookqa",
    "Platypus: metaeval/reclor": "platypus_reclor",
    "Platypus: scibench": "platypus_scibench",
    "Platypus: metaeval/ScienceQA_text_only": "platypus_scienceqa",
    "Platypus: TIGER-Lab/TheoremQA": "platypus_theoremqa",
}
"""The cleaning table, row by row, and the source that carries it out."""

NUMINA = {
    "problem": "What is 2+2?", "solution": "Add: $4$.", "answer": "4", "problem_type": "Algebra",
    "question_type": "math-word-problem", "problem_is_valid": "Yes", "solution_is_valid": "Yes",
    "source": "olympiads", "synthetic": False,
}  # fmt: skip
NUMINA_COT = Example("noisy,cot", "What is 2+2?", "Add: $4$.")
NUMINA_DIRECT = Example("noisy,direct", "What is 2+2?", "4")
OMI = {
    "problem": "1+1?", "generated_solution": r"It is \boxed{2}.", "expected_answer": "2",
    "problem_source": "augmented_math",
}  # fmt: skip
OMI_COT = Example("synth,cot", "1+1?", r"It is \boxed{2}.")
OMI_DIRECT = Example("synth,direct", "1+1?", "2")
TEXTBOOK = {
    "question": "Mass of what?", "answer": "By Newton, 3 kg.", "subject": "physics",
    "reference_answer": "3 kg",
}  # fmt: skip
SYNTH = {
    "synth_id": "s1", "language": "en", "exercise": "memorization", "model": "m", "query": "Who?",
    "query_seed_url": "https://en.wikipedia.org/wiki/X", "query_seed_text": "t",
    "additional_seed_url": None, "seed_license": "CC-By-SA", "constraints": "Use source 1.",
    "script": None, "synthetic_reasoning": "hm", "synthetic_answer": "Ada.", "words": 1,
}  # fmt: skip
THOUGHTS = {
    "conversations": [
        {"from": "user", "value": "Why?"},
        {"from": "assistant", "value": "<think>\nhm {}\n</think>\n\nBecause."},
    ],
    "question": "Why?", "source": "dolphin_other", "id": 1,
}  # fmt: skip


def thoughts(question="Why?", output="<think>hm</think>Because."):
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": output}]
    return THOUGHTS | {"conversations": turns}


SCIENCE = {
    "question": "Which is a solid?", "choices": ["ice", "steam"], "answer": 0, "hint": "h",
    "task": "closed choice", "grade": "grade2", "subject": "natural science", "topic": "physics",
    "category": "Matter", "skill": "s", "lecture": "Solids keep their shape.",
    "solution": "Ice keeps its shape.",
}  # fmt: skip
SCIENCE_QUESTION = "Which is a solid?\nA. ice\nB. steam\nSolids keep their shape."
SCIBENCH = {
    "problem_text": "How far?", "answer_latex": "$ 4.5 $", "answer_number": "4.5", "unit": "m",
    "source": "fund", "problemid": "1", "comment": " ", "solution": "Use $v t$.",
}  # fmt: skip
BOOK = {
    "id": "7", "question_stem": "The sun is", "fact1": "the sun is a star",
    "choices": {"text": ["a star", "a dog"], "label": ["A", "B"]}, "answerKey": "A",
    "humanScore": 1.0, "clarity": 1.4, "turkIdAnonymized": "x",
}  # fmt: skip
RECLOR = {
    "question": "Which follows?", "context": "All A are B.", "answers": ["w", "x", "y", "z"],
    "label": 3, "id_string": "train_0",
}  # fmt: skip
AT = Origin("")

CASES: list[tuple[str, dict, Origin, list]] = [
    # gsm8k: text after ####
    ("gsm8k", {"question": "3*4?", "answer": "3*4=<<3*4=12>>12\n#### 12"}, Origin("main"),
     [Example("direct", "3*4?", "12")]),
    ("gsm8k", {"question": "3*4?", "answer": "12"}, Origin("main"), ["no #### in the answer"]),
    # MATH: solution cot, last box direct, nested braces kept
    ("hendrycks_math",
     {"problem": "p", "level": "Level 1", "type": "Algebra",
      "solution": r"Not \boxed{1} but \boxed{\frac{1}{\sqrt{2}}}."}, Origin("algebra"),
     [Example("cot", "p", r"Not \boxed{1} but \boxed{\frac{1}{\sqrt{2}}}."),
      Example("direct", "p", r"\frac{1}{\sqrt{2}}")]),
    ("hendrycks_math", {"problem": "p", "level": "", "type": "", "solution": "none"},
     Origin("algebra"), [Example("cot", "p", "none"), "no boxed answer in the solution"]),
    # Omni-MATH
    ("omni_math",
     {"domain": ["x"], "difficulty": 8.0, "problem": "p", "solution": "s", "answer": "a",
      "source": "imo"}, AT, [Example("cot", "p", "s"), Example("direct", "p", "a")]),
    ("omni_math",
     {"domain": [], "difficulty": 1.0, "problem": "p", "solution": "", "answer": "a",
      "source": ""}, AT, ["empty solution", Example("direct", "p", "a")]),
    # NuminaMath: every filter
    ("numina_math", NUMINA, AT, [NUMINA_COT, NUMINA_DIRECT]),
    ("numina_math", NUMINA | {"question_type": "proof", "answer": "proof"}, AT, [NUMINA_COT]),
    ("numina_math", NUMINA | {"answer": "notfound"}, AT, [NUMINA_COT, "no answer given"]),
    ("numina_math", NUMINA | {"answer": None}, AT, [NUMINA_COT, "no answer given"]),
    ("numina_math", NUMINA | {"synthetic": True}, AT, ["synthetic"]),
    ("numina_math", NUMINA | {"problem_is_valid": "Incomplete"}, AT,
     ["problem or solution not valid"]),
    ("numina_math", NUMINA | {"solution_is_valid": "No"}, AT, ["problem or solution not valid"]),
    ("numina_math", NUMINA | {"problem": "see http://x"}, AT, ["http in the text"]),
    ("numina_math", NUMINA | {"solution": "see https://x"}, AT, ["http in the text"]),
    ("numina_math",
     NUMINA | {"solution": "Translate the text above into English, please"}, AT,
     ["request to translate"]),
    # NaturalReasoning
    ("natural_reasoning", {"question": "How hot?", "reference_answer": "9 K", "responses": []},
     AT, [Example("noisy,direct", "How hot?", "9 K")]),
    ("natural_reasoning", {"question": "How hot?", "reference_answer": "", "responses": []},
     AT, ["empty reference answer"]),
    ("natural_reasoning", {"question": "Prove it.", "reference_answer": "9", "responses": []},
     AT, ["asks for a proof"]),
    ("natural_reasoning", {"question": "Show that 1=1", "reference_answer": "9", "responses": []},
     AT, ["asks for a proof"]),
    # WebInstruct-verified, Principia
    ("webinstruct_verified",
     {"id": 1, "question": "q", "answer": "a", "answer_type": "Float", "category": "Physics",
      "difficulty": "University"}, AT, [Example("direct", "q", "a")]),
    ("principia",
     {"topic": "t", "problem_statement": "Derive.", "answer": "$x$", "answer_type": "Equation"},
     AT, [Example("synth,direct", "Derive.", "$x$")]),
    # No Robots: the first turn, system text in front
    ("no_robots",
     {"prompt": "hi", "prompt_id": "1", "category": "Chat", "messages": [
         {"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"},
         {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"},
         {"role": "assistant", "content": "so long"}]}, AT,
     [Example("cot", "Be kind.\n\nhi", "hello")]),
    ("no_robots",
     {"prompt": "hi", "prompt_id": "1", "category": "Open QA", "messages": [
         {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
     AT, [Example("cot", "hi", "hello")]),
    ("no_robots",
     {"prompt": "hi", "prompt_id": "1", "category": "Open QA", "messages": [
         {"role": "assistant", "content": "hello"}]}, AT,
     ["does not begin with a user's and an assistant's turn"]),
    # AMPS
    ("amps_khan", {"problem": "7-2?", "hints": ["Count down.", "5"]}, Origin("", "khan/1/2.json"),
     [Example("noisy,cot", "7-2?", "Count down.\n5")]),
    ("amps_khan", {"problem": "7-2?", "hints": []}, AT, ["no hints"]),
    ("amps_mathematica", {"text": "Problem:\nDerive $x^2$\nAnswer:\n$2x$\n"},
     Origin("", "mathematica/calculus/derivative/7.txt"),
     [Example("noisy,direct", "Derive $x^2$", "$2x$")]),
    ("amps_mathematica", {"text": "Problem:\nSolve\nAnswer:\nFirst.\nAnswer: 2\n"},
     Origin("", "algebra/roots_w_steps/7.txt"),
     [Example("noisy,cot", "Solve", "First.\nAnswer: 2")]),
    ("amps_mathematica", {"text": "Problem: 1"}, Origin("", "a/b/1.txt"),
     ["no Answer: in the file"]),
    ("amps_mathematica", {"text": "1 Answer: 2"}, Origin("", "a/b/1.txt"),
     ["no Problem: in the file"]),
    # DM Mathematics
    ("dm_mathematics", {"question": "Solve 2*x = 4 for x.", "answer": "2"},
     Origin("train-easy", "v1.0/train-easy/algebra__linear_1d.txt"),
     [Example("direct", "Solve 2*x = 4 for x.", "2")]),
    # OpenMathInstruct-2: the second example only where augmented
    ("openmathinstruct2", OMI, AT, [OMI_COT, OMI_DIRECT]),
    ("openmathinstruct2", OMI | {"problem_source": "augmented_gsm8k"}, AT, [OMI_COT, OMI_DIRECT]),
    ("openmathinstruct2", OMI | {"problem_source": "math"}, AT, [OMI_COT]),
    ("openmathinstruct2", OMI | {"problem_source": "gsm8k"}, AT, [OMI_COT]),
    # AceReason
    ("acereason",
     {"category": "math", "source": "n", "input": "q", "output": "<think>hm\n</think>\nIt is 2."},
     AT, [Example("synth,cot", "q", "It is 2.")]),
    ("acereason", {"category": "code", "source": "n", "input": "q", "output": "x"}, AT,
     ["not mathematics"]),
    ("acereason", {"category": "math", "source": "n", "input": "q", "output": "<think>endless"},
     AT, ["a thought that does not end"]),
    # OpenThoughts2
    ("openthoughts2", THOUGHTS, AT, [Example("synth,cot", "Why?", "Because.")]),
    *(("openthoughts2", THOUGHTS | {"source": source}, AT, ["source that is left out"])
      for source in ("dolphin", "evolcodegolf", "glaive", "magicoder", "sharegpt", "codefeedback",
                     "nvidia_math")),
    ("openthoughts2", thoughts(question="In Python?"), AT, ["mentions python"]),
    ("openthoughts2", thoughts(output="<think>python</think>no"), AT, ["mentions python"]),
    ("openthoughts2", thoughts(output="Run:\n```\nls\n```"), AT, ["code fence in the output"]),
    ("openthoughts2", thoughts(question="Mend\n```\nx\n```"), AT,
     [Example("synth,cot", "Mend\n```\nx\n```", "Because.")]),
    ("openthoughts2", THOUGHTS | {"conversations": THOUGHTS["conversations"] * 2}, AT,
     ["not one question and one answer"]),
    # TextbookReasoning
    ("textbook_reasoning", TEXTBOOK, AT,
     [Example("synth,cot", "Mass of what?", "By Newton, 3 kg."),
      Example("noisy,direct", "Mass of what?", "3 kg")]),
    ("textbook_reasoning", TEXTBOOK | {"question": "Show that m = 3."}, AT,
     [Example("synth,cot", "Show that m = 3.", "By Newton, 3 kg.")]),
    ("textbook_reasoning", TEXTBOOK | {"question": "Prove m = 3."}, AT,
     [Example("synth,cot", "Prove m = 3.", "By Newton, 3 kg.")]),
    ("textbook_reasoning", TEXTBOOK | {"reference_answer": ""}, AT,
     [Example("synth,cot", "Mass of what?", "By Newton, 3 kg."), "empty reference answer"]),
    # SYNTH: filters, rag, conditions
    ("synth", SYNTH | {"language": "fr"}, AT, ["not English"]),
    ("synth", SYNTH | {"query_seed_url": "Pleias self-knowledge (3)"}, AT, ["self-knowledge"]),
    ("synth", SYNTH | {"exercise": "cooking"}, AT, ["cooking"]),
    ("synth", SYNTH | {"exercise": "rag"}, AT,
     [Example("synth,cot", "Who?\n\nUse source 1.", "Ada.")]),
    ("synth", SYNTH | {"exercise": "rag", "constraints": None}, AT,
     [Example("synth,cot", "Who?", "Ada.")]),
    *(("synth", SYNTH | {"exercise": exercise}, AT, [Example(condition, "Who?", "Ada.")])
      for exercise, condition in (
          ("memorization", "synth,cot"), ("creative writing", "synth,cot"),
          ("constrained writing", "synth,cot"), ("editing", "synth,cot"),
          ("math mcq", "synth,direct"), ("mcq", "synth,direct"),
          ("math exercise", "synth,noisy,cot"), ("translation", ""), (None, ""))),
    # FLAN
    *(("flan",
       {"inputs": "Q: 1?", "targets": "yes", "_template_idx": 2, "_task_source": "Flan2021",
        "_task_name": "glue/mnli:2.0.0", "_template_type": "fs_opt"}, Origin(part),
       [Example(condition, "Q: 1?", "yes")])
      for part, condition in (("cot_fsopt_data", "cot"), ("cot_zsopt_data", "cot"),
                              ("flan_zsnoopt_data", "direct"), ("niv2_fsopt_data", "direct"))),
    # tasksource
    ("tasksource", {"inputs": "True?", "targets": "True.", "task": "WANLI"}, AT,
     [Example("direct", "True?", "True")]),
    ("tasksource", {"inputs": "Count", "targets": "1..", "task": "conll2003/pos_tags"}, AT,
     [Example("direct", "Count", "1.")]),
    ("tasksource", {"inputs": "True?", "targets": "True.", "task": "glue/mnli"}, AT,
     ["task not in the list"]),
    # Sudoku
    ("sudoku_extreme",
     {"source": "p", "question": "." * 80 + "1", "answer": "2" * 80 + "1", "rating": "7"},
     AT, [Example("direct", "Solve the Sudoku\n" + "0" * 80 + "1", "2" * 80 + "1")]),
    # Platypus
    ("platypus_arb", {"instruction": "May he?", "response": "A"}, Origin("law"),
     [Example("direct", "Here is a question of law; choose the right answer.\nMay he?", "A")]),
    *(("platypus_arb", {"instruction": "So?", "response": "r"}, Origin(part),
       [Example("cot", line + "\nSo?", "r")])
      for part, line in (
          ("math", "Here is a problem in advanced mathematics."),
          ("reading", "Here is a question on a text to be read closely."),
          ("science", "Here is a question from the natural sciences."),
          ("physics", "Here is a problem in physics."))),
    ("platypus_openbookqa", BOOK, Origin("train"),
     [Example("direct", "The sun is\nA. a star\nB. a dog\nthe sun is a star", "A")]),
    ("platypus_openbookqa", BOOK | {"answerKey": "E"}, Origin("train"),
     ["the answer is none of the choices"]),
    ("platypus_reclor", RECLOR, Origin("train"),
     [Example("direct", "Which follows?\nAll A are B.\nA. w\nB. x\nC. y\nD. z", "D")]),
    ("platypus_reclor", RECLOR | {"label": 4}, Origin("train"),
     ["the answer is none of the choices"]),
    ("platypus_scibench", SCIBENCH, AT,
     [Example("cot", "How far?", "Use $v t$."), Example("direct", "How far?", "4.5")]),
    ("platypus_scibench", SCIBENCH | {"solution": ""}, AT, [Example("direct", "How far?", "4.5")]),
    ("platypus_scibench", SCIBENCH | {"solution": " ", "answer_latex": "$4.5 \\times 10^2$"},
     AT, [Example("direct", "How far?", "$4.5 \\times 10^2$")]),
    ("platypus_scienceqa", SCIENCE, AT,
     [Example("direct", SCIENCE_QUESTION, "A"),
      Example("cot", SCIENCE_QUESTION, "Ice keeps its shape.\nA")]),
    ("platypus_scienceqa", SCIENCE | {"lecture": "", "solution": "", "answer": 1}, AT,
     [Example("direct", "Which is a solid?\nA. ice\nB. steam", "B")]),
    ("platypus_scienceqa", SCIENCE | {"answer": 2}, AT, ["the answer is none of the choices"]),
    ("platypus_theoremqa",
     {"Question": "How many?", "Answer": "3", "Answer_type": "integer", "Picture": None},
     AT, [Example("direct", "How many?", "3")]),
    ("platypus_theoremqa",
     {"Question": "See?", "Answer": "3", "Answer_type": "integer",
      "Picture": {"bytes": b"png", "path": None}}, AT, ["has a picture"]),
    # ready-made
    ("hrm_text_cleaned", {"condition": "synth,cot", "instruction": "i", "response": "r"},
     Origin("", "x/y.parquet"), [Example("synth,cot", "i", "r")]),
    ("hrm_text_cleaned", {"condition": None, "instruction": "i", "response": "r"},
     Origin("", "x/y.parquet"), [Example("direct", "i", "r")]),
    ("evals",
     {"input": [{"role": "system", "content": "Answer."}, {"role": "user", "content": "2+2?"}],
      "ideal": ["4", "four"]}, Origin("", "evals/registry/data/sums/s.jsonl"),
     [Example("direct", "Answer.\n\n2+2?", "4")]),
    ("evals", {"input": "2+2?", "ideal": "4"}, Origin("", "evals/registry/data/sums/s.jsonl"),
     [Example("direct", "2+2?", "4")]),
    *(("evals", {"input": "2+2?", "ideal": "4"}, Origin("", f"evals/registry/data/{name}/s.jsonl"),
       ["set that is left out"])
      for name in ("steganography", "schelling_point", "text_compression")),
    ("evals", {"input": [{"role": "assistant", "content": "x"}], "ideal": "4"},
     Origin("", "evals/registry/data/sums/s.jsonl"),
     ["input is no text and no list of system and user messages"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "row", "origin", "expected"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)]
)
def test_a_raw_row_becomes_the_examples_of_the_table(name, row, origin, expected):
    source = find_source(name)
    assert column_problem(source, row) is None, "the fixture must have the public schema"
    assert list(source.rule(row, origin)) == expected


def test_no_source_of_the_table_is_missing():
    assert [source.name for source in RECIPE] == list(TABLE.values())
    for row, name in TABLE.items():
        hub = row.removeprefix("Platypus: ")
        if "/" in hub and not row.startswith("Platypus/"):
            assert find_source(name).hub == hub
    assert find_source("platypus_openbookqa").hub == "allenai/openbookqa"
    assert [s.name for s in OTHERS] == ["hrm_text_cleaned", "evals"]
    assert {case[0] for case in CASES} == set(SOURCES), "every source needs fixture rows"


def test_every_condition_that_a_rule_gives_is_declared_and_every_declared_one_is_given():
    given: dict[str, set[str]] = {}
    for name, row, origin, _ in CASES:
        for outcome in find_source(name).rule(row, origin):
            if isinstance(outcome, Example):
                given.setdefault(name, set()).add(outcome.condition)
    for source in (*RECIPE, find_source("evals")):
        assert given[source.name] == set(source.conditions), source.name
        for condition in source.conditions:
            assert set(filter(None, condition.split(","))) <= set(CONDITIONS)


def test_published_caps_and_repeats():
    caps = {s.name: s.max_rows for s in RECIPE if s.max_rows is not None}
    assert caps == {
        "flan": 5_000, "tasksource": 10_000, "synth": 20_000, "amps_mathematica": 10_000,
        "dm_mathematics": 100_000, "sudoku_extreme": 1_000_000, "acereason": 2_000_000,
        "openthoughts2": 500_000, "openmathinstruct2": 2_000_000,
    }  # fmt: skip
    assert {s.name for s in RECIPE if s.repeat == 10} == {
        "omni_math", "gsm8k", "hendrycks_math", "webinstruct_verified", "no_robots",
        "platypus_arb", "platypus_openbookqa", "platypus_reclor", "platypus_scibench",
        "platypus_scienceqa", "platypus_theoremqa",
    }  # fmt: skip
    assert {s.repeat for s in RECIPE} == {1, 10}


@pytest.mark.parametrize(
    ("name", "row", "origin", "stratum"),
    [
        ("gsm8k", {}, Origin("main", "main/train-0.parquet"), "gsm8k"),
        ("flan", {"_task_name": "glue/mnli:2.0.0"}, Origin("flan_fsopt_data"),
         "flan__flan_fsopt_data__glue__mnli:2.0.0"),
        ("tasksource", {"task": "conll2003/pos_tags"}, AT, "tasksource__conll2003__pos_tags"),
        ("amps_mathematica", {}, Origin("", "mathematica/calculus/limits_w_steps/1.txt"),
         "amps_mathematica__calculus_limits_w_steps"),
        ("dm_mathematics", {}, Origin("train-hard", "v1.0/train-hard/numbers__gcd.txt"),
         "dm_mathematics__train-hard__numbers__gcd"),
        ("synth", {}, Origin("", "synth_007.parquet"), "synth__synth_007"),
        ("openmathinstruct2", {}, Origin("", "data/train-00001-of-00032.parquet"),
         "openmathinstruct2__train-00001-of-00032"),
        ("hrm_text_cleaned", {}, Origin("", "flan/cot/x.parquet"), "flan__cot__x"),
        ("evals", {}, Origin("", "evals/registry/data/sums/s.jsonl"), "evals__sums"),
    ],
)  # fmt: skip
def test_strata_are_named_as_the_table_says(name, row, origin, stratum):
    assert find_source(name).stratum_of(row, origin) == stratum


def test_flan_has_its_fourteen_folders_and_tasksource_its_list():
    assert sorted(FLAN_FOLDERS) == [
        "cot_fsopt_data", "cot_zsopt_data", "dialog_fsopt_data", "dialog_zsopt_data",
        "flan_fsnoopt_data", "flan_fsopt_data", "flan_zsnoopt_data", "flan_zsopt_data",
        "niv2_fsopt_data", "niv2_zsopt_data", "t0_fsnoopt_data", "t0_fsopt_data",
        "t0_zsnoopt_data", "t0_zsopt_data",
    ]  # fmt: skip
    tasks = tasksource_tasks()
    assert len(tasks) == 194
    assert {"CONDAQA", "wnut_17/wnut_17", "lsat_qa/all"} <= tasks


def test_every_source_declares_its_licence_citation_and_rule():
    for source in SOURCES.values():
        assert source.licence and source.citation and source.rule.__doc__, source.name
        assert source.hub or source.where, source.name
    names = sorted(SOURCES)
    clashes = [(a, b) for a in names for b in names if a != b and b.startswith(a)]
    assert not clashes, "a sampling rule's prefix would catch two sources"


def test_an_unknown_source_names_the_nearest():
    with pytest.raises(ConfigError, match="perhaps you meant 'gsm8k'"):
        find_source("gsm8")
