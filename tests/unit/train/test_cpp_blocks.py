"""The C++ blocks give the module's outputs and gradients: any shape, mask, selection, threads."""

import contextlib
import copy

import pytest
import torch
from compilers import take_broken_compiler
from memory_source import small_config

from hrmtext.batch import RowLayout
from hrmtext.config import preset
from hrmtext.errors import BackendError
from hrmtext.model import Depth, build_model, make_plan
from hrmtext.model.layers import ExitNorm
from hrmtext.runtime.native import build, compiler
from hrmtext.runtime.native.pack import alternate, pack_columns
from hrmtext.train.build import build_compute
from hrmtext.train.cpp import CppBlocks, CppRecurrence, choose_blocks
from hrmtext.train.cpp import blocks as blocks_module
from hrmtext.train.cpp import choice as choice_module
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.step import TrainStep

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

CPU = torch.device("cpu")
HAS_BF16 = compiler() is not None and bool(blocks_module.library().hrm_block_has_bf16())
FORMATS = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not HAS_BF16, reason="this processor lacks AVX-512 BF16"),
    ),
]
LENGTHS = [7, 23, 1, 70, 12]
BLOCKS = [[(0, 3)], [(0, 10)], [(0, 1)], [(0, 40), (55, 70)], []]
"""Prompts, one token alone, two turns with an answer between, a causal row."""
SELECT = torch.tensor([0, 5, 6, 20, 22, 29, 30, 50, 99, 100, 112])
WIDE = {"head_dim": 32}
"""Heads as wide as two vectors of any processor: narrower ones the kernel leaves to torch."""
SHAPES = [
    {},
    {"hidden_size": 64, "num_heads": 1, "head_dim": 64},
    {"hidden_size": 96, "num_heads": 3, "head_dim": 32, "intermediate_size": 160},
    {"H_cycles": 1, "L_cycles": 4, "num_layers_per_stack": 1, "rms_norm_eps": 1e-3},
    {"shared_stack": True, "H_cycles": 1, "L_cycles": 0, "num_layers_per_stack": 3},
]


@pytest.fixture(params=[CppBlocks, CppRecurrence])
def kind(request):
    """Block by block, or all calls of the stacks at once."""
    return request.param


@contextlib.contextmanager
def using(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stream(config, padding):
    """Tokens, positions and layout of the rows above."""
    layout = RowLayout.from_blocks(LENGTHS, BLOCKS, num_tokens=sum(LENGTHS) + padding)
    tokens = torch.arange(layout.num_tokens) * 7 % config.vocab_size
    positions = torch.cat([*map(torch.arange, LENGTHS), torch.arange(padding)])
    return tokens, positions, layout


def gradients(model, batch, plan, depth, select, call_block=None):
    """Output, and the gradient of every parameter that gets one, for a fixed direction."""
    tokens, positions, layout = batch
    model.zero_grad(set_to_none=True)
    out = model.model(tokens, positions, plan, depth, select, call_block)[-1]
    if select is None:
        out = out[: sum(layout.lengths)]  # what is behind the rows is nobody's
    # Drawn alike for all formats: other formats draw other numbers.
    draw = torch.Generator().manual_seed(3)
    towards = torch.randn(out.shape, generator=draw, dtype=torch.float64).bfloat16()
    out.backward(towards.to(out.dtype))
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **found}


def by_angle(config):
    """Rows of gqkv as they are computed: of queries and keys both halves of a head in turn."""
    heads, lanes = config.num_heads, blocks_module.library().hrm_lanes()
    gate, *rotated, values = torch.arange(4 * heads * config.head_dim).chunk(4)
    halves = [part.view(heads, 2, -1, lanes).transpose(1, 2).flatten() for part in rotated]
    return torch.cat([gate, *halves, values])


