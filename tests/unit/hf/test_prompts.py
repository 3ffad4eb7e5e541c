"""Prompts for transformers users are the prompts that the model was trained on."""

import pytest
import torch
import transformers

from hrmtext.data.tokenizer import PromptTokenizer, export_tokenizer, train_tokenizer
from hrmtext.errors import DataError
from hrmtext.hf import encode_prompts, format_prompt


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    plain = PromptTokenizer(train_tokenizer(["explain why the sky is blue"] * 4, 290))
    export_tokenizer(plain, folder, 64)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("condition", "head"),
    [
        ("direct", "<|object_ref_start|>"),
        ("synth,cot", "<|quad_end|><|object_ref_end|>"),
        (["synth", "cot"], "<|quad_end|><|object_ref_end|>"),
        (("cot", "noisy"), "<|object_ref_end|><|quad_start|>"),
        ("", ""),
    ],
)
def test_the_text_is_the_model_card_s_and_its_ids_are_ours(tokenizer, condition, head):
    text = format_prompt("Explain why the sky is blue.", condition)
    assert text == f"<|im_start|>{head}Explain why the sky is blue.<|im_end|>"
    names = condition if isinstance(condition, str) else ",".join(condition)
    plain = PromptTokenizer(tokenizer.backend_tokenizer)
    expected = plain.encode_prompt("Explain why the sky is blue.", names)
    assert tokenizer(text)["input_ids"] == expected
    encoded = encode_prompts(tokenizer, "Explain why the sky is blue.", condition)
    assert encoded["input_ids"].tolist() == [expected]


def test_the_default_condition_is_direct():
    assert format_prompt("x") == "<|im_start|><|object_ref_start|>x<|im_end|>"


def test_an_unknown_condition_names_the_nearest():
    with pytest.raises(DataError, match="perhaps you meant 'synth'"):
        format_prompt("x", ["sinth", "cot"])


@pytest.mark.parametrize("token", ["<|im_end|>", "<think>", "<|box_end|>"])
def test_special_tokens_in_an_instruction_are_refused_as_text_and_encoded_as_plain_ids(
    tokenizer, token
):
    with pytest.raises(DataError, match="encode_prompts"):
        format_prompt(f"ignore {token} this")
    encoded = encode_prompts(tokenizer, f"ignore {token} this")
    special = tokenizer.convert_tokens_to_ids(token)
    expected = 1 if token == "<|im_end|>" else 0  # the prompt's own end
    assert int((encoded["input_ids"] == special).sum()) == expected


def test_a_batch_equals_what_the_exported_tokenizer_pads(tokenizer):
    texts = ["Explain why the sky is blue.", "Why?"]
    theirs = tokenizer([format_prompt(t, "cot") for t in texts], padding=True, return_tensors="pt")
    ours = encode_prompts(tokenizer, texts, "cot")
    assert set(ours) == {"input_ids", "token_type_ids", "attention_mask"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert ours.to("cpu")["input_ids"].dtype == torch.int64


def test_wrong_tokenizers_and_no_text_are_refused(tokenizer):
    with pytest.raises(DataError, match="no instruction"):
        encode_prompts(tokenizer, [])
    with pytest.raises(DataError, match="not a fast tokenizer"):
        encode_prompts(object(), "x")
