"""The KV cache: rows that leave, tokens that are taken back, limits."""

import pytest
import torch
from model_helpers import model_in, run

from hrmtext.batch import RowLayout
from hrmtext.errors import DataError
from hrmtext.model import KVCache, make_plan
from hrmtext.model.flops import kv_bytes_per_token

PROMPTS = [[3, 4, 5, 6], [9, 8], [20, 21, 22, 23, 24, 25]]


@torch.no_grad()
def filled(model, prompts=PROMPTS, capacity=12):
    """A cache after the prompts."""
    lengths = [len(p) for p in prompts]
    cache = KVCache(model.config, len(prompts), capacity, dtype=torch.float64)
    layout = RowLayout.from_prefixes(lengths, lengths)
    plan = cache.prefill(layout, make_plan(layout, dtype=torch.float64))
    tokens = torch.tensor([t for p in prompts for t in p])
    model(tokens, torch.cat([torch.arange(n) for n in lengths]), plan)
    plan.commit()
    return cache


@torch.no_grad()
def decode(model, cache, tokens):
    """Logits after one further token a row."""
    plan = cache.decode()
    logits = model(torch.tensor(tokens), plan.positions, plan).logits
    plan.commit()
    return logits


def uncached(model, prompt, response):
    return run(model, [prompt + response], [len(prompt)], backend="reference").logits[-1]


def test_kept_rows_go_on_as_if_alone_in_the_new_order():
    model = model_in()
    cache = filled(model)
    decode(model, cache, [1, 2, 3])
    cache.keep(torch.tensor([2, 0]))
    logits = decode(model, cache, [5, 6])
    for row, (prompt, response) in enumerate([(PROMPTS[2], [3, 5]), (PROMPTS[0], [1, 6])]):
        expected = uncached(model, prompt, response)
        torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)


def test_repeated_rows_share_a_prompt():
    model = model_in()
    cache = filled(model)
    cache.keep(torch.tensor([1, 1]))
    logits = decode(model, cache, [5, 6])
    for row, token in enumerate((5, 6)):
        torch.testing.assert_close(
            logits[row], uncached(model, PROMPTS[1], [token]), rtol=1e-9, atol=1e-9
        )


def test_trimmed_tokens_are_forgotten():
    model = model_in()
    cache = filled(model)
    for token in (40, 41, 42):
        decode(model, cache, [token] * 3)
    cache.trim(torch.tensor([4, 3, 6]))
    logits = decode(model, cache, [7, 7, 7])
    for row, response in enumerate(([7], [40, 7], [7])):
        expected = uncached(model, PROMPTS[row], response)
        torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(DataError, match="only shorten"):
        cache.trim(torch.tensor([99, 1, 1]))


def test_a_full_cache_and_a_wrong_prefill_are_refused():
    model = model_in()
    cache = filled(model, capacity=7)
    decode(model, cache, [1, 1, 1])
    with pytest.raises(DataError, match="cache is full"):
        cache.decode()
    layout = RowLayout.from_prefixes([9], [9])
    with pytest.raises(DataError, match="do not fit"):
        cache.prefill(layout, make_plan(layout))


def test_memory_is_that_of_every_slot():
    config = model_in().config
    cache = KVCache(config, 3, 12, dtype=torch.bfloat16)
    assert cache.nbytes == 3 * 12 * kv_bytes_per_token(config, 2)
    assert (cache.num_rows, cache.capacity) == (3, 12)


def test_every_stack_call_and_layer_has_its_own_slot():
    config = model_in(num_layers_per_stack=3).config
    slots = [
        config.slot(h, call, layer)
        for h in range(config.H_cycles)
        for call in range(config.L_cycles + 1)
        for layer in range(3)
    ]
    assert slots == list(range(config.num_slots))
