"""The C++ kernel gives what the module gives: any shape, depth, architecture, batch."""

import pytest
import torch
from compilers import take_broken_compiler
from generate_helpers import sentences, text_model

from hrmtext.batch import RowLayout
from hrmtext.config import preset
from hrmtext.config.generate import GenerateConfig
from hrmtext.errors import BackendError, DataError
from hrmtext.generate import choice as choice_module
from hrmtext.generate.choice import Steps
from hrmtext.generate.cpp import CppStep
from hrmtext.generate.cpp import step as cpp_step
from hrmtext.generate.step import DecodeStep
from hrmtext.model import Depth, KVCache, build_model
from hrmtext.runtime.native import build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

PROMPTS = sentences(13, seed=4)
SHAPES = [
    {},
    {"hidden_size": 64, "num_heads": 1, "head_dim": 64, "vocab_size": 61},
    {"hidden_size": 96, "num_heads": 3, "head_dim": 32, "intermediate_size": 160},
    {"H_cycles": 3, "L_cycles": 1, "num_layers_per_stack": 1, "embedding_scale": 2.5},
    {"H_cycles": 1, "L_cycles": 4, "rope_theta": 500.0, "rms_norm_eps": 1e-3},
    {"shared_stack": True},
    {"shared_stack": True, "H_cycles": 1, "L_cycles": 0, "num_layers_per_stack": 3},
    {"H_injection": False, "H_cycles": 1, "L_cycles": 5},
]


def filled_cache(config, num_rows, capacity, seed):
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(config, num_rows, capacity)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    cache.lengths = torch.randint(0, capacity - 3, (num_rows,), generator=generator)
    cache.longest = int(cache.lengths.max())
    return cache


def copied(cache, config):
    other = KVCache(config, cache.num_rows, cache.capacity)
    other.keys = [tensor.clone() for tensor in cache.keys]
    other.values = [tensor.clone() for tensor in cache.values]
    other.lengths, other.longest = cache.lengths.clone(), cache.longest
    return other


@torch.inference_mode()
@pytest.mark.parametrize("changes", SHAPES, ids=lambda changes: "-".join(changes) or "test")
@pytest.mark.parametrize("num_rows", [1, 5, 14])
def test_three_steps_equal_the_modules_within_the_error_of_fp32(changes, num_rows):
    config = preset("test", **changes)
    model = build_model(config, seed=1)
    exact = build_model(config, seed=1).double()
    ours = filled_cache(config, num_rows, 40, seed=2)
    theirs = copied(ours, config)
    wide = KVCache(config, num_rows, 40, dtype=torch.float64)
    wide.keys = [tensor.double() for tensor in ours.keys]
    wide.values = [tensor.double() for tensor in ours.values]
    wide.lengths, wide.longest = ours.lengths.clone(), ours.longest
    steps = (CppStep(model), DecodeStep(model), DecodeStep(exact))
    for at in range(3):
        tokens = (torch.arange(num_rows) * 5 + at) % config.vocab_size
        found, eager, expected = (
            step(tokens, cache, None, 0.3 if config.H_cycles > 1 else 0.0).double()
            for step, cache in zip(steps, (ours, theirs, wide), strict=True)
        )
        budget = 8 * float((eager - expected).abs().max()) + 1e-6
        assert float((found - expected).abs().max()) <= budget
    for a, b in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    assert torch.equal(ours.lengths, theirs.lengths) and ours.longest == theirs.longest


LENGTHS = (7, 1, 12, 4)
BLOCKS = ([(0, 7)], [(0, 1)], [(2, 6), (9, 12)], [])
"""A prompt, a prompt of one token, two turns with an answer between, a causal row."""


def reading(config, held):
    """Tokens, their layout, and the same cache thrice, the last in fp64; `held` in use already."""
    tokens = torch.arange(sum(LENGTHS)) * 5 % config.vocab_size
    layout = RowLayout.from_blocks(LENGTHS, BLOCKS)
    ours = filled_cache(config, len(LENGTHS), 24, seed=2)
    ours.hold(torch.tensor(held))
    theirs, wide = copied(ours, config), copied(ours, config)
    wide.keys = [tensor.double() for tensor in ours.keys]
    wide.values = [tensor.double() for tensor in ours.values]
    return tokens, layout, (ours, theirs, wide)