def largest(tensor):
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def spread(tensor):
    """Root of the mean square."""
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("changes", SHAPES, ids=lambda changes: "-".join(changes) or "test")
def test_output_and_every_gradient_are_the_modules_within_the_error_of_its_format(
    changes, dtype, kind
):
    config = preset("test", **{**WIDE, **changes})
    module = build_model(config, seed=1).to(dtype)
    model, exact = copy.deepcopy(module).float(), copy.deepcopy(module).double()
    batch = stream(config, padding=5)
    plan, wide = make_plan(batch[2], dtype=dtype), make_plan(batch[2], dtype=torch.float64)
    blocks = kind(model, dtype)
    blocks.pack()
    for select in (None, SELECT, SELECT[:0]):
        plain = gradients(module, batch, plan, None, select)
        expected = gradients(exact, batch, wide, None, select)
        for threads in (1, 2, 3):
            with using(threads):
                rows = blocks.rows(batch[2])
                assert rows.threads in (1, threads)
                found = gradients(model, batch, rows, None, select, blocks)
            assert found.keys() == plain.keys() == expected.keys()
            ratios = []
            for name, value in expected.items():
                rounding = 2e-6 * largest(value)
                budget = 4 * largest(plain[name] - value) + rounding
                assert largest(found[name] - value) <= budget, (name, threads)
                error, theirs = spread(found[name] - value), spread(plain[name] - value)
                ratios.append(error / (theirs + rounding) if rounding else 0.0)
            if dtype == torch.float32:
                continue
            # In bf16 the kernel keeps in fp32 what the module rounds: it is nearer, by far in sum.
            assert max(ratios) <= 0.9, threads
            assert sum(ratios) / len(ratios) <= 0.6, threads


@pytest.mark.parametrize("piece", [1, 30, 70])
def test_rows_may_go_through_a_block_in_pieces_of_any_size(monkeypatch, piece, kind):
    model = build_model(preset("test", **WIDE), seed=1)
    batch, blocks = stream(model.config, padding=5), kind(model)
    blocks.pack()

    def found(select):
        with using(2):
            return gradients(model, batch, blocks.rows(batch[2]), None, select, blocks)

    for select in (None, SELECT):
        whole = found(select)
        monkeypatch.setattr(blocks, "piece", piece)
        for name, value in found(select).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5, msg=name)
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", FORMATS)
def test_nothing_depends_on_what_the_memory_held(dtype, kind):
    model = build_model(preset("test", **WIDE), seed=1)
    batch, blocks = stream(model.config, padding=5), kind(model, dtype)
    blocks.pack()
    for select in (None, SELECT):
        with using(2):
            plan = blocks.rows(batch[2])
            expected = gradients(model, batch, plan, None, select, blocks)
            for memory in (*blocks._free, blocks._workspace):
                memory.fill_(torch.nan)
            found = gradients(model, batch, plan, None, select, blocks)
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name


