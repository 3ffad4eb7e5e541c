"""Adam-atan2: equal to its formula in fp64, exact averages, and parameters without gradient."""

import math
import shutil

import pytest
import torch

from hrmtext.config import preset
from hrmtext.errors import BackendError, CheckpointError, ConfigError
from hrmtext.model import build_model
from hrmtext.model.depth import Depth
from hrmtext.runtime.native import compiler
from hrmtext.train.cpp import optimizer as cpp
from hrmtext.train.optim import AdamAtan2

SHAPES = ((5, 3), (7,), (1, 4), (6, 6))


def reference_step(p, g, m, v, t, *, lr, betas, weight_decay):
    """The recipe's formula, one parameter, element by element in Python floats."""
    b1, b2 = betas
    p, m, v = (x.clone() for x in (p, m, v))
    flat = (x.view(-1) for x in (p, g, m, v))
    for i, (pi, gi, mi, vi) in enumerate(zip(*(x.tolist() for x in flat), strict=True)):
        pi *= 1 - lr * weight_decay
        mi = b1 * mi + (1 - b1) * gi
        vi = b2 * vi + (1 - b2) * gi * gi
        pi -= lr / (1 - b1**t) * math.atan2(mi, math.sqrt(vi) / math.sqrt(1 - b2**t))
        p.view(-1)[i], m.view(-1)[i], v.view(-1)[i] = pi, mi, vi
    return p, m, v


def parameters(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in SHAPES
    ]


def gradients(step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator, dtype=torch.float64) * scale for s in SHAPES]


@pytest.mark.parametrize("lr_kind", ["float", "tensor"])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e9])
def test_fp64_steps_equal_the_formula_at_any_gradient_scale(lr_kind, scale):
    options = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    ours = parameters(torch.float64)
    optimizer = AdamAtan2(ours, lr=0.01, ema_decay=None, **options)
    theirs = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in ours]
    for step in range(1, 8):
        lr = 0.01 / step
        optimizer.set_lr(lr if lr_kind == "float" else torch.tensor(lr, dtype=torch.float64))
        for i, gradient in enumerate(gradients(step, scale)):
            ours[i].grad = gradient
            theirs[i] = reference_step(
                theirs[i][0], gradient, *theirs[i][1:], step, lr=lr, **options
            )
        optimizer.step()
    for p, (q, _, _) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-13, atol=1e-14)


NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU"
)


@NEEDS_COMPILER
@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inside
def test_the_compiled_kernel_equals_the_formula_and_new_rates_and_counts_compile_nothing():
    options = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    ours = parameters(torch.float64)
    optimizer = AdamAtan2(ours, lr=0.01, ema_decay=0.75, kernel="compiled", **options)
    theirs = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in ours]
    averages = [p.detach().clone() for p in ours]
    counts = [0] * len(ours)
    compiled = []
    for step in range(1, 7):
        optimizer.set_lr(0.01 / step)
        for i, gradient in enumerate(gradients(step)):
            ours[i].grad = None if i == 1 and step % 2 else gradient  # it counts by itself
            if ours[i].grad is None:
                continue
            counts[i] += 1
            theirs[i] = reference_step(
                theirs[i][0], gradient, *theirs[i][1:], counts[i], lr=0.01 / step, **options
            )
        optimizer.step()
        averages = [0.75 * a + 0.25 * t[0] for a, t in zip(averages, theirs, strict=True)]
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    for p, (q, _, _) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-13, atol=1e-14)
    for found, expected in zip(optimizer.averages(), averages, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    # All parameters have been met after two steps.
    assert compiled[-1] == compiled[1], "a later step was compiled anew"


NEEDS_CPP = pytest.mark.skipif(not cpp.is_usable(), reason="needs a C++ compiler")
KERNELS = ["foreach", pytest.param("cpp", marks=NEEDS_CPP)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_fp32_stays_within_rounding_of_fp64(kernel):
    narrow, wide = parameters(torch.float32), parameters(torch.float64)
    for p, q in zip(narrow, wide, strict=True):
        q.data.copy_(p.data)
    optimizers = [
        AdamAtan2(x, lr=0.01, ema_decay=0.9, kernel=k)
        for x, k in ((narrow, kernel), (wide, "auto"))
    ]
    steps = 50
    for step in range(steps):
        for p, q, g in zip(narrow, wide, gradients(step), strict=True):
            p.grad, q.grad = g.float(), g.float().double()
        for optimizer in optimizers:
            optimizer.step()
    # Each step rounds the weight a few times and the update (below lr * pi/2) a few times.
    budget = steps * 4 * torch.finfo(torch.float32).eps
    for p, q in zip(narrow, wide, strict=True):
        assert float(((p - q).abs() / (q.abs() + 0.05)).max().detach()) < budget
    for average, exact in zip(*(one.averages() for one in optimizers), strict=True):
        assert float(((average - exact).abs() / (exact.abs() + 0.05)).max()) < budget


@NEEDS_CPP
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-25, 1e9])
def test_the_cpp_kernel_is_as_near_to_fp64_as_foreach_at_any_gradient_scale(scale):
    sizes = [1, 5, 16, 33, 70_001]  # less than a vector, whole ones, several threads' worth
    draw = torch.Generator().manual_seed(5)
    starts = [torch.randn(size, generator=draw) for size in sizes]
    found = {}
    for kernel, dtype in (
        ("cpp", torch.float32),
        ("foreach", torch.float32),
        ("auto", torch.float64),
    ):
        own = [torch.nn.Parameter(start.to(dtype, copy=True)) for start in starts]
        optimizer = AdamAtan2(own, lr=0.05, ema_decay=0.8, kernel=kernel)
        draw = torch.Generator().manual_seed(6)
        for step in range(5):
            for p in own:
                gradient = scale * torch.randn(p.shape, generator=draw)
                gradient[::7] = 0.0
                p.grad = gradient.to(dtype)
            optimizer.step()
            optimizer.set_lr(0.05 / (step + 2))
        state = [optimizer.state[p] for p in own]
        found[kernel] = [torch.cat([p.detach() for p in own])] + [
            torch.cat([one[name] for one in state]) for name in ("exp_avg", "exp_avg_sq", "ema")
        ]
    for ours, plain, exact in zip(found["cpp"], found["foreach"], found["auto"], strict=True):
        error, budget = (float((one - exact).abs().max()) for one in (ours, plain))
        assert error <= 2 * budget + 1e-7 * float(exact.abs().max())


