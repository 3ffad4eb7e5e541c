"""Files and folders are whole or absent, and a folder that is not whole is never read."""

import errno
import json

import pytest

from hrmtext.errors import CheckpointError, StorageError
from hrmtext.runtime.io import (
    MARKER,
    atomic_file,
    atomic_folder,
    explain_storage_errors,
    fingerprint,
    is_complete,
    require_complete,
    write_json,
)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises(ZeroDivisionError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == {"file.json"}


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "part").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == set()


def test_an_existing_folder_is_not_overwritten_in_silence(tmp_path):
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(StorageError, match="exists already"), atomic_folder(tmp_path / "out"):
        pass
    with atomic_folder(tmp_path / "out", replace=True) as temporary:
        (temporary / "b").write_text("2")
    assert names(tmp_path / "out") == {"b", MARKER}


def test_a_folder_without_its_marker_does_not_count(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="not written to its end"):
        require_complete(tmp_path / "out")


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_folder_with_a_damaged_file_does_not_count(tmp_path, damage):
    with atomic_folder(tmp_path / "out", step=7) as temporary:
        (temporary / "weights").write_bytes(b"12345")
    assert require_complete(tmp_path / "out")["step"] == 7
    if damage == "truncate":
        (tmp_path / "out" / "weights").write_bytes(b"123")
    else:
        (tmp_path / "out" / "weights").unlink()
    with pytest.raises(CheckpointError, match="expected 5 bytes as written"):
        require_complete(tmp_path / "out")
    assert not is_complete(tmp_path / "out")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("write failed: No space left on device"),
        RuntimeError("I/O error: (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_plain_words(tmp_path, error):
    with (
        pytest.raises(StorageError, match="the disk is full"),
        explain_storage_errors(tmp_path / "x"),
    ):
        raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
        (RuntimeError("I/O error: File too large (os error 27)"), "may not grow that large"),
        (RuntimeError("I/O error: (os error 13)"), "could not write .*: Permission denied"),
    ],
)
def test_quotas_limits_and_permissions_are_named_also_where_a_library_wraps_them(error, said):
    with pytest.raises(StorageError, match=said), explain_storage_errors("x"):
        raise error


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), explain_storage_errors(tmp_path):
        raise RuntimeError("shape mismatch")


def test_a_fingerprint_depends_on_every_part_and_its_place(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"abc")
    prints = {
        fingerprint("a", "bc"), fingerprint("ab", "c"), fingerprint({"a": 1}), fingerprint(file),
        fingerprint("a", "bc", None),
    }  # fmt: skip
    assert len(prints) == 5
    assert fingerprint(file) == fingerprint(b"abc")
