"""Packed batches: labels, positions, the mask rule, and refusal of what makes no sense."""

import dataclasses

import pytest
import torch

from hrmtext.batch import IGNORE, PackedBatch, RowLayout
from hrmtext.errors import DataError


def test_the_last_prompt_token_predicts_the_first_response_token():
    batch = PackedBatch.from_rows([([1, 2, 3], [4, 5]), ([6], [7])], num_tokens=7, pad_token=9)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 6, 9, 9]
    assert batch.labels.tolist() == [IGNORE, IGNORE, 4, 5, 7, IGNORE, IGNORE]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert batch.layout.lengths == (4, 1)
    assert batch.layout.visible_end.tolist() == [3, 3, 3, 4, 1, 0, 0]
    assert batch.supervised().tolist() == [2, 3, 4]
    batch.validate(vocab_size=10)


def test_without_the_prefix_mask_every_row_is_causal():
    batch = PackedBatch.from_rows([([1, 2, 3], [4, 5])], prefix_lm=False)
    assert batch.layout.visible_end.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("rows", "message"),
    [([([], [1])], "0 prompt"), ([([1], [])], "0 response")],
)
def test_an_empty_side_is_refused(rows, message):
    with pytest.raises(DataError, match=message):
        PackedBatch.from_rows(rows)


def test_too_many_tokens_are_refused():
    with pytest.raises(DataError, match="rows have 4 tokens, but the stream only 3"):
        PackedBatch.from_rows([([1, 2, 3], [4, 5])], num_tokens=3)


@pytest.mark.parametrize("prefix", [-1, 4])
def test_a_prefix_outside_its_row_is_refused(prefix):
    with pytest.raises(DataError, match="0 <= prefix <= length"):
        RowLayout.from_prefixes([3], [prefix])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.tensor([1, 2, 70])}, "was the data tokenised for another vocabulary"),
        ({"tokens": torch.tensor([1, 2])}, r"expected torch.int64 of shape \(3,\)"),
        ({"labels": torch.tensor([-1, 3, 4])}, "labels leave the vocabulary"),
        ({"positions": torch.tensor([0, 1, 1])}, "do not count from 0"),
        ({"tokens": torch.tensor([1.0, 2, 3])}, "torch.float32"),
    ],
)
def test_validate_finds_what_a_model_would_silently_misread(change, message):
    batch = PackedBatch.from_rows([([1, 2], [3, 4])])
    with pytest.raises(DataError, match=message):
        dataclasses.replace(batch, **change).validate(vocab_size=64)


def test_validate_finds_a_mask_that_leaves_its_row():
    batch = PackedBatch.from_rows([([1, 2], [3, 4])])
    layout = dataclasses.replace(batch.layout, visible_end=torch.tensor([2, 2, 4]))
    with pytest.raises(DataError, match="leaves the row"):
        dataclasses.replace(batch, layout=layout).validate(vocab_size=64)