@torch.inference_mode()
@pytest.mark.parametrize("changes", SHAPES, ids=lambda changes: "-".join(changes) or "test")
@pytest.mark.parametrize("held", [(0, 0, 0, 0), (3, 0, 12, 5)])
def test_reading_prompts_equals_the_module_within_the_error_of_fp32(changes, held):
    config = preset("test", **changes)
    model = build_model(config, seed=1)
    exact = build_model(config, seed=1).double()
    tokens, layout, caches = reading(config, held)
    found, eager, expected = (
        step.read(tokens, layout, cache, None, 0.3 if config.H_cycles > 1 else 0.0).double()
        for step, cache in zip(
            (CppStep(model), DecodeStep(model), DecodeStep(exact)), caches, strict=True
        )
    )
    assert found.shape == (len(LENGTHS), config.vocab_size)
    budget = 8 * float((eager - expected).abs().max()) + 1e-6
    assert float((found - expected).abs().max()) <= budget
    ours, theirs, _ = caches
    for a, b in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    assert ours.lengths.tolist() == [a + b for a, b in zip(held, LENGTHS, strict=True)]
    assert ours.longest == theirs.longest == max(ours.lengths)


WAYS = ((1, 512, 0), (1, 8, 0), (3, 512, 0), (2, 1, 0), (2, 512, 1 << 30), (2, 4, 1 << 30))
"""Threads, tokens of a thread that are read together, weights up to which threads go apart."""


@torch.inference_mode()
def test_prompts_read_in_groups_or_by_several_threads_give_the_same_bits(monkeypatch):
    config = preset("test")
    step = CppStep(build_model(config, seed=1))
    before = torch.get_num_threads()
    found = []
    try:
        for threads, together, apart in WAYS:
            torch.set_num_threads(threads)
            monkeypatch.setattr(cpp_step, "READ_TOKENS", together)
            monkeypatch.setattr(cpp_step, "APART_BYTES", apart)
            tokens, layout, (cache, _, _) = reading(config, (3, 0, 12, 5))
            logits = step.read(tokens, layout, cache, None, 0.0)
            found.append((logits, *cache.keys, *cache.values))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@torch.inference_mode()
def test_long_rows_are_left_to_the_module(monkeypatch):
    config = preset("test")
    model = build_model(config, seed=1)
    tokens, layout, (ours, theirs, _) = reading(config, (3, 0, 12, 5))
    expected = DecodeStep(model).read(tokens, layout, theirs, None, 0.0)
    monkeypatch.setattr(cpp_step, "LONGEST_READ", 23)  # the longest holds 12 and reads 12
    assert torch.equal(CppStep(model).read(tokens, layout, ours, None, 0.0), expected)
    assert ours.lengths.tolist() == theirs.lengths.tolist()


@torch.inference_mode()
def test_prompts_that_do_not_fit_the_cache_are_refused_and_it_stays_as_it_was():
    config = preset("test")
    tokens, layout, (cache, _, _) = reading(config, (3, 0, 13, 5))
    with pytest.raises(DataError, match="would hold 25 tokens"):
        CppStep(build_model(config, seed=1)).read(tokens, layout, cache, None, 0.0)
    assert cache.lengths.tolist() == [3, 0, 13, 5]


@torch.inference_mode()
@pytest.mark.parametrize("depth", [(1, 3), (2, 1), (1, 1)])
def test_fewer_cycles_use_the_slots_of_the_full_recurrence(depth):
    config = preset("test")
    model = build_model(config, seed=1)
    H_cycles, L_cycles = depth
    shallow = Depth(H_cycles, L_cycles, (False,) * (H_cycles * (L_cycles + 1)))
    ours = filled_cache(config, 4, 20, seed=3)
    theirs = copied(ours, config)
    tokens = torch.arange(4)
    found = CppStep(model)(tokens, ours, shallow, 0.0)
    torch.testing.assert_close(
        found, DecodeStep(model)(tokens, theirs, shallow, 0.0), atol=2e-5, rtol=0
    )
    tokens, layout, (ours, theirs, _) = reading(config, (3, 0, 12, 5))
    found, expected = (
        step(model).read(tokens, layout, cache, shallow, 0.0)
        for step, cache in ((CppStep, ours), (DecodeStep, theirs))
    )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@torch.inference_mode()
