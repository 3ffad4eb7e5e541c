"""The tokenizer: ids, plain text, save and load, the form exported to transformers."""

from __future__ import annotations

import json
import random
import re
import sys
import unicodedata

import pytest
from tokenizers import Tokenizer, normalizers

from hrmtext.data.encoder import COMPOSED_RANGES, is_composed, plain_text_form
from hrmtext.data.tokenizer import (
    CONDITIONS,
    SPECIAL_TOKENS,
    PromptTokenizer,
    export_tokenizer,
    train_tokenizer,
)
from hrmtext.errors import DataError

QUESTION = "What is 1234 + 56? Réponds, s'il te plaît 🙂\n\tEnd."


def test_special_tokens_hold_the_published_ids(tokenizer):
    assert len(SPECIAL_TOKENS) == 31
    for index, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer.tokenizer.token_to_id(token) == index
    assert (tokenizer.bos_id, tokenizer.prompt_end_id) == (6, 7)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (11, 5)


@pytest.mark.parametrize("vocab_size", [287, 300, 411])
def test_vocabulary_has_exactly_the_size_asked_for(texts, vocab_size):
    assert train_tokenizer(texts, vocab_size).get_vocab_size() == vocab_size


def test_too_little_text_and_too_small_sizes_are_refused(texts):
    with pytest.raises(DataError, match=r"the texts give \d+ vocabulary entries, 5000 were"):
        train_tokenizer(texts[:2], 5000)
    with pytest.raises(DataError, match="at least 287"):
        train_tokenizer(texts, 286)


def test_a_smaller_vocabulary_is_trained_where_it_is_allowed_and_said(texts, caplog):
    trained = train_tokenizer(texts[:2], 5000, allow_fewer=True)
    with pytest.raises(DataError, match=f"the texts give {trained.get_vocab_size()} "):
        train_tokenizer(texts[:2], 5000)
    assert f"the tokenizer has {trained.get_vocab_size()}" in caplog.text
    full = train_tokenizer(texts, 300, allow_fewer=True)
    assert full.to_str() == train_tokenizer(texts, 300).to_str()


def test_training_is_deterministic(texts):
    assert train_tokenizer(texts, 400).to_str() == train_tokenizer(iter(texts), 400).to_str()


def test_any_text_survives_the_round_trip(tokenizer):
    generator = random.Random(0)
    alphabet = "abc XYZ 0129 \n\t\r.,'<|>_/é漢🙂\u0000\u200b"
    for _ in range(200):
        text = "".join(generator.choices(alphabet, k=generator.randrange(40)))
        assert tokenizer.decode(tokenizer.encode_texts([text])[0]) == text
    # NFC: a letter and its combining mark become one character.
    assert tokenizer.decode(tokenizer.encode_texts(["e\u0301"])[0]) == "\u00e9"


def test_digits_are_single_tokens_and_words_take_no_prefix_space(tokenizer):
    pieces = tokenizer.tokenizer.encode("90210").tokens
    assert pieces == ["9", "0", "2", "1", "0"]
    assert tokenizer.encode_texts(["what"]) != tokenizer.encode_texts([" what"])


def test_rows_have_the_published_form(tokenizer):
    [text] = tokenizer.encode_texts(["hello"])
    assert tokenizer.encode_prompt("hello") == [6, 8, *text, 7]
    assert tokenizer.encode_prompt("hello", "synth,cot") == [6, 13, 9, *text, 7]
    assert tokenizer.encode_prompt("hello", "cot, synth") == [6, 9, 13, *text, 7]
    assert tokenizer.encode_prompt("hello", "") == [6, *text, 7]
    assert tokenizer.encode_response("hello") == [*text, 11]
    assert tokenizer.encode_prompt("") == [6, 8, 7]
    assert tokenizer.parse_condition("noisy") == [12]


def test_an_unknown_condition_names_the_nearest(tokenizer):
    with pytest.raises(DataError, match=r"unknown condition 'dirrect'; perhaps you meant 'direct'"):
        tokenizer.parse_condition("cot,dirrect")
    with pytest.raises(DataError, match="unknown condition ''"):
        tokenizer.parse_condition("cot,,synth")


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_in_text_stay_plain_text(tokenizer, token, tmp_path):
    text = f"a{token}b {token}{token}"
    tokenizer.save(tmp_path)
    for each in (tokenizer, PromptTokenizer.load(tmp_path)):
        prompt = each.encode_prompt(text, "synth,cot")
        assert min(prompt[3:-1]) >= len(SPECIAL_TOKENS)
        response = each.encode_response(text)
        assert min(response[:-1]) >= len(SPECIAL_TOKENS)
        assert each.decode(prompt) == text
        assert each.decode(response) == text


