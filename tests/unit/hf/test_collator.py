"""PrefixLMCollator: the documentation's arrays, every form of a row, limits, packing."""

import pytest
import torch
import transformers
from hf_cases import VOCAB, small_config, small_model

from hrmtext.data.tokenizer import PromptTokenizer, export_tokenizer, train_tokenizer
from hrmtext.errors import ConfigError, DataError
from hrmtext.hf import PrefixLMCollator
from hrmtext.hf.configuration import VARLEN

PAIRS = [
    {"instruction_ids": [6, 8, 40, 41, 7], "response_ids": [50, 11]},
    {"instruction_ids": [6, 8, 7], "response_ids": [51, 52, 53, 11]},
    {"instruction_ids": [6, 7], "response_ids": [11]},
]
EXPECTED = {
    "input_ids": [[6, 8, 40, 41, 7, 50, 11], [6, 8, 7, 51, 52, 53, 11], [6, 7, 11, 0, 0, 0, 0]],
    "token_type_ids": [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]],
    "attention_mask": [[1] * 7, [1] * 7, [1, 1, 1, 0, 0, 0, 0]],
    "labels": [
        [-100] * 5 + [50, 11],
        [-100] * 3 + [51, 52, 53, 11],
        [-100, -100, 11] + [-100] * 4,
    ],
}
"""What `collate_prefixlm` of transformers' documentation page makes of `PAIRS`."""


