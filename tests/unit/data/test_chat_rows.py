"""Chat rows: both shapes are read, what does not fit is a counted drop, masks follow the turns."""

import collections
import json

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hrmtext.batch import IGNORE, PackedBatch, RowLayout, TokenTurn
from hrmtext.config.data import CleaningConfig
from hrmtext.data.collate import pack_rows
from hrmtext.data.example import Example, Turn, example_keys
from hrmtext.data.format import RowIndex
from hrmtext.data.rules import apply_rules
from hrmtext.data.sources.local import RowProblems, check_row, read_batches
from hrmtext.data.turns import RowTurns, check_turns
from hrmtext.errors import DataError


def openai(*messages, **extra):
    """A row from (role, content) pairs; a third item holds further fields."""
    listed = [
        {"role": role, "content": content, **(more[0] if more else {})}
        for role, content, *more in messages
    ]
    return {"messages": listed, **extra}


def sharegpt(*messages, **extra):
    return {"conversations": [{"from": a, "value": b} for a, b in messages], **extra}


TWO = (("user", "hi"), ("assistant", "hello"), ("user", "and?"), ("assistant", "bye"))
TWO_TURNS = Example("direct", "and?", "bye", (Turn("hi", "hello"),))


def test_both_shapes_give_the_same_turns():
    assert check_row(openai(*TWO)) == TWO_TURNS
    names = {"user": "human", "assistant": "gpt"}
    assert check_row(sharegpt(*((names[role], text) for role, text in TWO))) == TWO_TURNS


def test_system_text_stands_in_front_of_the_first_question():
    expected = Example("cot", "and?", "bye", (Turn("Be brief.\n\nhi", "hello"),))
    assert check_row(openai(("system", "Be brief."), *TWO, condition="cot")) == expected
    assert check_row(openai(*TWO, system="Be brief.", condition="cot")) == expected
    one = sharegpt(("system", "Be brief."), ("human", "hi"), ("gpt", "hello"))
    assert check_row(one) == Example("direct", "Be brief.\n\nhi", "hello")
    assert check_row(openai(("system", " "), *TWO)) == TWO_TURNS


def test_lists_of_text_parts_are_joined():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert check_row(openai(("user", parts), *TWO[1:])) == TWO_TURNS


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_answers_marked_so_bear_no_loss_and_trailing_ones_are_left_away(mark):
    first = openai(TWO[0], (*TWO[1], mark), *TWO[2:])
    assert check_row(first) == TWO_TURNS._replace(history=(Turn("hi", "hello", False),))
    last = openai(*TWO[:3], (*TWO[3], mark))
    assert check_row(last) == Example("direct", "hi", "hello")
    assert check_row(openai(TWO[0], (*TWO[1], mark))) == "no answer bears loss"


USER, ANSWER = TWO[:2]
DROPS = [
    (openai(*TWO, ("tool", "4")), "tool or function message"),
    (openai(USER, ("assistant", None, {"tool_calls": [{}]}), ANSWER), "tool or function message"),
    (openai(*TWO, tools=[{}]), "tool or function message"),
    (sharegpt(("human", "a"), ("function_call", "b")), "tool or function message"),
    (openai(("user", [{"type": "image_url"}]), ANSWER), "image or other content"),
    (openai(USER, ("assistant", " ")), "empty assistant message"),
    (openai(("user", ""), ANSWER), "empty user message"),
    (openai(USER, ("assistant", None)), "message without text"),
    (openai(USER, ("assistant", 4)), "message without text"),
    (openai(ANSWER, *TWO), "starts with an answer"),
    (openai(USER, USER, ANSWER), "two user messages in a row"),
    (openai(USER, ANSWER, ANSWER), "two assistant messages in a row"),
    (openai(USER), "ends without an answer"),
    (openai(*TWO, USER), "ends without an answer"),
    (openai(("system", "a")), "no user message"),
    (openai(*TWO, ("system", "a"), USER, ANSWER), "system message behind the first"),
    (openai(("system", "a"), *TWO, system="b"), "system text twice"),
    (openai(("bot", "a"), ANSWER), "unknown role"),
    (openai(("user", "a", {"weight": 0}), ANSWER), "no answer"),
    (openai(USER, (*ANSWER, {"weight": 0.5})), "neither 0 nor 1"),
    (openai(USER, (*ANSWER, {"train": "no"})), "neither true nor false"),
    (openai(*TWO, condition="fast"), "unknown condition"),
    (openai(), "no messages"),
    ({"messages": "hi"}, "not a list"),
    ({"messages": ["hi"]}, "not an object"),
    ({"messages": [{"text": "hi"}]}, "unknown message shape"),
    ({"messages": [{"role": "user", "from": "human", "content": "a"}]}, "unknown message shape"),
    ({"messages": None}, "no messages"),
    ({**openai(*TWO), **sharegpt(("human", "a"), ("gpt", "b"))}, "both messages and conv"),
    ({**openai(*TWO), "instruction": "a"}, "both a conversation and"),
    (openai(("user", "a\0"), ANSWER), "NUL"),
    (openai(USER, ("assistant", "\ud800"), USER, ANSWER), "lone surrogate"),
]


