"""What transformers' common tests ask of a causal model's forward pass, for our classes.

| their check                                   | here                                          |
| outputs as tuple = as mapping                 | test_tuple_and_mapping_outputs_are_the_same   |
| hidden states and attentions, count and shape | test_hidden_states_..., test_attentions_...   |
| gradients kept on hidden states, attentions   | test_gradients_reach_hidden_states_...        |
| inputs_embeds = input_ids                     | test_embeddings_serve_as_input                |
| left padding changes nothing                  | test_padding_on_either_side_changes_nothing   |
| gradient checkpointing                        | test_gradient_checkpointing_...               |
| resize, tie                                   | test_embeddings_resize, test_tied_weights_... |
| sdpa = eager = flex                           | test_attention_implementations_agree          |
| initial weights                               | test_initial_weights_are_the_recipes          |
| training lowers the loss                      | test_training_fits_two_rows                   |
| torch.compile, full graph                     | test_forward_compiles_as_one_graph            |
| logits_to_keep                                | test_logits_to_keep                           |
"""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from hf_cases import VOCAB, prompts, rows_with_answers, small_config, small_model

from hrmtext.hf import HrmTextForCausalLM

SLOTS = 12


def test_tuple_and_mapping_outputs_are_the_same():
    model, batch = small_model(attn_implementation="eager"), rows_with_answers()
    options = {"output_hidden_states": True, "output_attentions": True}
    mapping = model(**batch, **options)
    as_tuple = model(**batch, **options, return_dict=False)
    assert len(as_tuple) == 5
    torch.testing.assert_close(as_tuple[0], mapping.loss)
    torch.testing.assert_close(as_tuple[1], mapping.logits)
    for mine, other in ((as_tuple[3], mapping.hidden_states), (as_tuple[4], mapping.attentions)):
        torch.testing.assert_close(mine, other)


def test_hidden_states_are_one_a_slot_and_the_embedding():
    model, batch = small_model(), rows_with_answers()
    out = model.model(batch["input_ids"], token_type_ids=batch["token_type_ids"],
                      output_hidden_states=True)  # fmt: skip
    assert len(out.hidden_states) == SLOTS + 1
    assert {tuple(state.shape) for state in out.hidden_states} == {(2, 12, 32)}
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert model.model(batch["input_ids"]).hidden_states is None


def test_attentions_are_one_a_slot_and_follow_the_prefix_mask():
    model, batch = small_model(attn_implementation="eager"), rows_with_answers()
    attentions = model(**batch, output_attentions=True).attentions
    assert len(attentions) == SLOTS
    assert {tuple(weights.shape) for weights in attentions} == {(2, 2, 12, 12)}
    prompt = batch["token_type_ids"].bool()
    order = torch.arange(12)
    seen = (order[:, None] >= order) | (prompt[:, :, None] & prompt[:, None, :])
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 12))
        assert torch.equal(weights > 0, seen[:, None].expand_as(weights))


def test_attention_weights_of_another_implementation_are_refused():
    with pytest.raises(ValueError, match="eager"):
        small_model()(**rows_with_answers(), output_attentions=True)


def test_gradients_reach_hidden_states_and_attentions():
    model = small_model(attn_implementation="eager")
    out = model(**rows_with_answers(), output_hidden_states=True, output_attentions=True)
    # The first L call carries no gradient under L_bp_cycles; the last call does.
    last = (out.hidden_states[-2], out.attentions[-1])
    for tensor in last:
        tensor.retain_grad()
    out.loss.backward()
    assert all(float(tensor.grad.abs().max()) > 0 for tensor in last)
    assert not out.attentions[0].requires_grad