@pytest.mark.parametrize(
    ("kernel", "width"),
    [("foreach", 64), ("foreach", 5), pytest.param("cpp", 64, marks=NEEDS_CPP),
     pytest.param("cpp", 5, marks=NEEDS_CPP)],
)  # fmt: skip
def test_a_gradient_of_some_rows_is_one_with_zeros_in_the_others(kernel, width):
    rows, draw = 700, torch.Generator().manual_seed(0)  # several threads' worth
    start = torch.randn(rows, width, generator=draw)
    tables = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [AdamAtan2([p], lr=0.1, ema_decay=0.8, kernel=kernel) for p in tables]
    for chosen in ([0, 3, 3, 699], [5], [], [3, 350, 351, 0]):
        values = torch.randn(len(chosen), width, generator=draw)
        index = torch.tensor([chosen], dtype=torch.int64)
        with torch.sparse.check_sparse_tensor_invariants():
            sparse = torch.sparse_coo_tensor(index, values, start.shape).coalesce()
        for table, optimizer, gradient in zip(
            tables, optimizers, (sparse, sparse.to_dense()), strict=True
        ):
            table.grad = gradient
            optimizer.step()
    states = [[p.detach(), *o.state[p].values()] for p, o in zip(tables, optimizers, strict=True)]
    for few, all_rows in zip(*states, strict=True):
        assert few == all_rows if isinstance(few, int) else torch.equal(few, all_rows)


@NEEDS_CPP
@pytest.mark.parametrize("size", [1, 5, 16, 1025, 70_001])
def test_the_size_of_an_update_is_that_of_fp64_for_any_number_of_threads(size):
    draw = torch.Generator().manual_seed(size)
    gradients = [torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(3)]
    squares, plain = {}, {}
    for dtype, kernel in ((torch.float64, "foreach"), (torch.float32, "cpp")):
        parameter = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
        optimizer = AdamAtan2([parameter], lr=0.1, kernel=kernel)
        for gradient in gradients:
            parameter.grad = gradient.to(dtype)
            optimizer.step()
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                squares[kernel, threads] = optimizer.update_squares([parameter]).tolist()
                both = [parameter.grad, parameter.detach()]
                plain[kernel, threads] = optimizer.squares(both).tolist()
        finally:
            torch.set_num_threads(before)
    assert plain["cpp", 1] == plain["cpp", 2] == plain["cpp", 5]
    assert plain["cpp", 1] == pytest.approx(plain["foreach", 1], rel=1e-6)
    assert squares["cpp", 1] == squares["cpp", 2] == squares["cpp", 5]
    assert squares["cpp", 1] == pytest.approx(squares["foreach", 1], rel=1e-6)


@NEEDS_CPP
def test_auto_takes_the_cpp_kernel_for_fp32_on_a_cpu_and_by_name_it_refuses_others():
    for dtype, kernel in ((torch.float32, "cpp"), (torch.float64, "foreach")):
        parameter = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        assert AdamAtan2([parameter], lr=0.1)._kernel_of(parameter) == kernel
    with pytest.raises(
        BackendError, match=r"fp32 weights on the CPU, a parameter is torch\.float64"
    ):
        AdamAtan2([parameter], lr=0.1, kernel="cpp")


@NEEDS_CPP
def test_a_gradient_with_gaps_is_read_as_it_is_seen():
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    ends = []
    for given in (gradient.T, gradient.T.contiguous()):
        parameter = torch.nn.Parameter(torch.ones(4, 6))
        parameter.grad = given
        AdamAtan2([parameter], lr=0.1, kernel="cpp").step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)