def test_a_thread_without_rows_adds_nothing(kind):
    model = build_model(preset("test", **WIDE), seed=1)
    layout = RowLayout.from_blocks([50, 50], [[(0, 30)], [(0, 20)]])
    positions = torch.arange(50).repeat(2)
    batch, blocks = (torch.arange(100) % 60, positions, layout), kind(model)
    blocks.pack()
    with using(3):
        plan = blocks.rows(layout)
        assert plan.bounds.diff().min() == 0, "one of three threads is left over"
        blocks._workspace = torch.full((1 << 22,), torch.nan)
        found = gradients(model, batch, plan, None, None, blocks)
    with using(1):
        alone = gradients(model, batch, blocks.rows(layout), None, None, blocks)
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_circle_of_rows_is_shared_and_gives_the_same(monkeypatch, kind):
    model = build_model(preset("test", **WIDE), seed=1)
    batch, blocks = stream(model.config, padding=5), kind(model)
    blocks.pack()
    with using(2):
        plan = blocks.rows(batch[2])
        assert plan.first_row > 0 and plan.threads == 2, (
            "this layout is cut better from another row"
        )
        turned = gradients(model, batch, plan, None, SELECT, blocks)
        monkeypatch.setattr(blocks_module, "circle_shares", lambda *_: (0, [0, 3, 5]))
        plain = gradients(model, batch, blocks.rows(batch[2]), None, SELECT, blocks)
    for name, value in plain.items():
        torch.testing.assert_close(turned[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", FORMATS)
def test_weights_are_packed_anew_as_they_are_read(dtype):
    config = preset("test", **WIDE)
    model = build_model(config, seed=1)
    block, lanes = model.model.H_module.layers[0], blocks_module.library().hrm_lanes()
    blocks = CppBlocks(model, dtype)
    how = {"lanes": lanes, "bf16": dtype == torch.bfloat16}
    for change in (0.0, 0.3):
        with torch.no_grad():
            block.mlp.gate_up_proj.weight += change
        blocks.pack()
        found = blocks._packed[id(block)]._memory
        for name, linear in zip(
            blocks_module._WEIGHTS, blocks_module.linears_of(block), strict=True
        ):
            weight = linear.weight.detach()
            expected = weight[by_angle(config)] if name == "gqkv" else weight
            expected = (alternate if name == "gate_up" else pack_columns)(expected, **how)
            assert torch.equal(found[name], expected.flatten()), name
            assert torch.equal(found[f"{name}_t"], pack_columns(weight.T, **how).flatten()), name


@pytest.mark.parametrize("rows", [0, 1, 7, 130])
def test_the_exit_norm_is_the_modules_forward_and_backward(rows):
    model = build_model(preset("test", **WIDE), seed=1)
    norm, width = ExitNorm(1e-3), 96
    draw = torch.Generator().manual_seed(rows)
    x, towards = (torch.randn(rows, width, generator=draw, dtype=torch.float64) for _ in range(2))
    wide = x.clone().requires_grad_()
    expected = norm(wide)
    expected.backward(towards)
    narrow = x.float().requires_grad_()
    found = CppBlocks(model)(norm, narrow)
    found.backward(towards.float())
    for a, b in ((found, expected), (narrow.grad, wide.grad)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bp_steps", [2, 5])
def test_calls_without_gradient_get_none(bp_steps, kind):
    config = preset("test", **WIDE)
    model = build_model(config, seed=1)
    batch = stream(config, padding=0)
    depth = Depth.from_bp_steps(config, bp_steps)
    blocks = kind(model)
    blocks.pack()
    found = gradients(model, batch, blocks.rows(batch[2]), depth, SELECT, blocks)
    expected = gradients(model, batch, make_plan(batch[2]), depth, SELECT)
    assert found.keys() == expected.keys()
    assert ("model.embed_tokens.weight" in found) == (bp_steps > 2)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4)


def test_the_same_step_twice_gives_the_same_bits_and_a_second_backward_is_refused(kind):
    config = preset("test", **WIDE)
    model = build_model(config, seed=1)
    batch = stream(config, padding=0)
    blocks = kind(model)
    blocks.pack()
    first, second = (
        gradients(model, batch, blocks.rows(batch[2]), None, None, blocks) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    tokens, positions, layout = batch
    out = model.model(tokens, positions, blocks.rows(layout), None, None, blocks)[-1].sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_a_row_moves_no_other_row_and_a_later_answer_token_no_earlier_one(kind):
    config = preset("test", **WIDE)
    model = build_model(config, seed=1)
    tokens, positions, layout = stream(config, padding=0)
    blocks = kind(model)
    blocks.pack()

    def run(tokens):
        with torch.no_grad():
            return model.model(tokens, positions, blocks.rows(layout), None, None, blocks)[-1]

    before = run(tokens)
    changed = tokens.clone()
    changed[15] += 1  # token 8 of the second row, of whose 23 tokens 10 are its prompt
    moved = (run(changed) != before).any(dim=1)
    assert moved[7:30].all() and not moved[:7].any() and not moved[30:].any()
    changed = tokens.clone()
    changed[20] += 1  # token 13 of that row, an answer's
    moved = (run(changed) != before).any(dim=1)
    assert moved[20:30].all() and not moved[:20].any() and not moved[30:].any()


def chosen(dtype=torch.float32, weights=torch.float32, **changes):
    config = small_config(model={"preset": "test", **WIDE}, **changes)
    model = build_model(config.model.resolve(), seed=0, dtype=weights)
    return choose_blocks(model, config, CPU, dtype)


def test_auto_takes_the_kernel_for_a_small_model_and_torch_elsewhere(monkeypatch):
    assert isinstance(chosen(), CppBlocks)
    assert chosen(block_kernel="torch") is None
    assert chosen(torch.float64) is chosen(torch.float64, torch.float64) is None
    assert (chosen(torch.bfloat16) is not None) == HAS_BF16
    if not HAS_BF16:
        with pytest.raises(BackendError, match="AVX-512 BF16"):
            chosen(torch.bfloat16, block_kernel="cpp")
    for changes in ({"attention": "sdpa"}, {"compile": True}, {"activation_checkpointing": "L"}):
        assert chosen(**changes) is None
        with pytest.raises(BackendError, match=f"{next(iter(changes))} is"):
            chosen(block_kernel="cpp", **changes)
    monkeypatch.setattr(choice_module, "WIDEST", 16)
    assert chosen() is None
    assert isinstance(chosen(block_kernel="cpp"), CppBlocks)


def test_a_kernel_that_computes_wrongly_is_not_used(monkeypatch, caplog):
    honest = CppBlocks.backward

    def wrong(self, *arguments):
        d_x, d_weights = honest(self, *arguments)
        return d_x, [d_weights[0] * 1.001, *d_weights[1:]]

    monkeypatch.setattr(CppBlocks, "backward", wrong)
    with pytest.raises(BackendError, match=r"gradient of attn\.gqkv_proj\.weight differs"):
        chosen(block_kernel="cpp")
    assert chosen() is None
    assert "slower" in caplog.text


def test_a_compiler_that_fails_is_quoted_and_auto_does_without(monkeypatch, tmp_path, caplog):
    take_broken_compiler(monkeypatch, tmp_path)
    for cached in (blocks_module.library, build.load_kernel):
        cached.cache_clear()
    try:
        with pytest.raises(BackendError, match="it broke"):
            chosen(block_kernel="cpp")
        assert chosen() is None
    finally:
        for cached in (blocks_module.library, build.load_kernel):
            cached.cache_clear()
    assert "it broke" in caplog.text


@pytest.mark.parametrize("dtype", FORMATS)
def test_training_steps_follow_those_of_torch(dtype):
    def run(kernel, dtype=dtype):
        from memory_source import MemorySource, random_rows

        config = small_config(model={"preset": "test", **WIDE}, block_kernel=kernel)
        compute = build_compute(config, dtype, CPU)
        optimizer = AdamAtan2(compute.shards.parameters.values(), lr=1e-3, ema_decay=0.9)
        step = TrainStep(compute, optimizer, config, CPU)
        assert (step.blocks is not None) == (kernel == "cpp")
        assert compute.is_copy == (kernel == "torch" and dtype == torch.bfloat16)
        batches = iter(MemorySource(random_rows(48, seed=1)).loader(config, 0, 1))
        norms = []
        for number in range(6):
            depth = Depth.from_bp_steps(config.model.resolve(), 2 + number // 2)
            result = step.run(next(batches), depth=depth, lr=1e-3, step=number)
            norms.append([float(result.sums[0]), result.gradient_norm])
        return torch.tensor(norms, dtype=torch.float64)

    rtol = 2e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(run("cpp"), run("torch", torch.float32), rtol=rtol, atol=0)
    torch.testing.assert_close(run("cpp"), run("torch"), rtol=rtol, atol=0)
