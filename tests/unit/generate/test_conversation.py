"""Conversations: append-only keys and values equal a run over the whole, in fp32."""

import pytest
import torch
from generate_helpers import text_model

from hrmtext.batch import RowLayout
from hrmtext.config.generate import GenerateConfig
from hrmtext.errors import ConfigError, DataError
from hrmtext.generate import Conversation
from hrmtext.generate.conversation import answer_conversations
from hrmtext.generate.step import DecodeStep
from hrmtext.model import KVCache, make_plan

QUESTIONS = ["count the red letters", "sort them", "what is seven?"]
SHORT = GenerateConfig(max_new_tokens=6)


@torch.inference_mode()
def whole_run(model, tokens, blocks):
    """(T, V) logits of the reference attention over all tokens at once."""
    layout = RowLayout.from_blocks([len(tokens)], [blocks if model.config.prefix_lm else []])
    plan = make_plan(layout, backend="reference")
    return model.model(torch.tensor(tokens), torch.arange(len(tokens)), plan).logits


@pytest.mark.parametrize("prefix_lm", [True, False])
def test_every_answer_equals_that_of_a_run_over_the_whole_conversation(prefix_lm):
    model = text_model(prefix_lm=prefix_lm)
    talk = Conversation(model, system="please")
    for question in QUESTIONS:
        answer = talk.ask(question, SHORT)
        context = talk.tokens[: answer.num_prompt_tokens]
        logits = whole_run(model, [*context, *answer.tokens[:-1]], talk._blocks)
        expected = logits[len(context) - 1 :].log_softmax(-1)
        assert expected.argmax(-1).tolist() == answer.tokens
        taken = expected.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), taken, rtol=1e-4, atol=1e-4)


def test_a_further_turn_reads_only_what_is_new_and_leaves_the_cache_as_it_was():
    model = text_model()
    talk = Conversation(model)
    talk.ask(QUESTIONS[0], SHORT)
    held = talk.num_cached
    before = [keys[:, :, :held].clone() for keys in talk._cache.keys]
    read = []
    model.model.model.register_forward_pre_hook(lambda _, args: read.append(len(args[0])))
    talk.ask(QUESTIONS[1], GenerateConfig(max_new_tokens=SHORT.max_new_tokens, step="eager"))
    assert read[0] == len(model.tokenizer.encode_prompt(QUESTIONS[1])) + 2  # last token and end
    assert set(read[1:]) == {1}
    for keys, old in zip(talk._cache.keys, before, strict=True):
        assert torch.equal(keys[:, :, :held], old)


def test_the_first_answer_is_that_of_generate_and_the_session_that_of_chat():
    model = text_model(seed=2)
    talk = Conversation(model)
    answer = talk.ask(QUESTIONS[0], SHORT)
    assert answer.tokens == model.generate_tokens(QUESTIONS[0], config=SHORT)[0].tokens
    given = Conversation(model, system="add numbers")
    given.add(QUESTIONS[0], "seven words")
    asked = given.ask(QUESTIONS[1], SHORT)
    messages = [
        {"role": "system", "content": "add numbers"},
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": "seven words"},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    assert model.chat(messages, max_new_tokens=6) == asked.text
    assert given.messages == [*messages, {"role": "assistant", "content": asked.text}]
    # Batched with a conversation of another length it is the same answer.
    alone = [{"role": "user", "content": QUESTIONS[0]}]
    both = answer_conversations(model, [alone, messages], "direct", SHORT)
    assert [one.tokens for one in both] == [answer.tokens, asked.tokens]


def test_what_cannot_be_answered_is_refused_and_changes_nothing():
    model = text_model(max_seq_len=40)
    talk = Conversation(model)
    talk.add("add", "seven")
    state = list(talk.tokens), list(talk.messages)
    with pytest.raises(DataError, match="context is 40; start a new conversation"):
        talk.ask("what is the list of numbers in the list of letters " * 3)
    with pytest.raises(ConfigError, match="one answer a turn"):
        talk.ask("add", GenerateConfig(num_samples=2, temperature=1.0))
    assert (talk.tokens, talk.messages) == state
    for messages, reason in (
        ([], "no messages"),
        ([{"role": "assistant", "content": "a"}], "not the user's"),
        ([{"role": "user", "content": "a"}] * 2, "two user messages"),
        ([{"role": "user", "content": "a", "tool_calls": [1]}], "tool"),
    ):
        with pytest.raises(DataError, match=reason):
            model.chat(messages)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        model.chat([{"role": "user", "content": "a"}], max_new_token=3)


def test_an_interrupted_answer_leaves_the_conversation_as_it_was(monkeypatch):
    model = text_model()
    talk = Conversation(model)
    talk.ask(QUESTIONS[0], SHORT)
    state = list(talk.tokens), talk.num_cached, list(talk._blocks)

    class Interrupted(DecodeStep):
        def __call__(self, *_):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model._steps, "get", lambda _: Interrupted(model.model))
        with pytest.raises(KeyboardInterrupt):
            talk.ask(QUESTIONS[1], SHORT)
    assert (talk.tokens, talk.num_cached, talk._blocks) == state
    again = Conversation(model)
    again.ask(QUESTIONS[0], SHORT)
    assert talk.ask(QUESTIONS[1], SHORT).tokens == again.ask(QUESTIONS[1], SHORT).tokens


@torch.inference_mode()
def test_rows_of_different_length_are_extended_together():
    model = text_model().model.double()
    rows = [([5, 6, 7], [8, 9, 10, 11]), ([12, 13, 14, 15, 16], [17, 18])]
    cache = KVCache(model.config, 2, 16, dtype=torch.float64)
    lengths = [len(first) for first, _ in rows]
    layout = RowLayout.from_prefixes(lengths, lengths)
    plan = cache.prefill(layout, make_plan(layout, dtype=torch.float64))
    tokens = torch.tensor([token for first, _ in rows for token in first])
    model(tokens, plan.positions, plan)
    plan.commit()
    # One causal token (the end of an answer), then a further prompt.
    further = RowLayout.from_blocks([4, 2], [[(1, 4)], [(1, 2)]], num_tokens=7)
    plan = cache.extend(further)
    tokens = torch.tensor([token for _, new in rows for token in new] + [0])
    logits = model(tokens, plan.positions, plan).logits
    plan.commit()
    assert cache.lengths.tolist() == [7, 7] and cache.longest == 7
    for index, (first, new) in enumerate(rows):
        blocks = [(0, len(first)), (len(first) + 1, 7)]
        whole = RowLayout.from_blocks([7], [blocks])
        plan = make_plan(whole, dtype=torch.float64, backend="reference")
        expected = model(torch.tensor(first + new), torch.arange(7), plan).logits[len(first) :]
        found = logits[:4] if index == 0 else logits[4:6]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(DataError, match="has room for 16"):
        cache.extend(RowLayout.from_blocks([10, 1], [[], []]))
