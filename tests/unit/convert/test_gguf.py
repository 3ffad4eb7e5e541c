"""GGUF files: what is written is what is read, and nothing unsound is read."""

import json
import struct

import numpy as np
import pytest
import torch
from convert_helpers import tiny
from tokenizers import Regex, Tokenizer, pre_tokenizers

from hrmtext.artifacts.gguf_file import GgufFile, open_gguf
from hrmtext.convert.gguf import write_gguf
from hrmtext.convert.gguf_types import FILE_TYPES, kind_of
from hrmtext.convert.gguf_verify import header_numbers
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.errors import BackendError, CheckpointError, ConfigError, DataError, StorageError
from hrmtext.generate import gguf_tokenizer
from hrmtext.generate.gguf_tokenizer import JSON_KEY, tokenizer_of

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")

WIDE = {"hidden_size": 256, "num_heads": 4, "head_dim": 64, "intermediate_size": 512}
TEXTS = [
    "What is 12 + 30?",
    "don't WE'LL I'VE",
    "  two  spaces\tand tabs \n\n lines \r\n",
    "naïve „Zähle“ 日本語 한국어 🙂 e\u0301",
    "typed <|im_end|> and <think> stay text",
]


def written(folder, file_type="f32", **changes):
    """A model and its file, not run in llama.cpp."""
    model = tiny(**changes)
    path = folder / f"model-{file_type}.gguf"
    write_gguf(model, path, file_type=file_type, verify=False)
    return model, path


def state_of(model):
    return model.model.state_dict()


@pytest.mark.parametrize("file_type", ["f32", "f16", "bf16"])
def test_plain_formats_are_read_back_without_loss(tmp_path, file_type):
    model, path = written(tmp_path, file_type)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[file_type]
    stored = open_gguf(path)
    assert stored.names() == list(state_of(model))
    for name, tensor in state_of(model).items():
        expected = tensor if name == "model.z_L_init" else tensor.to(dtype)
        found = stored.tensor(name)
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    assert stored.load_model(dtype=dtype).lm_head.weight.dtype == dtype


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"H_cycles": 3, "L_cycles": 1, "num_layers_per_stack": 3},
        {"embedding_scale": 7.3, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "prefix_lm": False},
        {"num_heads": 3, "head_dim": 8, "max_seq_len": 77},
    ],
)
def test_the_shape_is_read_back_as_it_was(tmp_path, changes):
    model, path = written(tmp_path, **changes)
    assert open_gguf(path).config.canonical() == model.config.canonical()
    assert header_numbers(open_gguf(path).config) == header_numbers(model.config)


def test_the_file_is_what_llama_cpps_own_reader_expects(tmp_path):
    model, path = written(tmp_path, "bf16")
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layers = model.config.num_layers_per_stack
    blocks = {f"blk.{i}.attn_q.weight" for i in range(2 * layers)}
    assert blocks <= set(tensors) and f"blk.{2 * layers}.attn_q.weight" not in tensors
    # The L stack comes first; queries are the second of the four parts.
    fused = state_of(model)["model.L_module.layers.1.attn.gqkv_proj.weight"].bfloat16()
    raw = torch.from_numpy(np.array(tensors["blk.1.attn_q.weight"].data).view(np.uint8))
    assert torch.equal(raw.flatten().view(torch.bfloat16), fused.chunk(4)[1].flatten())
    assert reader.get_field("general.architecture").contents() == "hrm_text"
    assert reader.get_field("hrm_text.block_count").contents() == model.config.num_slots
    assert reader.get_field("hrm_text.hrm.prefix_lm").contents() is True