def test_embeddings_serve_as_input():
    model, batch = small_model(), rows_with_answers()
    expected = model(**batch)
    ids = batch.pop("input_ids")
    found = model(**batch, inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(found.logits, expected.logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one"):
        model()


@pytest.mark.parametrize("name", ["sdpa", "eager", "prefix_varlen"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(name):
    model = small_model(attn_implementation=name)
    alone = []
    for length in (9, 4, 6):
        row = prompts((9, 4, 6))
        index = (9, 4, 6).index(length)
        real = row["attention_mask"][index].bool()
        ids = row["input_ids"][index][real][None]
        alone.append(model(ids, token_type_ids=torch.ones_like(ids)).logits[0])
    for side in ("left", "right"):
        batch = prompts((9, 4, 6), side)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=positions).logits
        for row, expected in enumerate(alone):
            found = logits[row][batch["attention_mask"][row].bool()]
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model, batch = small_model().train(), rows_with_answers()
    model(**batch, use_cache=False).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    block = model.model.L_module.layers[0]
    block.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model(**batch, use_cache=False).loss.backward()
    # 4 L calls in the forward pass; the 3 that carry gradient run again in the backward pass.
    assert len(calls) == 4 + 3
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], atol=1e-6, rtol=1e-5)
    model.gradient_checkpointing_disable()
    assert not model.model.gradient_checkpointing


def test_embeddings_resize():
    model, batch = small_model(), rows_with_answers()
    before = model(**batch).logits
    model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    assert model.config.vocab_size == VOCAB + 8
    assert model.get_output_embeddings().weight.shape == (VOCAB + 8, 32)
    after = model(**batch).logits
    assert after.shape[-1] == VOCAB + 8
    torch.testing.assert_close(after[..., :VOCAB], before)
    model.resize_token_embeddings(VOCAB)
    torch.testing.assert_close(model(**batch).logits, before)


def test_tied_weights_are_one_tensor_and_stay_so(tmp_path):
    model, batch = small_model(tie_word_embeddings=True), rows_with_answers()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = HrmTextForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_attention_implementations_agree():
    model, batch = small_model(), prompts()
    expected = model(**batch).logits[batch["attention_mask"].bool()]
    assert float(expected.std()) > 0.1
    for name in ("eager", "prefix_varlen"):
        model.set_attn_implementation(name)
        found = model(**batch).logits[batch["attention_mask"].bool()]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@torch.no_grad()
def test_compiled_flex_attention_agrees():
    model, batch = small_model(), prompts()
    expected = model(**batch).logits[batch["attention_mask"].bool()]
    model.set_attn_implementation("flex_attention")
    found = model(**batch).logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_initial_weights_are_the_recipes():
    torch.manual_seed(0)
    model = HrmTextForCausalLM(small_config(vocab_size=4_000, initializer_range=0.1))
    for name, weight in model.state_dict().items():
        if weight.dim() < 2:
            continue
        std = 0.1 if "embed_tokens" in name else weight.shape[1] ** -0.5
        assert abs(float(weight.std()) / std - 1) < 0.08, name
        assert float(weight.abs().max()) <= 3.05 * std, name
    assert float(model.model.z_L_init.std()) > 0.5


def test_training_fits_two_rows():
    model, batch = small_model().train(), rows_with_answers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@torch.no_grad()
def test_forward_compiles_as_one_graph():
    model, batch = small_model(), rows_with_answers()
    batch.pop("labels")
    expected = model(**batch, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch, use_cache=False).logits, expected)
    del batch["attention_mask"]
    positions = torch.arange(12).expand(2, 12)
    found = compiled(**batch, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_logits_to_keep():
    model, batch = small_model(), rows_with_answers()
    batch.pop("labels")
    everything = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, everything[:, -3:])
    columns = torch.tensor([0, 5, 11])
    torch.testing.assert_close(
        model(**batch, logits_to_keep=columns).logits, everything[:, columns]
    )
    by_row = torch.tensor([[1, 2], [10, 3]])
    expected = torch.stack([everything[row, by_row[row]] for row in range(2)])
    torch.testing.assert_close(model(**batch, logits_to_keep=by_row).logits, expected)


def test_loss_divides_by_the_items_that_a_trainer_counts():
    model, batch = small_model(), rows_with_answers()
    labels = int((batch["labels"][:, 1:] != -100).sum())
    mean = model(**batch).loss
    counted = model(**batch, num_items_in_batch=torch.tensor(2 * labels)).loss
    torch.testing.assert_close(counted, mean / 2)


def test_several_runs_of_type_1_are_one_block_as_in_transformers():
    """Tokens of a later run are seen by those of an earlier one; between them all is causal."""
    model = small_model(attn_implementation="eager")
    ids = torch.randint(4, VOCAB, (1, 8), generator=torch.Generator().manual_seed(5))
    types = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0]])
    weights = model(ids, token_type_ids=types, output_attentions=True).attentions[0][0, 0] > 0
    assert bool(weights[0, 4]) and bool(weights[1, 5])
    assert not bool(weights[2, 4]) and not bool(weights[0, 2])
    with pytest.raises(ValueError, match="several blocks"):
        model.set_attn_implementation("prefix_varlen")
        model(ids, token_type_ids=types)


def test_missing_token_types_are_warned_of_once(caplog):
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    transformers_logging.warning_once.cache_clear()
    model, batch = small_model(), prompts()
    with caplog.at_level(logging.WARNING):
        model(**batch)
        assert "token_type_ids" not in caplog.text
        for _ in range(2):
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
    transformers_logging.disable_propagation()
    assert caplog.text.count("token_type_ids are missing") == 1
    assert "tokenizer" in caplog.text


def test_models_copy_and_pickle():
    model, batch = small_model(), rows_with_answers()
    expected = model(**batch).logits
    torch.testing.assert_close(copy.deepcopy(model)(**batch).logits, expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(**batch).logits, expected)