def test_bf16_weights_stay_within_the_error_of_bf16():
    config = preset("test")
    model = build_model(config, seed=1).bfloat16()
    exact = build_model(config, seed=1).bfloat16().float()
    cache = filled_cache(config, 6, 20, seed=3)
    others = [copied(cache, config) for _ in range(2)]
    tokens = torch.arange(6)
    expected = DecodeStep(exact)(tokens, others[0], None, 0.0)
    eager = DecodeStep(model)(tokens, others[1], None, 0.0)
    found = CppStep(model)(tokens, cache, None, 0.0)
    assert float((found - expected).abs().max()) <= float((eager - expected).abs().max())
    tokens, layout, caches = reading(config, (0, 0, 0, 0))
    found, eager, expected = (
        step.read(tokens, layout, cache, None, 0.0).float()
        for step, cache in zip(
            (CppStep(model), DecodeStep(model), DecodeStep(exact)),
            (caches[0], caches[1], copied(caches[1], config)),
            strict=True,
        )
    )
    assert float((found - expected).abs().max()) <= float((eager - expected).abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("apart", [0, 1 << 30])
def test_any_number_of_threads_gives_the_same_bits(monkeypatch, apart):
    monkeypatch.setattr(cpp_step, "APART_BYTES", apart)
    config = preset("test")
    step = CppStep(build_model(config, seed=1))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(step(torch.arange(21), filled_cache(config, 21, 20, seed=3), None, 0.3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "top_k": 50, "seed": 3}], ids=["greedy", "sampled"]
)
def test_answers_are_those_of_the_eager_step(options):
    model = text_model()
    eager, cpp = (
        model.generate_tokens(
            PROMPTS, config=GenerateConfig(max_new_tokens=40, step=step, **options)
        )
        for step in ("eager", "cpp")
    )
    assert [a.tokens for a in cpp] == [a.tokens for a in eager]
    for one, other in zip(cpp, eager, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_auto_takes_the_kernel_for_a_small_model_and_eager_beyond_its_limits(monkeypatch):
    model = build_model(preset("test"), seed=0)
    assert isinstance(Steps(model).get("auto"), CppStep)
    assert isinstance(Steps(build_model(preset("test"), seed=0).half()).get("auto"), DecodeStep)
    monkeypatch.setattr(choice_module, "CPP_BYTES", 1000)
    assert isinstance(Steps(model).get("auto"), DecodeStep)
    assert isinstance(Steps(model).get("cpp"), CppStep)  # by name: it runs or raises


def test_changed_weights_are_packed_anew_however_they_were_changed():
    model = build_model(preset("test"), seed=0)
    steps = Steps(model)
    steps.get("cpp")
    model.lm_head.weight.data[:9] = model.lm_head.weight.data[:9].flip(0).clone()  # no new version
    model.model.L_module.layers[0].mlp.down_proj.weight.data.mul_(2)
    with torch.inference_mode():
        cache = filled_cache(model.config, 2, 20, seed=3)
        other = copied(cache, model.config)
        torch.testing.assert_close(
            steps.get("cpp")(torch.arange(2), cache, None, 0.0),
            DecodeStep(model)(torch.arange(2), other, None, 0.0),
            atol=2e-5,
            rtol=0,
        )


@pytest.mark.parametrize("changes", [{"hidden_size": 40}, {"head_dim": 12}])
def test_odd_widths_are_refused_by_name_and_left_to_eager_by_auto(changes):
    steps = Steps(build_model(preset("test", **changes), seed=0))
    assert isinstance(steps.get("auto"), DecodeStep)
    with pytest.raises(BackendError, match="multiples of"):
        steps.get("cpp")


@pytest.fixture
def nothing_built():
    """No kernel is loaded yet, and none that the test makes is kept."""
    for cached in (cpp_step.library, build.load_kernel):
        cached.cache_clear()
    yield
    for cached in (cpp_step.library, build.load_kernel):
        cached.cache_clear()


@pytest.mark.usefixtures("nothing_built")
def test_without_a_compiler_auto_is_eager_and_the_name_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    steps = Steps(build_model(preset("test"), seed=0))
    assert isinstance(steps.get("auto"), DecodeStep)
    with pytest.raises(BackendError, match=r"C\+\+ compiler"):
        steps.get("cpp")


@pytest.mark.usefixtures("nothing_built")
def test_a_compiler_that_fails_is_quoted_and_auto_does_without(monkeypatch, tmp_path, caplog):
    take_broken_compiler(monkeypatch, tmp_path)
    with pytest.raises(BackendError, match="it broke"):
        cpp_step.library()
    assert isinstance(Steps(build_model(preset("test"), seed=0)).get("auto"), DecodeStep)
    assert "it broke" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.parametrize("path", ["__call__", "read"])
def test_a_kernel_that_computes_wrongly_is_not_used(monkeypatch, caplog, path):
    steps = Steps(build_model(preset("test"), seed=0))
    honest = getattr(CppStep, path)
    monkeypatch.setattr(CppStep, path, lambda self, *args: honest(self, *args) * 1.01)
    with pytest.raises(BackendError, match="differ from the module's"):
        steps.get("cpp")
    assert isinstance(steps.get("auto"), DecodeStep)
    assert "slower" in caplog.text
