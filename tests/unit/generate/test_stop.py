"""Where answers end."""

import torch
from generate_helpers import small_tokenizer

from hrmtext.generate.stop import answer_lengths, stop_ids, stop_table


def test_an_answer_ends_at_its_first_stop_token_or_at_its_limit():
    tokens = torch.tensor([[4, 9, 9, 4], [4, 4, 4, 9], [4, 4, 4, 9], [9, 4, 4, 4], [4, 4, 0, 0]])
    stop = stop_table([9, 0], 12, torch.device("cpu"))
    lengths, stopped = answer_lengths(stop[tokens], torch.tensor([4, 4, 3, 1, 2]))
    assert lengths.tolist() == [2, 4, 3, 1, 2]
    assert stopped.tolist() == [True, True, False, True, False]


def test_the_end_token_stops_unless_other_tokens_are_named():
    tokenizer = small_tokenizer()
    assert stop_ids(tokenizer, None) == [11]
    assert stop_ids(tokenizer, []) == []
    assert stop_ids(tokenizer, ["<|im_end|>", 40]) == [7, 40]
    [seven] = tokenizer.encode_texts(["7"])[0]
    assert stop_ids(tokenizer, ["7"]) == [seven]
    assert not bool(stop_table([], 12, torch.device("cpu")).any())