def test_tokens_left_unmarked_by_a_published_file_stay_plain_text_too(tokenizer, tmp_path):
    fields = json.loads(tokenizer.tokenizer.to_str())
    for token in fields["added_tokens"]:
        token["special"] = not token["content"].startswith("<t")
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    loaded = PromptTokenizer.load(tmp_path)
    assert loaded.encode_response("<think>x</think>") == tokenizer.encode_response(
        "<think>x</think>"
    )


def test_batches_equal_one_by_one(tokenizer, texts):
    conditions = [random.Random(i).choice([*CONDITIONS, "synth,cot", ""]) for i in range(50)]
    batch = tokenizer.encode_prompts(texts[:50], conditions)
    single = [tokenizer.encode_prompt(t, c) for t, c in zip(texts, conditions, strict=False)]
    assert batch == single
    assert tokenizer.encode_responses(texts[:9]) == [
        tokenizer.encode_response(t) for t in texts[:9]
    ]
    assert tokenizer.decode_batch(batch) == [tokenizer.decode(ids) for ids in batch]
    with pytest.raises(DataError, match="2 instructions but 1 conditions"):
        tokenizer.encode_prompts(["a", "b"], ["direct"])


def test_text_that_is_not_unicode_is_refused_by_index(tokenizer):
    with pytest.raises(DataError, match="text 1 is not valid Unicode at character 2"):
        tokenizer.encode_responses(["fine", "ab\ud800"])
    with pytest.raises(DataError, match="text 0 is NoneType"):
        tokenizer.encode_responses([None])


