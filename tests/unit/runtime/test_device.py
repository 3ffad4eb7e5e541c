"""A device asked for by name is used, or refused with the reason and what to do."""

import os
import subprocess
import sys

import pytest
import torch

from hrmtext.errors import BackendError, RankError
from hrmtext.runtime import device as devices
from hrmtext.runtime.device import (
    KEPT_KERNELS,
    communication_backend,
    cpu_has_bf16,
    device_of_rank,
    keep_few_kernels,
    pick_device,
)
from hrmtext.train.parallel import process_group


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize(
    ("cuda", "visible", "message"),
    [
        (None, None, "is a build without CUDA .install a CUDA build of torch"),
        ("12.8", "", "CUDA_VISIBLE_DEVICES hides every GPU .unset it"),
        ("12.8", None, "built for CUDA 12.8, sees no GPU .*nvidia-smi"),
    ],
)
def test_a_missing_gpu_is_explained(no_gpu, monkeypatch, cuda, visible, message):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(BackendError, match=f"device 'cuda' was asked for, but .*{message}"):
        pick_device("cuda")
    assert pick_device().type == "cpu"


def test_a_gpu_number_beyond_the_last_and_an_unknown_device_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1").index == 1
    with pytest.raises(BackendError, match="'cuda:2' was asked for, but torch sees 2 CUDA"):
        pick_device("cuda:2")
    with pytest.raises(BackendError, match="unknown device 'tpu9'"):
        pick_device("tpu9")


def test_more_ranks_than_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of_rank(1) == torch.device("cuda", 1)
    with pytest.raises(BackendError, match=r"rank 2 of this node has no GPU: torch sees 2.*"
                       "--nproc-per-node 2"):  # fmt: skip
        device_of_rank(2)


def test_a_torch_without_nccl_or_gloo_is_refused(monkeypatch):
    monkeypatch.setattr(devices.torch_dist, "is_nccl_available", lambda: False)
    with pytest.raises(BackendError, match="several ranks on cuda need nccl"):
        communication_backend(torch.device("cuda"))
    assert communication_backend(torch.device("cpu")) == "gloo"


def test_ranks_that_cannot_meet_say_who_where_and_how(monkeypatch):
    place = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    group = process_group(torch.device("cpu"), timeout_s=0.2)
    text = r"rank 1 of 2 could not join .* 127.0.0.1:1 over gloo"
    with pytest.raises(RankError, match=text), group:
        pass
    monkeypatch.delenv("MASTER_ADDR")
    group = process_group(torch.device("cpu"), timeout_s=0.2)
    with pytest.raises(RankError, match=r"no MASTER_ADDR.*torchrun"), group:
        pass


def test_training_keeps_few_kernels_unless_the_environment_says_how_many(monkeypatch):
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    keep_few_kernels()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    assert os.environ["LRU_CACHE_CAPACITY"] == str(KEPT_KERNELS)


@pytest.mark.skipif(not cpu_has_bf16(), reason="this processor has no bf16 instructions")
def test_few_kept_kernels_take_less_memory():
    script = (
        "import sys, torch; from hrmtext.runtime.device import keep_few_kernels;"
        "sys.argv[1] == 'few' and keep_few_kernels();"
        "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096;"
        "weight = torch.ones(256, 256, dtype=torch.bfloat16); before = rss();"
        "[torch.ones(rows, 256, dtype=torch.bfloat16) @ weight for rows in range(16, 216)];"
        "print(rss() - before)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
    grown = {}
    for name in ("few", "all"):
        command = [sys.executable, "-c", script, name]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
        grown[name] = int(done.stdout)
    assert grown["few"] < 0.5 * grown["all"]
