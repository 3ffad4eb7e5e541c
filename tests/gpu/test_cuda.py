"""What only a GPU can show: the same numbers as on the CPU, in the formats that run there."""

import random

import pytest
import torch
from torch.nn.functional import cross_entropy

from hrmtext.batch import PackedBatch, RowLayout
from hrmtext.config.model import preset
from hrmtext.model import Depth, KVCache, build_model, make_plan
from hrmtext.runtime.compile import compile_blocks
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.precision import ComputeModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def random_batch(config, seed=0):
    rng = random.Random(seed)

    def tokens(count):
        return [rng.randrange(config.vocab_size) for _ in range(count)]

    rows = [(tokens(rng.randint(1, 40)), tokens(rng.randint(1, 20))) for _ in range(9)]
    return PackedBatch.from_rows(rows, num_tokens=512)


def loss_and_gradients(config, device, dtype, backend, compiled=False):
    model = build_model(config, seed=1, device=device).to(dtype)
    if compiled:
        compile_blocks(model, True, device=torch.device(device))
    batch = random_batch(config)
    plan = make_plan(batch.layout, device=device, dtype=dtype, backend=backend)
    select = batch.supervised()
    moved = batch.to(device)
    out = model(
        moved.tokens,
        moved.positions,
        plan,
        depth=Depth.from_bp_steps(config, 5),
        select=select.to(device),
    )
    loss = cross_entropy(out.logits.float(), batch.labels[select].to(device))
    loss.backward()
    return loss.item(), {n: p.grad.float().cpu() for n, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_fp32_on_the_gpu_equals_the_cpu(backend):
    config = preset("micro")
    expected, gradients = loss_and_gradients(config, "cpu", torch.float64, "reference")
    loss, found = loss_and_gradients(config, "cuda", torch.float32, backend)
    assert loss == pytest.approx(expected, abs=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient.float(), rtol=2e-3, atol=1e-5)


@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inside
@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_on_the_gpu_is_as_near_to_fp64_as_bf16_on_the_cpu(compiled):
    config = preset("micro")
    expected, gradients = loss_and_gradients(config, "cpu", torch.float64, "reference")
    _, on_cpu = loss_and_gradients(config, "cpu", torch.bfloat16, "sdpa")
    loss, found = loss_and_gradients(config, "cuda", torch.bfloat16, "sdpa", compiled)
    assert loss == pytest.approx(expected, abs=0.02)
    for name, exact in gradients.items():
        budget = 2 * (on_cpu[name] - exact).norm() + 1e-6
        assert (found[name] - exact).norm() <= budget, name


def test_cached_decoding_on_the_gpu_equals_one_pass():
    config = preset("micro")
    model = build_model(config, seed=1, device="cuda")
    batch = random_batch(config).to("cuda")
    layout = batch.layout
    with torch.no_grad():
        whole = model(
            batch.tokens, batch.positions, make_plan(layout, device="cuda", dtype=torch.float32)
        ).logits
        cache = KVCache(config, len(layout.lengths), 64, device="cuda")
        # Every row as a prompt of its own prefix length, then one decoded token.
        prefixes = [int(layout.visible_end[start]) for start in layout.starts()]
        prompts = RowLayout.from_prefixes(prefixes, prefixes)
        pick = torch.cat(
            [torch.arange(s, s + p) for s, p in zip(layout.starts(), prefixes, strict=True)]
        ).to("cuda")
        plan = cache.prefill(prompts, make_plan(prompts, device="cuda", dtype=torch.float32))
        model(batch.tokens[pick], batch.positions[pick], plan)
        plan.commit()
        going_on = [i for i, p in enumerate(prefixes) if p < layout.lengths[i]]
        cache.keep(torch.tensor(going_on, device="cuda"))
        at = torch.tensor([layout.starts()[i] + prefixes[i] for i in going_on], device="cuda")
        step = cache.decode()
        logits = model(batch.tokens[at], step.positions, step).logits
    torch.testing.assert_close(logits, whole[at], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["chunked", "linear"])
def test_a_microbatch_makes_the_host_wait_for_nothing(loss):
    from hrmtext.train.loss import Microbatch, forward_loss, step_sums

    config, device = preset("micro"), torch.device("cuda")
    compute = ComputeModel(build_model(config, seed=1, device="cuda"), torch.bfloat16)
    batch = random_batch(config)

    def accumulate():
        micro = Microbatch.prepare(batch, device=device, dtype=torch.bfloat16, head_dim=64)
        found = forward_loss(
            compute.module, micro, depth=None, scale=0.1, chunk_bytes=1 << 20, kernel=loss
        )
        found.total.backward()
        return step_sums(found, micro)

    accumulate()  # chooses and tests kernels, which may wait
    compute.clear_gradients()
    torch.cuda.set_sync_debug_mode("error")
    try:
        accumulate()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inside
def test_compiled_and_foreach_optimizers_agree_on_the_gpu():
    generator = torch.Generator().manual_seed(0)
    start, *arriving = (torch.randn(1000, 130, generator=generator).cuda() for _ in range(6))
    results = []
    for kernel in ("foreach", "compiled"):
        weight = torch.nn.Parameter(start.clone())
        optimizer = AdamAtan2([weight], lr=0.01, ema_decay=0.9, kernel=kernel)
        for gradient in arriving:
            weight.grad = gradient
            optimizer.step()
        results.append((weight.detach(), optimizer.averages()[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kernel", ["compiled", "linear"])
def test_loss_kernels_agree_on_the_gpu_in_bf16(kernel):
    from hrmtext.train.loss import cross_entropy as our_cross_entropy

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator) for n in (300, 4000))
    labels = torch.randint(4000, (300,), generator=generator).cuda()
    results = []
    for name, dtype in (("chunked", torch.float64), ("chunked", torch.bfloat16), (kernel, None)):
        h, w = (
            x.bfloat16().to("cuda", dtype or torch.bfloat16).requires_grad_()
            for x in (hidden, weight * 0.125)
        )
        found = our_cross_entropy(h, w, labels, chunk_bytes=1 << 20, kernel=name)
        found.total.backward()
        results.append([x.double() for x in (found.total.detach(), h.grad, w.grad)])
    for exact, near, value in zip(*results, strict=True):
        assert (value - exact).norm() <= 2 * (near - exact).norm() + 1e-6 * exact.norm()


def test_training_runs_on_the_gpu_and_its_loss_falls():
    config = preset("micro")
    model = build_model(config, seed=1, device="cuda")
    compute = ComputeModel(model, torch.bfloat16)
    optimizer = AdamAtan2(model.parameters(), lr=2e-3)
    batch = random_batch(config)
    select = batch.supervised()
    moved = batch.to("cuda")
    plan = make_plan(batch.layout, device="cuda", dtype=torch.bfloat16)
    losses = []
    for _ in range(60):
        compute.clear_gradients()
        out = compute.module(moved.tokens, moved.positions, plan, select=select.to("cuda"))
        loss = cross_entropy(out.logits.float(), batch.labels[select].to("cuda"))
        loss.backward()
        optimizer.step()
        compute.refresh()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
