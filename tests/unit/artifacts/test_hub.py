"""Hub ids: resolved only where no folder has that name, and a clear error without a network."""

import huggingface_hub
import pytest

import hrmtext
from hrmtext.artifacts.hub import local_path
from hrmtext.errors import CheckpointError


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Records what would be fetched, and finds it in a folder."""
    calls = []

    def snapshot(repo_id, revision=None, allow_patterns=None):
        calls.append((repo_id, revision, tuple(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return calls


def test_an_id_is_fetched_without_files_that_could_run_code(asked, tmp_path):
    assert local_path("sapientinc/HRM-Text-1B") == tmp_path
    assert local_path("sapientinc/HRM-Text-1B@v1.0") == tmp_path
    (first, none, patterns), (second, revision, _) = asked
    assert (first, none, second, revision) == (
        "sapientinc/HRM-Text-1B", None, "sapientinc/HRM-Text-1B", "v1.0",
    )  # fmt: skip
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in patterns)


def test_paths_are_never_taken_for_ids(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/mine", "runs", "model", "./a/b", "/a/b", "a/b/c", "../a/b", str(tmp_path)):
        assert str(local_path(path)) == str(type(tmp_path)(path))
    assert asked == []


def test_without_a_network_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no folder here, and it could not be fetched"):
        hrmtext.load("nobody-here/no-such-model")