def lists(batch):
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    return {name: tensor.tolist() for name, tensor in batch.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """transformers' tokenizer as an export writes it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    plain = PromptTokenizer(train_tokenizer(["add one and two, please"] * 4, 290))
    export_tokenizer(plain, folder, 64)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_the_documentation_example_gives_the_documented_arrays():
    assert lists(PrefixLMCollator()(PAIRS)) == EXPECTED


@pytest.mark.parametrize(
    "form",
    [
        lambda ids, n: {"prompt_ids": ids[:n], "completion_ids": ids[n:]},
        lambda ids, n: {"input_ids": ids, "prompt_length": n},
        lambda ids, n: {"input_ids": ids, "token_type_ids": [1] * n + [0] * (len(ids) - n)},
        lambda ids, n: {"input_ids": ids, "completion_mask": [0] * n + [1] * (len(ids) - n)},
        lambda ids, n: {"input_ids": ids, "labels": [-100] * n + ids[n:], "seq_lengths": [9]},
        lambda ids, n: {"input_ids": torch.tensor(ids), "prompt_length": torch.tensor(n)},
        lambda ids, n: {
            "input_ids": [0, 0, *ids],
            "attention_mask": [0, 0] + [1] * len(ids),
            "token_type_ids": [0, 0] + [1] * n + [0] * (len(ids) - n),
        },
    ],
    ids=["pair", "length", "types", "completion mask", "labels", "tensors", "padded"],
)
def test_every_form_of_a_row_gives_the_same_batch(form):
    rows = [
        form(row["instruction_ids"] + row["response_ids"], len(row["instruction_ids"]))
        for row in PAIRS
    ]
    assert lists(PrefixLMCollator()(rows)) == EXPECTED


def test_text_rows_are_encoded_as_for_training_and_special_tokens_in_them_are_text(tokenizer):
    rows = [
        {"instruction": "add one", "response": "two", "condition": "synth,cot", "id": 7},
        {"instruction": "say <|im_end|>", "response": "<|box_end|>"},
        {"instruction": "add", "response": "x", "condition": None},
    ]
    batch = PrefixLMCollator(tokenizer)(rows)
    plain = PromptTokenizer(tokenizer.backend_tokenizer)
    for index, (row, condition) in enumerate(
        zip(rows, ("synth,cot", "direct", "direct"), strict=True)
    ):
        prompt = plain.encode_prompt(row["instruction"], condition)
        response = plain.encode_response(row["response"])
        real = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][real].tolist() == prompt + response
        assert int(batch["token_type_ids"][index].sum()) == len(prompt)
        assert batch["labels"][index][real].tolist() == [-100] * len(prompt) + response
    assert batch["input_ids"][2, -1] == tokenizer.pad_token_id == 5
    with pytest.raises(DataError, match="give the tokenizer"):
        PrefixLMCollator()(rows)


def test_left_padding_and_rounding_move_the_same_rows():
    batch = PrefixLMCollator(padding_side="left", pad_to_multiple_of=4, pad_token_id=9)(PAIRS)
    for name, rows in EXPECTED.items():
        fill = {"input_ids": 9, "labels": -100}.get(name, 0)
        for index, row in enumerate(rows):
            count = sum(EXPECTED["attention_mask"][index])
            assert batch[name][index].tolist() == [fill] * (8 - count) + row[:count]


def test_labels_choose_response_tokens():
    row = {"input_ids": [6, 7, 40, 41, 11], "prompt_length": 2, "labels": [-100] * 4 + [11]}
    assert PrefixLMCollator()([row])["labels"].tolist() == [[-100] * 4 + [11]]
    row |= {"labels": [-100, -100, 40, -100, 11]}
    assert PrefixLMCollator()([row])["labels"].tolist() == [row["labels"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "remove_unused_columns=False"),
        ({}, "remove_unused_columns=False"),
        ({"input_ids": [1, 2, 3]}, "where its prompt ends"),
        ({"instruction_ids": [], "response_ids": [1, 2]}, "0 prompt and 2 response"),
        ({"instruction_ids": [1], "response_ids": []}, "1 prompt and 0 response"),
        ({"input_ids": [1, 2], "token_type_ids": [1, 1]}, "mark all that they are given"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "completion_only_loss=True"),
        ({"input_ids": [1, 2, 3], "prompt_length": 3}, "3 prompt and 0 response"),
        ({"input_ids": [1, 2, 3], "prompt_length": 2, "labels": [-100, 2, 3]}, "read off"),
        ({"input_ids": [1, 2, 3], "prompt_length": 2, "labels": [-100] * 3}, "no token bears"),
        ({"input_ids": [1, 2, 3, 4], "token_type_ids": [1, 0, 1, 0]}, "has a gap"),
        ({"input_ids": [1, 2, 3], "token_type_ids": [0, 1, 0]}, "does not open the row"),
        ({"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]}, "labels have a gap"),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2]}, "labels has 2 entries for 3 tokens"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_refused_with_its_number(row, message):
    with pytest.raises(DataError, match=message) as caught:
        PrefixLMCollator()([PAIRS[0], row])
    assert "row 1" in str(caught.value)


def test_an_empty_batch_is_refused():
    with pytest.raises(DataError, match="no rows"):
        PrefixLMCollator()([])


def test_long_rows_are_refused_or_their_response_is_cut_and_counted_and_prompts_never(tokenizer):
    with pytest.raises(DataError, match=r"row 0 has 7 tokens, 5 of them prompt; at most 6"):
        PrefixLMCollator(max_length=6)(PAIRS)
    cutting = PrefixLMCollator(max_length=6, too_long="cut_response")
    batch = cutting(PAIRS)
    assert batch["input_ids"].tolist()[:2] == [[6, 8, 40, 41, 7, 50], [6, 8, 7, 51, 52, 53]]
    assert cutting.num_cut == 2
    with pytest.raises(DataError, match="shorten the prompt"):
        PrefixLMCollator(max_length=5, too_long="cut_response")(PAIRS)
    # The exported tokenizer knows the model's longest row.
    with pytest.raises(DataError, match="at most 64"):
        PrefixLMCollator(tokenizer)([{"instruction_ids": [6] * 60, "response_ids": [7] * 5}])


@pytest.mark.parametrize(
    "options", [{"padding_side": "both"}, {"too_long": "cut"}, {"pad_to_multiple_of": 0}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        PrefixLMCollator(**options)


def random_pairs(seed=3):
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        count = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(4, VOCAB, (count,), generator=generator).tolist()

    return [{"instruction_ids": ids(1, 9), "response_ids": ids(1, 6)} for _ in range(5)]


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


@pytest.mark.parametrize("implementation", ["sdpa", "eager", VARLEN])
@pytest.mark.parametrize("multiple", [1, 16])
def test_packed_rows_train_as_padded_rows_do(implementation, multiple):
    model = small_model().double().train()
    model.set_attn_implementation(implementation)
    rows = random_pairs()
    packed = PrefixLMCollator(pack_for=model, pad_to_multiple_of=multiple)(rows)
    assert packed["input_ids"].shape[0] == 1 and packed["input_ids"].shape[1] % multiple == 0
    padded = PrefixLMCollator()(rows)
    loss, gradients = loss_and_gradients(model, packed)
    expected, other = loss_and_gradients(model, padded)
    assert loss == pytest.approx(expected, abs=1e-12)
    assert gradients.keys() == other.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", VARLEN])
def test_a_packed_row_sees_nothing_of_the_others(implementation):
    model = small_model()
    model.set_attn_implementation(implementation)
    rows = random_pairs()
    collate = PrefixLMCollator(pack_for=model)
    first = len(rows[0]["instruction_ids"]) + len(rows[0]["response_ids"])
    before = model(**collate(rows)).logits
    rows[0] = {name: [(i + 1) % VOCAB for i in ids] for name, ids in rows[0].items()}
    after = model(**collate(rows)).logits
    assert torch.equal(before[:, first:], after[:, first:])
    assert float((before - after)[:, :first].abs().amax(-1).min()) > 1e-6


@torch.no_grad()
def test_packing_for_transformers_own_class_is_refused_where_it_would_join_the_prompts():
    values = small_config().to_dict()
    theirs = transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**values)).eval()
    rows = random_pairs()
    batch = PrefixLMCollator(pack_for=small_model())(rows)
    before = theirs(**batch, use_cache=False).logits
    batch["input_ids"][0, 0] = (batch["input_ids"][0, 0] + 1) % VOCAB
    moved = (theirs(**batch, use_cache=False).logits - before).abs().amax(-1)[0]
    first = len(rows[0]["instruction_ids"]) + len(rows[0]["response_ids"])
    joins = float(moved[first:].max()) > 1e-6
    if joins:  # transformers up to 5.23
        with pytest.raises(ConfigError, match="keep the prompts of packed rows apart"):
            PrefixLMCollator(pack_for=theirs)
    else:
        assert float(moved[:first].max()) > 1e-6
        assert "position_ids" in PrefixLMCollator(pack_for=theirs)(rows)
    with pytest.raises(ConfigError, match="keep the prompts of packed rows apart"):
        PrefixLMCollator(pack_for=torch.nn.Linear(2, 2))


def test_packing_sees_through_wrappers():
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

    assert PrefixLMCollator(pack_for=Wrapped(small_model())).packs


def test_conversations_of_one_turn_are_rows_and_several_turns_are_refused(tokenizer):
    collator = PrefixLMCollator(tokenizer)
    said = ["count", "seven", "sort", "red"]
    speakers = ("user", "assistant") * 2
    messages = [{"role": a, "content": b} for a, b in zip(speakers, said, strict=True)]
    pair = collator([{"instruction": "count", "response": "seven"}])
    one = collator([{"messages": messages[:2]}])
    assert all(torch.equal(one[name], pair[name]) for name in pair)
    cleaned = {"instruction": "a", "response": "b", "history": [{"instruction": "c"}]}
    for row in ({"messages": messages}, cleaned):
        with pytest.raises(DataError, match="row 0 has several turns"):
            collator([row])
    with pytest.raises(DataError, match="ends without an answer"):
        collator([{"messages": messages[:1]}])
