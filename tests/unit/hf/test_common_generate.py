"""What transformers' common tests ask of generation, for our classes.

| their check                              | here                                             |
| greedy, sampling, beams                  | test_modes_..., test_greedy_is_transformers...   |
| left padding                             | test_a_row_answers_alone_as_in_a_batch           |
| dynamic = static = no cache              | test_caches_give_the_same_tokens                 |
| static cache + compile                   | test_static_cache_compiled                       |
| assisted decoding, prompt lookup         | test_assisted_decoding_changes_no_token          |
| inputs_embeds                            | test_generation_from_embeddings                  |
| scores, hidden states, attentions        | test_generation_returns_what_is_asked            |
| going on from a cache                    | test_going_on_from_a_returned_cache              |
Contrastive and group beam search left transformers' package for the Hub, so they cannot run here.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from hf_cases import PAD, VOCAB, prompts, small_config, small_model

from hrmtext.artifacts.hf_folder import to_split
from hrmtext.hf import HrmTextForCausalLM
from hrmtext.hf.cache_name import CACHE

NEW = 12
BACKENDS = ("sdpa", "eager", "prefix_varlen")


def their_model(ours: HrmTextForCausalLM) -> transformers.HrmTextForCausalLM:
    config = transformers.HrmTextConfig(**ours.config.to_dict())
    theirs = transformers.HrmTextForCausalLM(config)
    theirs.load_state_dict(to_split(ours.state_dict()))
    return theirs.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 10, "temperature": 0.7},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=["greedy", "sample", "beam", "beams_returned", "beam_sample"],
)
def test_modes_equal_transformers(options):
    ours = small_model()
    found, expected = (
        (torch.manual_seed(7), model.generate(**prompts(), max_new_tokens=NEW, **options))[1]
        for model in (ours, their_model(ours))
    )
    assert torch.equal(found, expected)
    assert found.shape[1] > 9


@pytest.mark.parametrize("name", BACKENDS)
def test_greedy_is_transformers_greedy_on_every_backend(name):
    ours = small_model(seed=3)
    expected = their_model(ours).generate(**prompts(seed=4), max_new_tokens=30, do_sample=False)
    ours.set_attn_implementation(name)
    found = ours.generate(**prompts(seed=4), max_new_tokens=30, do_sample=False)
    assert torch.equal(found, expected)


def test_a_row_answers_alone_as_in_a_batch():
    model, batch = small_model(), prompts()
    together = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[:, 9:]
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][real][None]
        alone = model.generate(
            ids, token_type_ids=torch.ones_like(ids), attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW, do_sample=False,
        )[0, ids.shape[1] :]  # fmt: skip
        padded = torch.full((together.shape[1],), PAD)
        padded[: len(alone)] = alone
        assert torch.equal(together[row], padded)


@pytest.mark.parametrize("name", BACKENDS)
def test_caches_give_the_same_tokens(name):
    model, batch = small_model(attn_implementation=name), prompts()
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**batch, **options)
    # Without a cache every step is a first pass over a longer row, whose answer must stay causal.
    for others in (
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "offloaded"} if torch.cuda.is_available() else {},
        {"use_cache": False},
    ):
        assert torch.equal(model.generate(**batch, **options, **others), expected), others


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_static_cache_compiled():
    model, batch = small_model(), prompts()
    expected = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    settings = transformers.CompileConfig(backend="eager", mode=None, fullgraph=True)
    settings._compile_all_devices = True
    found = model.generate(
        **batch, max_new_tokens=NEW, do_sample=False, cache_implementation="static",
        compile_config=settings,
    )  # fmt: skip
    assert torch.equal(found, expected)
    assert hasattr(model, "_compiled_call"), "generate did not compile"


@pytest.mark.parametrize("seed", range(4))
def test_assisted_decoding_changes_no_token(seed):
    model = small_model(seed)
    ids = prompts((9,))["input_ids"]
    batch = {"input_ids": ids, "token_type_ids": torch.ones_like(ids)}
    batch["attention_mask"] = torch.ones_like(ids)
    expected = model.generate(**batch, max_new_tokens=20, do_sample=False)
    for draft in (model, small_model(seed=9, num_hidden_layers=1)):
        found = model.generate(**batch, max_new_tokens=20, do_sample=False, assistant_model=draft)
        assert torch.equal(found, expected)
    found = model.generate(**batch, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


def test_generation_from_embeddings():
    model, batch = small_model(), prompts()
    expected = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[:, 9:]
    ids = batch.pop("input_ids")
    embedded = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embedded, **batch, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, expected)


def test_generation_returns_what_is_asked():
    model, batch = small_model(attn_implementation="eager"), prompts()
    out = model.generate(
        **batch, max_new_tokens=4, min_new_tokens=4, do_sample=False,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
        output_hidden_states=True, output_attentions=True,
    )  # fmt: skip
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == 4
    assert out.logits[0].shape == (3, VOCAB)
    assert len(out.hidden_states[0]) == 13 and out.hidden_states[0][0].shape == (3, 9, 32)
    assert out.hidden_states[1][0].shape == (3, 1, 32)
    assert len(out.attentions[0]) == 12 and out.attentions[1][0].shape == (3, 2, 1, 10)
    assert out[CACHE].get_seq_length() == 12


def test_going_on_from_a_returned_cache():
    model, batch = small_model(), prompts((9, 9))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    whole = model.generate(**batch, max_new_tokens=10, **options)
    first = model.generate(**batch, max_new_tokens=4, return_dict_in_generate=True, **options)
    ids = first.sequences
    second = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **options,
        **{CACHE: first[CACHE]},
    )  # fmt: skip
    assert torch.equal(second, whole)


def test_a_prompt_is_never_prefilled_in_chunks():
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        small_model().generate(**prompts(), max_new_tokens=3, prefill_chunk_size=4)
    causal = small_model(prefix_lm=False)
    batch = {k: v for k, v in prompts().items() if k != "token_type_ids"}
    expected = causal.generate(**batch, max_new_tokens=3, do_sample=False)
    found = causal.generate(**batch, max_new_tokens=3, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_the_mask_matters_and_generate_applies_it():
    """Without token types the answers of this model differ; with them every mode has the mask."""
    model, batch = small_model(), prompts()
    with_mask = model(**batch).logits[:, -1]
    causal = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, -1]
    out = model.generate(
        **batch, max_new_tokens=1, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model(**batch, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(out.logits[0], expected)
    assert float((with_mask - causal).abs().max()) > 1e-3


def test_config_and_model_agree_on_the_number_of_slots():
    config = small_config()
    cache = transformers.DynamicCache(config=config)
    model = small_model()
    model(prompts()["input_ids"], **{CACHE: cache})
    assert len(cache.layers) == config.num_hidden_layers == 12
    assert {layer.get_seq_length() for layer in cache.layers} == {9}
