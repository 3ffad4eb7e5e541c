"""llama.cpp under the prefix mask: real files, the real library, our logits as the reference."""

import ctypes
import random
import sys
import unicodedata
from functools import cache

import pytest
import torch

from hrmtext.artifacts.gguf_file import open_gguf
from hrmtext.cli.main import main
from hrmtext.config import preset
from hrmtext.config.evaluate import EvaluateConfig
from hrmtext.convert import gguf as writer
from hrmtext.convert import gguf_verify
from hrmtext.convert.gguf import write_gguf
from hrmtext.convert.gguf_types import FILE_TYPES
from hrmtext.data.example import HeldOutRow
from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer
from hrmtext.errors import BackendError, CheckpointError, ConfigError, DataError
from hrmtext.evaluate import evaluate
from hrmtext.generate import TextModel, llama_cpp_library, load
from hrmtext.generate.llama_cpp import LlamaCppModel
from hrmtext.generate.reference import Distance, reference_logits
from hrmtext.generate.selftest import check_logits
from hrmtext.generate.selftest_paths import LlamaCppPath
from hrmtext.model import build_model

pytest.importorskip("xllamacpp", reason="the extra `gguf` is not installed")
pytest.importorskip("gguf", reason="the extra `gguf` is not installed")

LENGTHS = (1, 2, 3, 8, 31, 100, 255, 256, 257, 500)
SHAPES = {
    "plain": {},
    "other cycles": {"H_cycles": 3, "L_cycles": 2, "num_layers_per_stack": 1},
    "wide heads": {"num_heads": 2, "head_dim": 32, "embedding_scale": 11.0, "rope_theta": 3e4},
}


@cache
def tokenizer():
    generator = random.Random(0)
    words = ("add", "sort", "the", "list", "of", "numbers", "what", "is", "word", "seven")
    texts = [f"{' '.join(generator.choices(words, k=8))} {generator.randrange(999)}"] * 3
    texts += [" ".join(generator.choices(words, k=9)) for _ in range(100)]
    return PromptTokenizer(train_tokenizer(texts, 300))


def text_model(seed=0, **changes):
    config = preset("test", **{"vocab_size": 320, "max_seq_len": 512, **changes})
    return TextModel(build_model(config, seed=seed), tokenizer())


@pytest.fixture(scope="module")
def model():
    return text_model()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(model, path, file_type="f32", verify=False)
    return path


@pytest.fixture(scope="module")
def engine(path):
    with LlamaCppModel(path, threads=1, cache="f32") as engine:
        yield engine


def tokens(count, seed=0):
    return random.Random(seed).choices(range(300), k=count)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_are_ours_for_prompts_of_1_to_500_tokens(tmp_path, changes):
    model, path = text_model(**changes), tmp_path / "m.gguf"
    write_gguf(model, path, file_type="f32", verify=False)
    with LlamaCppModel(path, threads=1, cache="f32") as engine:
        for length in LENGTHS:
            prompt, response = tokens(length), tokens(4, seed=1)
            expected = reference_logits(model.model, [(prompt, response)])
            found = Distance.between(expected, engine.logits(prompt, response))
            assert found.argmax_agreement == 1 and found.kl < 1e-8, length
            assert found.max_difference < 2e-5, length


def test_without_the_switch_logits_are_the_causal_ones(model, engine):
    prompt = tokens(40)
    causal = text_model(prefix_lm=False).model
    expected = reference_logits(causal, [(prompt, [])])
    assert torch.allclose(engine.logits(prompt, prefix=False), expected, atol=2e-5)
    assert float((engine.logits(prompt) - expected).abs().max()) > 0.1


def test_a_causal_model_runs_causally(tmp_path):
    model, path = text_model(prefix_lm=False), tmp_path / "m.gguf"
    write_gguf(model, path, file_type="f32")
    with LlamaCppModel(path, threads=1, cache="f32") as engine:
        prompt = tokens(20)
        expected = reference_logits(model.model, [(prompt, [])])
        assert torch.allclose(engine.logits(prompt), expected, atol=2e-5)


def test_calls_leave_nothing_behind(engine):
    prompt, response = tokens(30), tokens(3, seed=1)
    first = engine.logits(prompt, response)
    engine.logits(tokens(300, seed=5))
    engine.generate("what is the word", max_new_tokens=5)
    assert torch.equal(engine.logits(prompt, response), first)


PROMPTS = ["what is the word", "add 7", "sort the list of numbers 4 1 3", "x <|im_end|> y"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"condition": "synth,cot"},
        {"condition": ["cot", "direct", "", "noisy"]},
        {"temperature": 0.8, "num_samples": 3, "seed": 5},
        {"temperature": 1.2, "top_k": 20, "top_p": 0.9},
        {"stop_tokens": list(range(0, 300, 7))},
    ],
    ids=str,
)
def test_answers_are_those_of_the_native_engine(model, engine, options):
    options = {"max_new_tokens": 12, **options}
    assert engine.generate(PROMPTS, **options) == model.generate(PROMPTS, **options)


