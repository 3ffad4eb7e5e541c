"""The script that measures a GPU's training step runs whole, on the CPU at a tiny size."""

import json
import sys
from pathlib import Path

import pytest
import torch

from hrmtext.runtime.device import cpu_has_bf16

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import train_gpu

    yield train_gpu
    for name in ("train_gpu", "train_step", "common"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("default")  # torch's profiler warns about its own inside
def test_it_reports_speed_roofline_memory_profile_and_the_peer(script, tmp_path, capsys):
    script.main(
        ["--device", "cpu", "--preset", "test", "--bin-tokens", "200", "--rounds", "2"], tmp_path
    )
    found = json.loads((tmp_path / "train_gpu-cpu.json").read_text())
    assert set(found["tokens_per_s"]) == {"ours", "transformers"}
    assert found["bins"] == 2 and found["input_tokens"] <= 400
    assert found["peak_memory_mib"]["ours"] > 0
    assert 0 < found["roofline"]["share"] < 1
    shares = found["profile"]["share"]
    assert set(shares) == {*script.KERNEL_KINDS, "elementwise and copies", "idle"}
    assert shares["matmul"] > 0 and shares["optimizer"] > 0
    # Two bins, packed or padded, are one loss: the mean over all supervised tokens. In bf16 ours
    # rounds the stream between blocks too, theirs (autocast) does not.
    rel = 4e-3 if cpu_has_bf16() else 1e-3
    assert found["first_loss"]["ours"] == pytest.approx(found["first_loss"]["transformers"], rel)
    assert "written to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NTN", "matmul"),
        ("void flash_bwd_dq_dk_dv_loop_kernel", "attention"),
        ("triton_poi_fused_add_atan2_copy_0", "optimizer"),
        ("triton_red_fused__to_copy_mean_mul_rsqrt_1", "elementwise and copies"),
    ],
)
def test_kernels_are_told_apart_by_name(script, kernel, kind):
    assert script.kind_of(kernel) == kind


def test_rows_fill_the_bin_and_no_more(script):
    from hrmtext.config.model import preset

    config = preset("micro")
    rows = script.mixture_rows(1_000, config, seed=0)
    used = sum(len(prompt) + len(response) - 1 for prompt, response in rows)
    assert 970 <= used <= 1_000
    assert all(len(p) >= 1 and len(r) >= 1 for p, r in rows)
    assert max(len(p) + len(r) - 1 for p, r in rows) <= config.max_seq_len
    assert torch.tensor([token for p, r in rows for token in p + r]).max() < config.vocab_size
