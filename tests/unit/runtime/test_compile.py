"""Compiled blocks compute what plain blocks compute, and `auto` does what it says."""

import shutil

import pytest
import torch

from hrmtext.batch import PackedBatch
from hrmtext.config.model import preset
from hrmtext.errors import BackendError
from hrmtext.model import Depth, build_model, make_plan
from hrmtext.runtime.compile import compile_blocks

CPU = torch.device("cpu")


def logits_and_gradients(compiled):
    config = preset("test", num_layers_per_stack=1, L_cycles=2)
    model = build_model(config, seed=0)
    if compiled:
        assert compile_blocks(model, True, device=CPU)
    batch = PackedBatch.from_rows([([5, 6, 7], [8, 9]), ([3], [4, 5, 6])], num_tokens=12)
    out = model(
        batch.tokens,
        batch.positions,
        make_plan(batch.layout),
        depth=Depth.from_bp_steps(config, 3),
    )
    out.logits.square().mean().backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inside
def test_compiled_blocks_equal_plain_ones_forward_and_gradient():
    expected, gradients = logits_and_gradients(compiled=False)
    found, compiled_gradients = logits_and_gradients(compiled=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "flash_reference", "flex"])
@pytest.mark.filterwarnings("default")
def test_no_graph_holds_the_attention(backend):
    import torch._dynamo  # as whoever compiles does; a plan made from then on is kept outside

    plan = make_plan(PackedBatch.from_rows([([5, 6, 7], [8, 9])]).layout, backend=backend)
    attend = torch.compile(lambda x: plan.attend(x, x, x, 0), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        attend(torch.ones(5, 2, 16))


def test_auto_leaves_the_cpu_alone():
    assert not compile_blocks(build_model(preset("test"), seed=0), "auto", device=CPU)


def test_compiling_by_name_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match="install one, or set compile=false"):
        compile_blocks(build_model(preset("test"), seed=0), True, device=CPU)
