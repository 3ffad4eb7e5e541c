"""TextModel: batches equal one-by-one, limits, stops, guidance, the self-test."""

import shutil

import pytest
import torch
from generate_helpers import sentences, text_model

from hrmtext.config.generate import GenerateConfig
from hrmtext.errors import BackendError, ConfigError, DataError, NonFiniteError
from hrmtext.generate import decode as decode_module
from hrmtext.generate import runner as runner_module
from hrmtext.generate.step import compiled_width
from hrmtext.model import Depth

PROMPTS = sentences(13, seed=4)
SAMPLED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 3}


def common_stop(model, prompts, rank=0):
    """A token that greedy answers use often, so that rows stop at different lengths."""
    answers = model.generate_tokens(prompts, config=GenerateConfig(max_new_tokens=24))
    tokens = torch.tensor([t for answer in answers for t in answer.tokens])
    return int(torch.bincount(tokens).argsort(descending=True)[rank])


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch_tokens", [None, 150])
def test_a_batch_gives_what_each_prompt_gives_alone(options, batch_tokens):
    model = text_model()
    stop = list(range(40, 330, 16)) if options else [common_stop(model, PROMPTS)]
    config = GenerateConfig(max_new_tokens=40, batch_tokens=batch_tokens, **options)
    conditions = [("direct", "synth,cot", "")[i % 3] for i in range(len(PROMPTS))]
    together = model.generate_tokens(PROMPTS, conditions, config, stop_tokens=stop)
    alone = [
        model.generate_tokens(prompt, condition, config, stop_tokens=stop)[0]
        for prompt, condition in zip(PROMPTS, conditions, strict=True)
    ]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [a.finish_reason for a in together] == [a.finish_reason for a in alone]
    assert [a.text for a in together] == [a.text for a in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    lengths = {len(a.tokens) for a in together}
    assert len(lengths) >= 3, "rows must end at different lengths for this test to say anything"


def test_greedy_tokens_are_the_argmax_of_uncached_logits():
    model = text_model()
    for prompt in PROMPTS[:3]:
        [answer] = model.generate_tokens(prompt, config=GenerateConfig(max_new_tokens=12))
        ids, given = model.tokenizer.encode_prompt(prompt), []
        for token, logprob in zip(answer.tokens, answer.logprobs, strict=True):
            logits = uncached(model, ids, given)[-1]
            assert int(logits.argmax()) == token
            assert float(logits.log_softmax(0)[token]) == pytest.approx(logprob, abs=1e-4)
            given.append(token)


@torch.no_grad()
def uncached(model, prompt_ids, answer_ids, depth=None):
    """(T, V) logits of one pass of the reference backend."""
    from hrmtext.batch import RowLayout
    from hrmtext.model import make_plan

    ids = [*prompt_ids, *answer_ids]
    layout = RowLayout.from_prefixes([len(ids)], [len(prompt_ids)])
    plan = make_plan(layout, backend="reference")
    return model.model(torch.tensor(ids), torch.arange(len(ids)), plan, depth=depth).logits


def test_rows_leave_the_batch_and_the_cache_grows(monkeypatch):
    model = text_model()
    seen = {"keep": 0, "grow": 0, "rows": []}
    real_keep, real_grow = decode_module.KVCache.keep, decode_module.grow
    real_advance = decode_module.KVCache.advance

    def keep(self, rows):
        seen["keep"] += 1
        real_keep(self, rows)

    def grow(cache, final):
        seen["grow"] += 1
        real_grow(cache, final)

    def advance(self):
        seen["rows"].append(self.num_rows)
        assert self.longest == int(self.lengths.max()), "decoding attends more than it holds"
        real_advance(self)

    stop = [common_stop(model, PROMPTS)]
    config = GenerateConfig(max_new_tokens=60)
    expected = model.generate_tokens(PROMPTS, config=config, stop_tokens=stop)
    monkeypatch.setattr(decode_module.KVCache, "keep", keep)
    monkeypatch.setattr(decode_module.KVCache, "advance", advance)
    monkeypatch.setattr(decode_module, "grow", grow)
    monkeypatch.setattr(decode_module, "MIN_GROWTH_TOKENS", 4)
    found = model.generate_tokens(PROMPTS, config=config, stop_tokens=stop)
    assert [a.tokens for a in found] == [a.tokens for a in expected]
    assert seen["keep"] > 0 and seen["grow"] > 1
    assert seen["rows"][0] == len(PROMPTS) > seen["rows"][-1]


@pytest.mark.parametrize("steps", [3, 7, 1_000])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_checking_for_finished_rows_less_often_changes_nothing(monkeypatch, steps, options):
    model = text_model(max_seq_len=44)  # some rows meet max_seq_len, others max_new_tokens
    stop = [common_stop(model, PROMPTS), *range(40, 330, 32)]
    config = GenerateConfig(max_new_tokens=30, **options)
    expected = model.generate_tokens(PROMPTS, config=config, stop_tokens=stop)
    assert {a.finish_reason for a in expected} == {"stop", "length"}
    monkeypatch.setitem(decode_module.STEPS_PER_CHECK, "cpu", steps)
    monkeypatch.setattr(decode_module, "SHRINK_BELOW", 0.5)
    found = model.generate_tokens(PROMPTS, config=config, stop_tokens=stop)
    assert [a.tokens for a in found] == [a.tokens for a in expected]
    assert [a.finish_reason for a in found] == [a.finish_reason for a in expected]


def test_samples_differ_from_each_other_and_not_from_call_to_call():
    model = text_model()
    config = GenerateConfig(max_new_tokens=10, num_samples=4, temperature=1.0, batch_tokens=100)
    first = model.generate_tokens(PROMPTS[:3], config=config)
    assert len(first) == 12
    for prompt in range(3):
        of_prompt = [tuple(a.tokens) for a in first[4 * prompt : 4 * prompt + 4]]
        assert len(set(of_prompt)) == 4
    again = model.generate(PROMPTS[:3], max_new_tokens=10, num_samples=4, temperature=1.0)
    assert again == [a.text for a in first]
    single = model.generate(PROMPTS[1], max_new_tokens=10, temperature=1.0)
    assert single == [first[4].text]
    other = model.generate(PROMPTS[1], max_new_tokens=10, temperature=1.0, seed=1)
    assert other != single


def test_a_stop_token_ends_an_answer_and_is_not_in_its_text():
    model = text_model()
    stop = common_stop(model, PROMPTS)
    config = GenerateConfig(max_new_tokens=24)
    free = model.generate_tokens(PROMPTS, config=config, stop_tokens=[])
    stopped = model.generate_tokens(PROMPTS, config=config, stop_tokens=[stop])
    assert {a.finish_reason for a in free} == {"length"}
    assert {len(a.tokens) for a in free} == {24}
    assert "stop" in {a.finish_reason for a in stopped}
    for whole, cut in zip(free, stopped, strict=True):
        if stop in whole.tokens:
            end = whole.tokens.index(stop)
            assert cut.tokens == whole.tokens[: end + 1] and cut.finish_reason == "stop"
            assert cut.text == model.tokenizer.decode(whole.tokens[:end])
        else:
            assert cut.tokens == whole.tokens and cut.finish_reason == "length"


def test_stop_tokens_by_text_and_wrong_ones():
    model = text_model()
    config = GenerateConfig(max_new_tokens=4)
    default = model.generate_tokens(PROMPTS[:2], config=config)
    named = model.generate_tokens(PROMPTS[:2], config=config, stop_tokens=["<|box_end|>"])
    assert [a.tokens for a in default] == [a.tokens for a in named]
    with pytest.raises(DataError, match="exactly one"):
        model.generate("x", stop_tokens=["numbers and letters"])
    with pytest.raises(DataError, match="outside the vocabulary"):
        model.generate("x", stop_tokens=[100_000])


def test_a_row_ends_at_max_seq_len_with_the_reason_length():
    model = text_model(max_seq_len=40)
    config = GenerateConfig(max_new_tokens=60)
    for answer in model.generate_tokens(PROMPTS, config=config, stop_tokens=[]):
        assert answer.num_prompt_tokens + len(answer.tokens) == 40
        assert answer.finish_reason == "length"


def test_a_prompt_without_room_for_an_answer_is_refused():
    model = text_model(max_seq_len=24)
    fits = "7" * (23 - 3)
    assert len(model.generate_tokens(fits)[0].tokens) == 1
    with pytest.raises(DataError, match=r"prompt 1 has 24 tokens.*at most 23"):
        model.generate(["7", fits + "7"])


def test_no_prompts_give_no_answers_and_wrong_conditions_are_refused():
    model = text_model()
    assert model.generate([]) == []
    with pytest.raises(DataError, match="perhaps you meant 'direct'"):
        model.generate("x", condition="dircet")
    with pytest.raises(DataError, match="2 instructions but 1 conditions"):
        model.generate(["x", "y"], condition=["direct"])


def test_condition_and_prompt_decide_the_answer():
    model = text_model()
    answers = {
        condition: model.generate(PROMPTS[0], condition, max_new_tokens=12)[0]
        for condition in ("direct", "cot", "synth,cot", "cot,synth")
    }
    assert len(set(answers.values())) == 4


@pytest.mark.parametrize("weight", [-0.5, 0.1, 0.5])
def test_guidance_is_the_formula_of_the_paper(weight):
    model = text_model()
    first_cycle = Depth(1, model.config.L_cycles, (False,) * (model.config.L_cycles + 1))
    prompt = PROMPTS[2]
    last = model.logits(prompt)
    first = model.logits(prompt, depth=first_cycle)
    expected = (1 + weight) * last - weight * first
    torch.testing.assert_close(model.logits(prompt, guidance=weight), expected)
    [answer] = model.generate_tokens(
        prompt, config=GenerateConfig(max_new_tokens=10, guidance=weight)
    )
    ids, given = model.tokenizer.encode_prompt(prompt), []
    for token in answer.tokens:
        deep = uncached(model, ids, given)[-1]
        shallow = uncached(model, ids, given, depth=first_cycle)[-1]
        assert int(((1 + weight) * deep - weight * shallow).argmax()) == token
        given.append(token)


def test_fewer_cycles_can_be_asked_for():
    model = text_model()
    shallow = Depth(1, 2, (False,) * 3)
    [answer] = model.generate_tokens(
        PROMPTS[0], config=GenerateConfig(max_new_tokens=10), depth=(1, 2)
    )
    ids, given = model.tokenizer.encode_prompt(PROMPTS[0]), []
    for token in answer.tokens:
        assert int(uncached(model, ids, given, depth=shallow)[-1].argmax()) == token
        given.append(token)
    with pytest.raises(ConfigError, match="expected from"):
        model.generate("x", depth=(3, 3))
    with pytest.raises(ConfigError, match="but one"):
        model.generate("x", depth=(1, 3), guidance=0.1)


def test_logits_of_prompt_and_response_are_those_of_one_pass():
    model = text_model()
    prompt, response = PROMPTS[3], PROMPTS[4]
    ids = model.tokenizer.encode_prompt(prompt)
    answer = model.tokenizer.encode_texts([response])[0]
    found = model.logits(prompt, response)
    assert found.shape == (len(ids) + len(answer), 384)
    torch.testing.assert_close(found, uncached(model, ids, answer), rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="max_seq_len"):
        model.logits(prompt, "7" * 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix_lm", [True, False])
def test_the_selftest_passes_on_a_sound_model(dtype, prefix_lm):
    model = text_model(prefix_lm=prefix_lm)
    model.model.to(dtype)
    assert model.selftest() >= 0


def test_the_selftest_finds_a_path_without_the_prefix_mask(monkeypatch):
    model = text_model()
    real = decode_module.RowLayout.from_prefixes

    class Causal:
        @staticmethod
        def from_prefixes(lengths, prefixes):
            return real(lengths, [0] * len(lengths))

    monkeypatch.setattr(decode_module, "RowLayout", Causal)
    with pytest.raises(BackendError, match="self-test"):
        model.selftest()
    # Even where the logits would pass, the mask itself is looked at.
    monkeypatch.setattr(runner_module, "RowLayout", Causal)
    with pytest.raises(BackendError, match="does not see the prompt's end"):
        model.selftest()


def test_damaged_weights_and_a_foreign_tokenizer_are_refused():
    model = text_model()
    with torch.no_grad():
        model.model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN"):
        model.generate("x")
    with pytest.raises(DataError, match=r"330 entries.*only 320.*do not belong together"):
        text_model(vocab_size=320)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inside
def test_a_compiled_step_gives_the_answers_of_the_eager_one():
    """Rows of different length and limits, some finished long before others, two widths."""
    model = text_model(num_layers_per_stack=1, L_cycles=1)  # the compiler's time is that of calls
    stop = [common_stop(model, PROMPTS)]
    for options in ({}, SAMPLED):
        eager, compiled = (
            model.generate_tokens(
                PROMPTS,
                config=GenerateConfig(max_new_tokens=70, step=step, **options),
                stop_tokens=stop,
            )
            for step in ("eager", "compiled")
        )
        assert [a.tokens for a in compiled] == [a.tokens for a in eager]
        assert len({len(a.tokens) for a in eager}) > 1, "the rows were to end at different times"


def test_a_compiled_step_reads_few_different_widths():
    assert {compiled_width(n, 4096) for n in range(4096)} == {64, 128, 256, 512, 1024, 2048, 4096}
    assert all(n < compiled_width(n, 4096) for n in range(4096))
    assert compiled_width(70, 100) == 100
