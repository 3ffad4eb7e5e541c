"""Activation checkpointing keeps less and changes nothing that is learned."""

import pytest
import torch
from memory_source import MemorySource, random_rows, small_config

from hrmtext.artifacts import load_model
from hrmtext.batch import PackedBatch
from hrmtext.config.model import preset
from hrmtext.model import Depth, build_model
from hrmtext.train import train_on
from hrmtext.train.estimate import activation_bytes
from hrmtext.train.loss import Microbatch, forward_loss
from hrmtext.train.recompute import recomputing

CHOICES = ("none", "L", "all")


def losses_and_gradients(which, bp_steps, dtype=torch.float32):
    model = build_model(preset("test"), seed=0, dtype=dtype)
    rows = [(row["prompt"], row["response"]) if isinstance(row, dict) else row
            for row in random_rows(6, seed=3)]  # fmt: skip
    batch = PackedBatch.from_rows(rows)
    micro = Microbatch.prepare(batch, device=torch.device("cpu"), dtype=dtype)
    calls = {"H": 0, "L": 0}

    def count(stack):
        def hook(*_):
            calls[stack] += 1

        return hook

    model.model.H_module.layers[0].register_forward_pre_hook(count("H"))
    model.model.L_module.layers[0].register_forward_pre_hook(count("L"))
    kept: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.state_dict().values()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward_loss(
            model, micro, depth=Depth.from_bp_steps(model.config, bp_steps), scale=1.0,
            chunk_bytes=1 << 20, call_block=recomputing(model, which),
        )  # fmt: skip
    held = sum(kept.values())
    loss.total.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return loss.total.detach(), gradients, calls, held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bp_steps", [2, 5, 8])
def test_loss_and_gradients_are_the_same_bit_for_bit(bp_steps, dtype):
    loss, gradients, _, _ = losses_and_gradients("none", bp_steps, dtype)
    for which in ("L", "all"):
        other, found, _, _ = losses_and_gradients(which, bp_steps, dtype)
        assert torch.equal(other, loss)
        for name, gradient in gradients.items():
            if gradient is None:
                assert found[name] is None
            else:
                assert torch.equal(found[name], gradient), name


def test_only_calls_that_carry_gradient_run_again():
    # bp_steps 5 at 2 x 3 cycles: 2 H and 3 L calls carry gradient.
    for which, H, L in (("none", 2, 6), ("L", 2, 9), ("all", 4, 9)):
        assert losses_and_gradients(which, 5)[2] == {"H": H, "L": L}, which


def test_less_is_kept_and_the_estimate_follows():
    held = {which: losses_and_gradients(which, 5)[3] for which in CHOICES}
    assert held["all"] < held["L"] < held["none"]
    config = preset("XL")
    depth = Depth.from_bp_steps(config, 5)
    estimates = [activation_bytes(config, depth, torch.bfloat16, which) for which in CHOICES]
    assert estimates == sorted(estimates, reverse=True)
    assert estimates[2] < 0.15 * estimates[0]


def test_a_run_ends_with_the_same_weights(tmp_path):
    rows = random_rows(24)
    states = []
    for which in CHOICES:
        config = small_config(activation_checkpointing=which, block_kernel="torch")
        result = train_on(config, MemorySource(rows), run_folder=tmp_path / which, progress="none")
        states.append(load_model(result.checkpoint, "raw").state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())