@pytest.mark.parametrize("file_type", [name for name in FILE_TYPES if name.startswith("q")])
def test_quantised_files_are_close_and_finer_formats_closer(tmp_path, file_type):
    pytest.importorskip("xllamacpp", reason="the extra `gguf` is not installed")
    model, path = written(tmp_path, file_type, **WIDE)
    name = "model.H_module.layers.0.mlp.gate_up_proj.weight"
    stored = open_gguf(path)
    assert FILE_TYPES[file_type].base in GgufFile(path).kinds
    error = stored.tensor(name) - state_of(model)[name]
    relative = float(error.norm() / state_of(model)[name].norm())
    bits = {"2": 0.5, "3": 0.25, "4": 0.12, "5": 0.06, "6": 0.03, "8": 0.01}
    assert 0 < relative < bits[file_type[1]]


def test_q8_0_by_ggml_is_q8_0_by_the_gguf_package(tmp_path):
    pytest.importorskip("xllamacpp", reason="the extra `gguf` is not installed")
    model, path = written(tmp_path, "q8_0")
    weight = state_of(model)["lm_head.weight"].numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert np.array_equal(open_gguf(path).tensor("lm_head.weight").numpy(), expected)


def test_mixtures_are_finer_where_it_matters_and_fall_back_by_row_length():
    wide = (256, 256)
    kinds = [kind_of(f"blk.{i}.attn_v.weight", wide, "q4_k_m", 16) for i in range(16)]
    assert kinds.count("q6_k") == 8 and kinds[0] == kinds[1] == kinds[14] == kinds[15] == "q6_k"
    assert kind_of("blk.0.attn_q.weight", wide, "q4_k_m", 16) == "q4_k"
    assert kind_of("output.weight", wide, "q4_k_m", 16) == "q6_k"
    assert kind_of("blk.0.attn_q.weight", (64, 96), "q4_k_m", 16) == "q5_0"
    assert kind_of("blk.0.attn_q.weight", (64, 40), "q4_k_m", 16) == "f16"
    assert kind_of("hrm.z_l_init", (256,), "q4_k_m", 16) == "f32"


def test_parts_of_several_formats_are_read_as_fp32(tmp_path):
    model, path = written(tmp_path, "f32")
    data = path.read_bytes()
    half = tmp_path / "mixed.gguf"
    # The gate becomes f16: half its bytes, the rest of its place unused.
    place = GgufFile(path).places["blk.0.attn_gate.weight"]
    gate = state_of(model)["model.L_module.layers.0.attn.gqkv_proj.weight"].chunk(4)[0].half()
    raw = gate.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    data = data[: place.offset] + raw + data[place.offset + len(raw) :]
    key = b"blk.0.attn_gate.weight"
    kind = data.index(key) + len(key) + 4 + 16
    half.write_bytes(data[:kind] + struct.pack("<I", 1) + data[kind + 4 :])
    read = open_gguf(half).tensor("model.L_module.layers.0.attn.gqkv_proj.weight").chunk(4)
    expected = state_of(model)["model.L_module.layers.0.attn.gqkv_proj.weight"].chunk(4)
    assert read[0].dtype == torch.float32 and torch.equal(read[0], gate.float())
    assert all(torch.equal(a, b) for a, b in zip(read[1:], expected[1:], strict=True))


def test_the_tokenizer_comes_back_the_same(tmp_path):
    model, path = written(tmp_path)
    found = tokenizer_of(GgufFile(path).values, str(path))
    assert found.fingerprint == model.tokenizer.fingerprint


def test_a_tokenizer_is_rebuilt_from_tokens_and_merges_alone(tmp_path):
    model, path = written(tmp_path)
    values = dict(GgufFile(path).values)
    del values[JSON_KEY]
    found = tokenizer_of(values, str(path))
    assert found.vocab_size == model.tokenizer.vocab_size
    assert found.encode_texts(TEXTS) == model.tokenizer.encode_texts(TEXTS)
    prompts = found.encode_prompts(TEXTS, "synth,cot")
    assert prompts == model.tokenizer.encode_prompts(TEXTS, "synth,cot")
    assert found.decode_batch(prompts) == model.tokenizer.decode_batch(prompts)