@pytest.mark.parametrize(("row", "reason"), DROPS)
def test_what_does_not_fit_is_dropped_with_its_reason(row, reason):
    found = check_row(row)
    assert isinstance(found, str) and reason in found


def test_strict_names_the_row(tmp_path):
    path = tmp_path / "logs.jsonl"
    path.write_text(json.dumps(openai(*TWO)) + "\n" + json.dumps(openai(USER)) + "\n")
    with pytest.raises(DataError, match=r"logs\.jsonl:2: conversation ends without an answer"):
        list(read_batches(path, RowProblems(strict=True)))
    problems = RowProblems()
    assert list(read_batches(path, problems)) == [[TWO_TURNS]]
    assert problems.counts == {"conversation ends without an answer": 1}


def test_parquet_columns_of_messages_are_read(tmp_path):
    path = tmp_path / "logs.parquet"
    rows = [openai(*TWO)["messages"], openai(USER, (*ANSWER, {"weight": 1}))["messages"], None]
    table = pyarrow.table({"messages": rows, "system": ["S", None, None], "id": [1, 2, 3]})
    parquet.write_table(table, path)
    problems = RowProblems()
    (batch,) = read_batches(path, problems)
    assert batch == [
        TWO_TURNS._replace(history=(Turn("S\n\nhi", "hello"),)),
        Example("direct", "hi", "hello"),
    ]
    assert problems.counts == {"no messages": 1}
    parquet.write_table(pyarrow.table({"messages": ["[]"]}), path)
    with pytest.raises(DataError, match="'messages' is string, expected lists of messages"):
        list(read_batches(path, problems))


def test_cleaned_rows_with_a_history_come_back_and_damaged_ones_do_not():
    row = TWO_TURNS.to_mapping()
    assert check_row(row) == TWO_TURNS
    assert check_row({**row, "history": json.dumps(row["history"])}) == TWO_TURNS
    for value, reason in (
        ("[", "not JSON"),
        ({}, "not a list"),
        ([{"instruction": "a"}], "without instruction or response"),
        ([{"instruction": "a", "response": "b", "train": 1}], "neither true nor false"),
        ([{"instruction": "a", "response": "b", "weight": 1}], "something other"),
        ([{"instruction": "a", "response": " "}], "empty response"),
    ):
        found = check_row({**row, "history": value})
        assert isinstance(found, str) and reason in found


def test_cleaning_rules_see_every_turn():
    history = (Turn("I am a@b.example.org", "<think>hm</think>Hello a@b.example.org", False),)
    row = Example("direct", "and then?", "nothing", history)
    config = CleaningConfig(pii="mask", remove_thinking=True)
    changed = collections.Counter()
    result = apply_rules(row, config, changed)
    assert not isinstance(result, str) and result[:3] == row[:3]
    (turn,) = result.history
    assert "a@b" not in turn.instruction + turn.response and not turn.train
    assert turn.response.startswith("Hello ") and changed["thinking removed"] == 1
    dropped = apply_rules(row, CleaningConfig(pii="drop"), collections.Counter())
    assert isinstance(dropped, str) and dropped.startswith("personal data")