def test_tokens_reasons_and_logprobs_are_those_of_the_native_engine(model, engine):
    # The token that comes third ends the answer.
    ids = [answer.tokens for answer in model.generate_tokens(PROMPTS)]
    stop = [ids[0][2]]
    expected = model.generate_tokens(PROMPTS, stop_tokens=stop)
    seen = []
    found = engine.generate_tokens(
        PROMPTS, stop_tokens=stop, progress=lambda done, all_: seen.append((done, all_))
    )
    assert found[0].finish_reason == "stop" and found[0].tokens[-1] == stop[0]
    assert seen == [(i, len(PROMPTS)) for i in range(1, len(PROMPTS) + 1)]
    for a, b in zip(expected, found, strict=True):
        assert (a.text, a.tokens, a.finish_reason) == (b.text, b.tokens, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.num_prompt_tokens == b.num_prompt_tokens


def test_an_answer_ends_at_the_context(engine):
    prompt = "add " * 250
    answer = engine.generate_tokens(prompt, stop_tokens=[])[0]
    assert answer.num_prompt_tokens + len(answer.tokens) == engine.config.max_seq_len
    assert answer.finish_reason == "length"


def test_wrong_requests_are_refused(engine, path):
    with pytest.raises(DataError, match=r"prompt 1 has .* takes at most 511"):
        engine.generate(["add", "add " * 600])
    with pytest.raises(DataError, match="513 tokens, but max_seq_len is 512"):
        engine.logits(tokens(513))
    with pytest.raises(DataError, match="no token"):
        engine.logits([])
    with pytest.raises(DataError, match="unknown condition 'dirct'"):
        engine.generate("add", condition="dirct")
    with pytest.raises(ConfigError, match="guidance"):
        engine.generate("add", guidance=0.1)
    with pytest.raises(ConfigError, match="unknown key 'beams'"):
        engine.generate("add", beams=2)
    with pytest.raises(ConfigError, match="cache is 'q8'"):
        LlamaCppModel(path, cache="q8")
    assert engine.generate([]) == []


def test_a_closed_model_says_so(path):
    engine = LlamaCppModel(path)
    engine.close()
    with pytest.raises(BackendError, match="was closed"):
        engine.generate("add")


def test_a_damaged_file_is_refused_before_llama_cpp_sees_it(path, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut short"):
        LlamaCppModel(bad)


def test_llama_cpps_own_tokenizer_gives_our_ids(engine):
    generator = random.Random(0)
    letters = "aeiou bcdß éñ\u0301 0123 '\"-_.,:;!?()[]{}<>|\n\t\r 日本語한국 🙂 Ωж"
    texts = ["".join(generator.choices(letters, k=60)) for _ in range(200)]
    texts += [*PROMPTS, "don't I'LL we've 12345 x²", "<|im_start|>", "a\u00a0b\u2003c  \n \n"]
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    for text, ids in zip(texts, tokenizer().encode_texts(texts), strict=True):
        assert engine.tokenise(text) == ids, text


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_file_type_passes_its_check(tmp_path, file_type):
    wide = {"hidden_size": 256, "num_heads": 4, "head_dim": 64, "intermediate_size": 512}
    model, path = text_model(**wide), tmp_path / "m.gguf"
    report = write_gguf(model, path, file_type=file_type)
    found = report.comparison
    assert path.stat().st_size == report.size_bytes and found.num_positions > 10
    assert found.against_file.relative < 0.05
    if file_type == "f32":
        assert found.against_source == found.against_file
        assert found.against_file.argmax_agreement == 1 and found.against_file.kl < 1e-8
    elif file_type.startswith("q4"):
        assert found.against_source.relative > 2 * found.against_file.relative


def test_the_number_format_is_what_llama_cpp_computes_with(tmp_path):
    """The check's reference reads the file: its error is far below that of rounding weights."""
    model, path = text_model(), tmp_path / "m.gguf"
    write_gguf(model, path, file_type="q4_0", verify=False)
    prompt = tokens(30)
    stored = reference_logits(open_gguf(path).load_model(dtype=torch.float32), [(prompt, [])])
    source = reference_logits(model.model, [(prompt, [])])
    with LlamaCppModel(path, cache="f32") as engine:
        found = engine.logits(prompt)
    near, far = Distance.between(stored, found), Distance.between(source, found)
    assert near.relative < 0.5 * far.relative


def another_scale(monkeypatch):
    shape_values = writer.shape_values
    monkeypatch.setattr(
        writer, "shape_values", lambda config: shape_values(config) | {"embedding_scale": 1.0}
    )


def swapped_stacks(monkeypatch):
    parts = writer._parts

    def swapped(source):
        found = dict(parts(source))
        for name in found:
            other = name.replace("blk.0", "blk.X").replace("blk.2", "blk.0").replace("X", "2")
            yield name, found[other]

    monkeypatch.setattr(writer, "_parts", swapped)


def causal_check(monkeypatch):
    """llama.cpp runs as its own programs run it."""
    logits = LlamaCppModel.logits
    monkeypatch.setattr(
        LlamaCppModel, "logits", lambda self, p, r=(): logits(self, p, r, prefix=False)
    )


def other_ids(monkeypatch):
    monkeypatch.setattr(LlamaCppModel, "tokenise", lambda self, text: [1, 2, 3])


@pytest.mark.parametrize(
    ("mistake", "file_type", "message"),
    [
        (another_scale, "f32", "header does not state the model's shape"),
        (another_scale, "q8_0", "header does not state the model's shape"),
        (swapped_stacks, "f32", "read back is not what was written"),
        (swapped_stacks, "bf16", "read back is not what was written"),
        (swapped_stacks, "q2_k", "read back is not what was written"),
        (causal_check, "f32", "not ours under the prefix mask"),
        (causal_check, "bf16", "not ours under the prefix mask"),
        (causal_check, "q4_0", "nearer to those of a causal mask"),
        (other_ids, "f32", "other tokens than this tokenizer"),
    ],
)
def test_a_file_that_fails_its_check_is_not_kept(
    model, tmp_path, monkeypatch, mistake, file_type, message
):
    mistake(monkeypatch)
    with pytest.raises(CheckpointError, match=message):
        write_gguf(model, tmp_path / "m.gguf", file_type=file_type)
    assert not list(tmp_path.iterdir())


def test_not_a_number_is_over_every_budget(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        gguf_verify,
        "reference_logits",
        lambda *given, **options: reference_logits(*given, **options) * float("nan"),
    )
    with pytest.raises(CheckpointError, match="differ by nan"):
        write_gguf(model, tmp_path / "m.gguf", file_type="bf16")


def test_another_layout_of_llama_cpps_structures_is_refused():
    lib = llama_cpp_library.library()
    params = lib.llama_context_default_params()
    llama_cpp_library.check_layout(params, llama_cpp_library._CONTEXT_DEFAULTS)
    # The same bytes, moved by one field: what a build with a new field would give.
    shifted = type(params).from_buffer_copy(bytes(4) + bytes(params)[:-4])
    with pytest.raises(BackendError, match=r"laid out differently.*tested is"):
        llama_cpp_library.check_layout(shifted, llama_cpp_library._CONTEXT_DEFAULTS)
    assert ctypes.sizeof(params) == len(bytes(params))


def test_without_the_package_the_extra_is_named(monkeypatch, path):
    llama_cpp_library.library.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(BackendError, match=r"hrm-text\[gguf\]"):
        LlamaCppModel(path)


@pytest.mark.parametrize("file_type", ["f32", "bf16", "q8_0", "q4_0"])
def test_the_self_test_finds_llama_cpp_right_and_its_own_mask_causal(tmp_path, file_type):
    model, path = text_model(), tmp_path / "m.gguf"
    write_gguf(model, path, file_type=file_type, verify=False)
    reference = load(path, "cpu", "fp32")
    with LlamaCppModel(path) as engine:
        right = check_logits(reference, LlamaCppPath(engine))
        causal = check_logits(reference, LlamaCppPath(engine, prefix=False))
    assert right.verdict == "right", right
    assert causal.mistake == "causal instead of prefix", causal


def test_the_self_test_finds_a_wrong_header(model, tmp_path, monkeypatch, capsys):
    another_scale(monkeypatch)
    path = tmp_path / "m.gguf"
    write_gguf(model, path, verify=False)
    with LlamaCppModel(path) as engine:
        found = check_logits(model, LlamaCppPath(engine))
    assert found.mistake.startswith("embedding scale 1 instead of")
    # The file itself says so: only a right reference can tell.
    assert main(["selftest", str(path)]) == 0
    assert "llama.cpp (bf16): right" in capsys.readouterr().out


def test_the_native_engine_reads_the_file_too(model, path):
    assert load(path, "cpu", "fp32").generate(PROMPTS, max_new_tokens=8) == model.generate(
        PROMPTS, max_new_tokens=8
    )


def test_the_command_line_answers_from_a_gguf_file(model, path, capsys):
    expected = model.generate(PROMPTS[:2], "cot", max_new_tokens=6)
    for options in ([], ["--engine", "llama.cpp"]):
        arguments = ["generate", str(path), *PROMPTS[:2], "--condition", "cot"]
        assert main([*arguments, "--max-new-tokens", "6", *options]) == 0
        assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "bf16", "--step", "eager"], "--dtype, --step cannot be used"),
        (["--device", "cuda"], "--device cannot be used"),
        (["--weights", "ema"], "--weights cannot be used"),
        (["--guidance", "0.1"], "guidance compares"),
    ],
)
def test_options_that_do_not_go_with_llama_cpp_are_refused(path, capsys, options, message):
    assert main(["generate", str(path), "add 7", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_is_no_gguf_file(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "add 7", "--engine", "llama.cpp"]) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_evaluation_runs_on_a_gguf_file_as_on_our_model(model, engine):
    rows = [
        HeldOutRow(stratum="a", condition="direct", instruction=text, response="4")
        for text in PROMPTS
    ]
    config = EvaluateConfig(max_new_tokens=6)
    expected, found = evaluate(model, rows, config), evaluate(engine, rows, config)
    assert found.predictions == expected.predictions
    with pytest.raises(ConfigError, match="depth is set in the GGUF file"):
        evaluate(engine, rows, EvaluateConfig(H_cycles=1))