def test_llama_cpps_form_names_control_and_unused_tokens(tmp_path):
    model, path = written(tmp_path)
    values = GgufFile(path).values
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == model.config.vocab_size
    assert types[model.tokenizer.eos_id] == gguf_tokenizer.CONTROL
    assert types[-1] == gguf_tokenizer.UNUSED and types[100] == gguf_tokenizer.NORMAL
    assert values["tokenizer.ggml.eos_token_id"] == model.tokenizer.eos_id == 11
    assert "<|im_end|>" in values["tokenizer.chat_template"]


def changed_tokenizer(change):
    fields = json.loads(tiny().tokenizer.tokenizer.to_str())
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    change(tokenizer)
    return PromptTokenizer(tokenizer)


def by_threes(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def with_prefix_space(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize("change", [by_threes, with_prefix_space])
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(tmp_path, change):
    model = tiny()
    with pytest.raises(DataError, match=r"cannot be written for llama.cpp.*no name for"):
        write_gguf(model, tmp_path / "m.gguf", tokenizer=changed_tokenizer(change), verify=False)
    assert not list(tmp_path.iterdir())


def test_wrong_requests_are_refused_before_anything_is_written(tmp_path):
    model, path = written(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="perhaps you meant 'q4_k_m'"):
        write_gguf(model, tmp_path / "b.gguf", file_type="q4_km")
    with pytest.raises(StorageError, match="exists already"):
        write_gguf(model, path)
    with pytest.raises(DataError, match="needs a tokenizer"):
        write_gguf(open_gguf(path), tmp_path / "b.gguf")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def other_architecture(data):
    return data.replace(b"hrm_text", b"llama_42")


def without_a_number(data):
    return data.replace(b"hrm_text.feed_forward_length", b"hrm_text.feed_forward_lengtX")


def another_width(data):
    key = b"hrm_text.feed_forward_length"
    at = data.index(key) + len(key) + 4
    return data[:at] + struct.pack("<I", 96) + data[at + 4 :]


def another_slot_count(data):
    key = b"hrm_text.block_count"
    at = data.index(key) + len(key) + 4
    return data[:at] + struct.pack("<I", 2) + data[at + 4 :]


def renamed_tensor(data):
    return data.replace(b"blk.1.ffn_up.weight", b"blk.9.ffn_up.weight")


def unknown_format(data):
    key = b"hrm.z_l_init"
    at = data.index(key) + len(key) + 4 + 8
    return data[:at] + struct.pack("<I", 99) + data[at + 4 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_architecture, "architecture 'llama_42', expected 'hrm_text'"),
        (without_a_number, "lacks hrm_text.feed_forward_length"),
        (another_width, "ffn_gate.weight has shape .* header says"),
        (another_slot_count, "block_count is 2, expected 16"),
        (renamed_tensor, "missing blk.1.ffn_up.weight; unexpected blk.9.ffn_up.weight"),
        (unknown_format, "hrm.z_l_init has ggml's number format 99"),
        (lambda data: data[:-40], "cut short: .* the file has"),
        (lambda data: data[:3_000], "damaged or cut short"),
        (lambda data: data[:20], "damaged or cut short"),
        (lambda data: b"PK\x03\x04" + data[4:], "no GGUF file"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "version 9"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "damaged or cut short"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_unsound_file_is_refused_with_the_reason(tmp_path, damage, message):
    _, path = written(tmp_path)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        open_gguf(bad)


def test_a_missing_file_and_a_missing_tokenizer_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="here: the file holds no tokenizer"):
        tokenizer_of({}, "here")
    values = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"]}
    with pytest.raises(CheckpointError, match="is 'llama' with the split pattern None"):
        tokenizer_of({**values, "tokenizer.ggml.merges": []}, "here")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(BackendError, match=r"hrm-text\[gguf\]"):
        write_gguf(tiny(), tmp_path / "m.gguf", file_type="f32", verify=False)
    assert not list(tmp_path.iterdir())
