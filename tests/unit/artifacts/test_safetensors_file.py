"""Our reader and writer of safetensors files against the library's own."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hrmtext.artifacts.safetensors_file import (
    DTYPES,
    Entry,
    SafetensorsFile,
    plan_shards,
    write_safetensors,
)
from hrmtext.errors import CheckpointError


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    found = {
        f"{name}.{rows}": (torch.randn(rows, 3, generator=generator) * 5).to(dtype)
        for name, dtype in DTYPES.items()
        for rows in range(4)
    }
    return {**found, "scalar": torch.tensor(3.0), "ünïcode": torch.ones(2, dtype=torch.bfloat16)}


def entries_of(tensors):
    return {name: Entry(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_files_are_byte_for_byte_those_of_the_library(tmp_path, tensors, metadata):
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    asked = []

    def read(name):
        asked.append(name)
        return tensors[name]

    write_safetensors(tmp_path / "ours", entries_of(tensors), read, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sorted(asked) == sorted(tensors)


def test_reading_gives_what_the_library_reads(tmp_path, tensors):
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "file")
    assert file.metadata == {"format": "pt"}
    assert file.entries == entries_of(tensors)
    mapping = file.map()
    for name, expected in load_file(tmp_path / "file").items():
        assert torch.equal(file.read(name), expected)
        into = torch.empty_like(expected)
        assert file.read(name, into) is into
        assert torch.equal(into, expected)
        view = file.view(name, mapping)
        if view is not None:
            assert torch.equal(view, expected)


def test_a_mapping_shares_the_files_pages_and_never_changes_it(tmp_path):
    save_file({"a": torch.arange(6.0)}, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    file = SafetensorsFile(tmp_path / "file")
    view = file.view("a", file.map())
    (tmp_path / "file").rename(tmp_path / "elsewhere")
    view += 1
    assert view.tolist() == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_unaligned_tensors_are_read_but_not_mapped(tmp_path):
    save_file({"a": torch.ones(3, dtype=torch.uint8), "b": torch.arange(5.0)}, tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    # A space more in the header, as no rule forbids.
    shifted = (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    (tmp_path / "y").write_bytes(shifted)
    file = SafetensorsFile(tmp_path / "y")
    assert file.view("b", file.map()) is None
    assert file.read("b").tolist() == [0, 1, 2, 3, 4]


def damage(change):
    def apply(raw):
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"", "should have 0 bytes"),
        (lambda raw: raw[:5], "the file has 5"),
        (lambda raw: b"\xff" * 8 + raw[8:], "should have"),
        (lambda raw: raw[:8] + b"\xff" * 20 + raw[28:], "header is damaged"),
        (lambda raw: raw[:-1], "expected"),
        (lambda raw: raw + b"more", "expected"),
        (damage(lambda h: h["a"].update(dtype="F7")), "header is damaged: KeyError"),
        (damage(lambda h: h["a"].update(shape=[7])), "its shape says else"),
        (damage(lambda h: h["a"].update(data_offsets=[8, 32])), "leave a gap or overlap"),
        (damage(lambda h: h["a"].pop("shape")), "header is damaged"),
        (damage(lambda h: h.update(a=[1])), "header is damaged"),
    ],
)
def test_a_damaged_file_is_refused_when_it_is_opened(tmp_path, change, message):
    path = tmp_path / "file"
    save_file({"a": torch.arange(6.0), "b": torch.ones(2)}, path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match="not a whole safetensors file") as caught:
        SafetensorsFile(path)
    assert message in str(caught.value)


def test_a_file_cut_short_after_opening_is_found_by_reading(tmp_path):
    path = tmp_path / "file"
    save_file({"a": torch.arange(600.0)}, path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="ends 40 bytes too early"):
        file.read("a")


def test_shards_are_filled_in_order_and_a_large_tensor_has_its_own():
    entries = {
        name: Entry(torch.float32, (size,))
        for name, size in {"a": 10, "b": 10, "c": 100, "d": 5, "e": 5, "f": 10}.items()
    }
    assert plan_shards(entries, "abcdef", 80) == [["a", "b"], ["c"], ["d", "e", "f"]]
    assert plan_shards(entries, "abcdef", 10**6) == [list("abcdef")]
