"""Drawing tokens: the distribution, the cuts, and independence of the batch."""

import numpy as np
import pytest
import torch

from hrmtext.config import build
from hrmtext.config.generate import GenerateConfig
from hrmtext.errors import ConfigError
from hrmtext.generate.sampling import Sampler, draw, row_uniforms

LOGITS = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])


def frequencies(config, count=200_000):
    """How often each token is drawn over an even grid of uniforms."""
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = draw(LOGITS.expand(count, -1), uniforms, config)
    return torch.bincount(tokens, minlength=5) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_with_the_probability_of_the_tempered_softmax(temperature):
    found = frequencies(GenerateConfig(temperature=temperature))
    torch.testing.assert_close(found, (LOGITS / temperature).softmax(0), rtol=0, atol=2e-5)


def test_top_k_draws_from_the_k_most_probable_tokens():
    found = frequencies(GenerateConfig(temperature=1.0, top_k=2))
    expected = torch.zeros(5)
    expected[[0, 2]] = LOGITS[[0, 2]].softmax(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_top_p_draws_from_the_fewest_tokens_that_hold_the_mass():
    probabilities = LOGITS.softmax(0)
    assert probabilities[0] + probabilities[2] < 0.8 < probabilities[[0, 2, 4]].sum()
    found = frequencies(GenerateConfig(temperature=1.0, top_p=0.8))
    expected = torch.zeros(5)
    expected[[0, 2, 4]] = LOGITS[[0, 2, 4]].softmax(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_top_p_counts_the_mass_that_top_k_left():
    found = frequencies(GenerateConfig(temperature=1.0, top_k=3, top_p=0.6))
    assert LOGITS[[0, 2, 4]].softmax(0)[0] > 0.6 > LOGITS.softmax(0)[0]
    assert found.tolist() == [1, 0, 0, 0, 0]


def test_a_tiny_top_p_and_a_top_k_of_one_are_greedy():
    for config in (
        GenerateConfig(temperature=3.0, top_p=1e-9),
        GenerateConfig(temperature=3.0, top_k=1),
    ):
        assert frequencies(config, 1_000).tolist() == [1, 0, 0, 0, 0]


def test_a_top_k_above_the_vocabulary_and_a_top_p_of_one_cut_nothing():
    plain = frequencies(GenerateConfig(temperature=1.0))
    for config in (
        GenerateConfig(temperature=1.0, top_k=99),
        GenerateConfig(temperature=1.0, top_p=1.0),
    ):
        torch.testing.assert_close(frequencies(config), plain, rtol=0, atol=2e-5)


def test_a_rows_numbers_depend_on_seed_prompt_and_sample_alone():
    numbers = row_uniforms(1, [5, 6], 0, 8)
    assert np.array_equal(row_uniforms(1, [5, 6], 0, 3), numbers[:3])
    for other in (
        row_uniforms(2, [5, 6], 0, 8),
        row_uniforms(1, [6, 5], 0, 8),
        row_uniforms(1, [5, 6], 1, 8),
    ):
        assert not np.array_equal(other, numbers)
    many = np.concatenate([row_uniforms(0, [i], 0, 50) for i in range(200)])
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.04


def test_rows_that_stay_keep_their_numbers():
    config = GenerateConfig(temperature=1.0)
    prompts = [[1], [2], [3]]
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    sampler = Sampler.for_rows(config, prompts, [0, 0, 0], 4, torch.device("cpu"))
    whole = [sampler(logits, step) for step in range(4)]
    sampler.keep(torch.tensor([2, 0]))
    for step in range(4):
        assert torch.equal(sampler(logits[[2, 0]], step), whole[step][[2, 0]])


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"num_samples": 0},
        {"num_samples": 2},
        {"guidance": float("inf")},
        {"batch_tokens": 0},
    ],
)
def test_options_out_of_range_are_refused_by_name(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        build(GenerateConfig, values, where="test")