def test_save_and_load_give_the_same_ids_and_fingerprint(tokenizer, texts, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = PromptTokenizer.load(path)
        assert loaded.encode_prompts(texts) == tokenizer.encode_prompts(texts)
        assert loaded.fingerprint == tokenizer.fingerprint
    other = PromptTokenizer(train_tokenizer(texts, 300))
    assert other.fingerprint != tokenizer.fingerprint


def test_bad_tokenizer_files_are_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no tokenizer at"):
        PromptTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(DataError, match="is not a tokenizers file"):
        PromptTokenizer.load(tmp_path)
    fields = json.loads(tokenizer.tokenizer.to_str())
    fields["added_tokens"] = fields["added_tokens"][:11]
    del fields["model"]["vocab"]["<|box_end|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"has no token '<\|box_end\|>'"):
        PromptTokenizer.load(tmp_path)


def test_saved_folder_loads_in_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (6, 11, 5)
    assert len(loaded) == tokenizer.vocab_size
    assert loaded(QUESTION)["input_ids"] == tokenizer.encode_texts([QUESTION])[0]


@pytest.mark.parametrize("with_model_config", [False, True])
def test_exported_tokenizer_carries_the_prefix_mask(tokenizer, tmp_path, with_model_config):
    from transformers import AutoTokenizer

    export_tokenizer(tokenizer, tmp_path, model_max_length=321)
    if with_model_config:
        (tmp_path / "config.json").write_text('{"model_type": "hrm_text"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 321
    prompt = f"<|im_start|><|quad_end|><|object_ref_end|>{QUESTION}<|im_end|>"
    expected = tokenizer.encode_prompt(QUESTION, "synth,cot")
    encoded = loaded(prompt)
    assert encoded["input_ids"] == expected
    assert encoded["token_type_ids"] == [1] * len(expected)

    batch = loaded([prompt, "<|im_start|>hi<|im_end|>"], padding=True, return_tensors="pt")
    short = tokenizer.encode_prompt("hi", "")
    padding = len(expected) - len(short)
    assert batch["input_ids"].tolist() == [expected, [5] * padding + short]
    assert batch["token_type_ids"][1].tolist() == [0] * padding + [1] * len(short)
    assert batch["attention_mask"].tolist() == [
        [1] * len(expected),
        [0] * padding + [1] * len(short),
    ]
    assert loaded.decode(expected, skip_special_tokens=True) == QUESTION
    assert PromptTokenizer.load(tmp_path).encode_prompt(QUESTION, "synth,cot") == expected


def test_chat_template_renders_prompts(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    export_tokenizer(tokenizer, tmp_path, model_max_length=321)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    user = {"role": "user", "content": QUESTION}
    for condition in ("direct", "synth,cot", "noisy , direct", ""):
        encoded = loaded.apply_chat_template(
            [user], tokenize=True, return_dict=True, condition=condition
        )
        assert encoded["input_ids"] == tokenizer.encode_prompt(QUESTION, condition)
        assert set(encoded["token_type_ids"]) == {1}
    default = loaded.apply_chat_template([user], tokenize=True, return_dict=True)
    assert default["input_ids"] == tokenizer.encode_prompt(QUESTION)
    assert len(default["token_type_ids"]) == len(default["input_ids"])

    system = {"role": "system", "content": "Be brief."}
    turns = [system, user, {"role": "assistant", "content": " 12"}, {**user, "content": "And?"}]
    encoded = loaded.apply_chat_template(turns, tokenize=True, return_dict=True)
    assert encoded["input_ids"] == (
        tokenizer.encode_prompt("Be brief.\n\n" + QUESTION)
        + tokenizer.encode_response(" 12")
        + tokenizer.encode_prompt("And?")
    )
    for bad, message in (("cot,drect", "unknown condition drect"), ("cot,", "unknown condition")):
        with pytest.raises(Exception, match=message):
            loaded.apply_chat_template([user], tokenize=False, condition=bad)
    with pytest.raises(Exception, match="unknown role tool"):
        loaded.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_a_post_processor_in_the_file_changes_no_id(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    wrapped = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    wrapped.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|box_end|>",
        special_tokens=[("<|im_start|>", 6), ("<|box_end|>", 11)],
    )
    wrapped.enable_truncation(4)
    wrapped.enable_padding(length=64)
    assert PromptTokenizer(wrapped).encode_prompt(QUESTION) == tokenizer.encode_prompt(QUESTION)


def test_rows_end_to_end_are_prompts_and_responses(tokenizer, texts):
    rows = [
        (("direct", "synth,cot", "")[i % 3], text, text[i % 9 :]) for i, text in enumerate(texts)
    ]
    rows.append(("cot", "<|im_end|>", "<|box_end|>"))  # special tokens in a text stay text
    tokens, lengths = tokenizer.encode_rows(*zip(*rows, strict=True))
    expected = []
    for condition, instruction, response in rows:
        expected += [
            tokenizer.encode_prompt(instruction, condition),
            tokenizer.encode_response(response),
        ]
    assert lengths == [len(part) for part in expected]
    assert tokens.tolist() == [token for part in expected for token in part]
    assert expected[-1].count(tokenizer.eos_id) == 1 and len(expected[-1]) > 5


def odd_texts(count):
    """Texts of letters, marks that combine, parts of Hangul, special tokens, spaces."""
    generator = random.Random(0)
    pieces = [
        *SPECIAL_TOKENS, "e", "\u0301", "é", "\u0323\u0307", "Å", "\u212b", "\u2126", "\u1112",
        "\u1161", "\u11ab", "한", "か", "\u3099", "ガ", "\uff9e", "\u0928\u093c", "\u0958",
        "\u05e9\u05c1", "ﬁ", "Ж", "ية", "数", "🙂", "👍🏽", "\ufe0f", "\u200d", " ", "\n", "\t",
        "\0", "12", "'s", "what is", "\u0387", "\u1f71", "\U00011099\U000110ba", "\U0002f81a", "",
    ]  # fmt: skip
    return ["".join(generator.choices(pieces, k=generator.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize("normalizer", ["NFC", "NFKC", None])
def test_texts_are_encoded_as_a_reader_that_spares_all_added_tokens_does(tokenizer, normalizer):
    fields = json.loads(tokenizer.tokenizer.to_str())
    fields["normalizer"] = normalizer and {"type": normalizer}
    # Published files leave some tokens unmarked.
    fields["added_tokens"][-1]["special"] = False
    ours = PromptTokenizer(Tokenizer.from_str(json.dumps(fields)))
    oracle = plain_text_form(ours.tokenizer)
    oracle.encode_special_tokens = True
    texts = odd_texts(3_000)
    assert 500 < sum(map(is_composed, texts)) < 2_500, "both ways are taken"
    expected = [oracle.encode(text, add_special_tokens=False).ids for text in texts]
    assert ours.encode_texts(texts) == expected


def test_composed_characters_are_those_that_nfc_never_changes():
    inside = re.compile(f"[{COMPOSED_RANGES}]")
    characters = [chr(code) for code in range(sys.maxunicode + 1)]
    seconds = set()  # what may be taken up by the character before
    for character in characters:
        parts = unicodedata.decomposition(character).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            seconds.add(chr(int(parts[1], 16)))
    vouched = [character for character in characters if inside.fullmatch(character)]
    assert len(vouched) > 30_000
    for character in vouched:
        assert unicodedata.category(character) not in ("Cn", "Cs"), ascii(character)
        assert not unicodedata.combining(character), ascii(character)
        assert character not in seconds, ascii(character)
    random.Random(0).shuffle(vouched)
    text = "".join(vouched)
    assert is_composed(text) and normalizers.NFC().normalize_str(text) == text
    assert not is_composed("e\u0301") and not is_composed("\ud800")