def test_a_follow_up_is_compared_with_all_that_came_before():
    first, second = example_keys(TWO_TURNS)
    assert [first] == example_keys(Example("cot", " HI ", "another"))
    assert second not in example_keys(Example("direct", "and?", "bye"))
    assert second not in example_keys(TWO_TURNS._replace(history=(Turn("hi", "other"),)))


token_lists = st.lists(st.integers(1, 99), min_size=1, max_size=4)
token_turns = st.lists(st.builds(TokenTurn, token_lists, token_lists, st.booleans()), max_size=3)
token_rows = st.lists(
    st.tuples(token_turns, token_lists, token_lists).map(
        lambda parts: [*parts[0], TokenTurn(*parts[1:])]
    ),
    min_size=1,
    max_size=5,
)


def as_arrays(rows):
    """Tokens, index and turns as the tokeniser lays them."""
    tokens, index, start, count, values = [], [], [], [], []
    for turns in rows:
        begin = len(tokens)
        start.append(len(values))
        count.append(len(turns) - 1)
        for number, turn in enumerate(turns):
            tokens += turn.prompt
            prompt_end = len(tokens)
            tokens += turn.response
            if number < len(turns) - 1:
                values.append([prompt_end - begin, len(tokens) - begin, turn.supervised])
        index.append([begin, prompt_end - begin, prompt_end, len(tokens) - prompt_end])
    turns = RowTurns(np.array(start), np.array(count), np.array(values).reshape(-1, 3))
    return np.array(tokens), RowIndex(*np.array(index).T), turns


@settings(max_examples=80, deadline=None, derandomize=True)
@given(token_rows, st.booleans(), st.sampled_from([None, 5]))
def test_packing_by_index_arithmetic_equals_the_slow_oracle(rows, prefix_lm, padding):
    tokens, index, turns = as_arrays(rows)
    check_turns("folder", turns, index.inst_len)
    size = None if padding is None else len(tokens) + padding
    fast = pack_rows(tokens, index, turns, num_tokens=size, prefix_lm=prefix_lm)
    slow = PackedBatch.from_turns(rows, num_tokens=size, prefix_lm=prefix_lm)
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(getattr(fast, name), getattr(slow, name))
    assert fast.layout.lengths == slow.layout.lengths
    assert torch.equal(fast.layout.visible_end, slow.layout.visible_end)
    fast.validate(100)


def test_a_row_of_two_turns_by_hand():
    rows = [[TokenTurn([1, 2], [3, 4]), TokenTurn([5, 6, 7], [8, 9])]]
    batch = PackedBatch.from_turns(rows)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.labels.tolist() == [IGNORE, 3, 4, IGNORE, IGNORE, IGNORE, 8, 9]
    assert batch.layout.visible_end.tolist() == [2, 2, 3, 4, 7, 7, 7, 8]
    rows = [[rows[0][0]._replace(supervised=False), rows[0][1]]]
    assert PackedBatch.from_turns(rows).labels.tolist() == [IGNORE] * 6 + [8, 9]
    assert RowLayout.from_blocks([8], [[(0, 2), (4, 7)]]).visible_end.tolist() == [
        2, 2, 3, 4, 7, 7, 7, 8,
    ]  # fmt: skip
    # Every token bears loss where prompts do, but for answers that are marked as bearing none.
    tokens, index, turns = as_arrays(rows)
    batch = pack_rows(tokens, index, turns, prefix_lm=False, supervise_prompts=True)
    assert batch.labels.tolist() == [2, IGNORE, IGNORE, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("blocks", [[(0, 4), (3, 5)], [(2, 9)], [(4, 5), (0, 2)]])
def test_blocks_that_overlap_or_leave_the_row_are_refused(blocks):
    with pytest.raises(DataError, match="expected each to start"):
        RowLayout.from_blocks([8], [blocks])