def test_a_kernel_that_computes_wrongly_is_not_used(monkeypatch, caplog):
    def wrong(kernel, updates, numbers):
        updates[0].parameter.add_(1e-3)

    monkeypatch.setattr(cpp, "update", wrong)
    cpp.library.cache_clear(), cpp.is_usable.cache_clear()
    try:
        if compiler() is not None:
            with pytest.raises(BackendError, match="weight is not that of the formula"):
                cpp.library()
        parameter = torch.nn.Parameter(torch.zeros(3))
        assert AdamAtan2([parameter], lr=0.1)._kernel_of(parameter) == "foreach"
    finally:
        cpp.library.cache_clear(), cpp.is_usable.cache_clear()


def test_the_average_starts_at_the_initial_weights_and_is_exact():
    ours = parameters(torch.float64)
    expected = [p.detach().clone() for p in ours]
    optimizer = AdamAtan2(ours, lr=0.1, ema_decay=0.75)
    for step in range(6):
        for p, g in zip(ours, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
        expected = [0.75 * e + 0.25 * p.detach() for e, p in zip(expected, ours, strict=True)]
    for average, e in zip(optimizer.averages(), expected, strict=True):
        torch.testing.assert_close(average, e, rtol=1e-14, atol=1e-15)


def test_a_parameter_without_gradient_is_left_alone_but_its_average_moves_on():
    ours = parameters(torch.float64)
    before = ours[1].detach().clone()
    optimizer = AdamAtan2(ours, lr=0.1, weight_decay=0.5, ema_decay=0.5)
    ours[1].grad = gradients(0)[1]
    optimizer.step()
    moved = ours[1].detach().clone()
    assert not torch.equal(before, moved)
    state = optimizer.state[ours[1]]
    moments = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    ours[1].grad = None
    for _ in range(3):
        optimizer.step()
    assert torch.equal(ours[1].detach(), moved)
    assert state["step"] == 1
    assert torch.equal(state["exp_avg"], moments[0])
    assert torch.equal(state["exp_avg_sq"], moments[1])
    expected = before
    for _ in range(4):
        expected = expected.lerp(moved, 0.5)
    torch.testing.assert_close(state["ema"], expected)


def test_bias_correction_counts_each_parameter_by_itself():
    late, fresh = parameters(torch.float64), parameters(torch.float64)
    first = AdamAtan2(late, lr=0.1, ema_decay=None)
    for _ in range(5):
        late[0].grad = gradients(9)[0]
        first.step()
    late[2].grad = fresh[2].grad = gradients(3)[2]
    first.step()
    second = AdamAtan2(fresh, lr=0.1, ema_decay=None)
    second.step()
    assert torch.equal(late[2].detach(), fresh[2].detach())


def test_at_two_backward_steps_the_embedding_is_skipped():
    from hrmtext.batch import PackedBatch
    from hrmtext.model import make_plan

    config = preset("test")
    model = build_model(config, seed=0)
    optimizer = AdamAtan2(model.parameters(), lr=0.1)
    batch = PackedBatch.from_rows([([1, 2, 3], [4, 5])])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for bp_steps, moves in ((2, False), (8, True)):
        optimizer.zero_grad(set_to_none=True)
        plan = make_plan(batch.layout)
        depth = Depth.from_bp_steps(config, bp_steps)
        model(batch.tokens, batch.positions, plan, depth=depth).logits.logsumexp(
            -1
        ).sum().backward()
        optimizer.step()
        name = "model.embed_tokens.weight"
        changed = not torch.equal(dict(model.named_parameters())[name], before[name])
        assert changed == moves, bp_steps
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_exported_state_goes_on_bit_for_bit():
    names = ("a", "b", "c", "d")
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    first = AdamAtan2(ours, lr=0.1, ema_decay=0.9)
    for step in range(4):
        for i, (p, g) in enumerate(zip(ours, gradients(step), strict=True)):
            p.grad = None if i == 3 and step < 2 else g.float()
        first.step()
    second = AdamAtan2(theirs, lr=0.1, ema_decay=0.9)
    exported = first.export_state(dict(zip(names, ours, strict=True)))
    averages = dict(zip(names, first.averages(), strict=True))
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    second.import_state(dict(zip(names, theirs, strict=True)), exported, averages)
    for p, q, g in zip(ours, theirs, gradients(7), strict=True):
        p.grad, q.grad = g.float(), g.float()
    first.step()
    second.step()
    for p, q in zip([*ours, *first.averages()], [*theirs, *second.averages()], strict=True):
        assert torch.equal(p, q)
    del exported["exp_avg_sq.c"]
    with pytest.raises(CheckpointError, match=r"exp_avg_sq\.c is missing"):
        second.import_state(dict(zip(names, theirs, strict=True)), exported, averages)


def test_bf16_weights_are_refused():
    with pytest.raises(ConfigError, match="fp32 master weights"):
        AdamAtan2([torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], lr=0.1)
