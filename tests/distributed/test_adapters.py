"""Two ranks over gloo train the adapters that one rank trains."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from hrmtext.artifacts import RunFolder, read_tensors
from hrmtext.artifacts.weights import save_model
from hrmtext.config import preset
from hrmtext.model import build_model
from hrmtext.runtime.io import atomic_folder

UNIT = Path(__file__).parents[1] / "unit" / "train"

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from memory_source import MemorySource, random_rows, small_config
from hrmtext.train import train_on

source = MemorySource(random_rows(15), rows_per_step=7, rows_per_bin=2)
config = small_config(init_from=sys.argv[3], lora={"rank": 2}, bp_first=5, validate_every=0)
train_on(config, source, run_folder=sys.argv[2], progress="none")
"""


def test_weights_of_adapters_agree_within_rounding(tmp_path):
    model = build_model(preset("test"), seed=0)
    with atomic_folder(tmp_path / "base") as folder:
        save_model(folder, model.config, model.state_dict())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for num_ranks in (1, 2):
        for rank in range(num_ranks):
            group = {"WORLD_SIZE": str(num_ranks), "RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
            command = [sys.executable, "-c", SCRIPT, str(UNIT), str(tmp_path / f"run{num_ranks}"),
                       str(tmp_path / "base")]  # fmt: skip
            processes.append(
                subprocess.Popen(
                    command, env={**os.environ, **group}, stderr=subprocess.PIPE, text=True
                )
            )
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    one, two = (RunFolder(tmp_path / f"run{n}").latest() for n in (1, 2))
    assert one.name == two.name
    for name in ("adapter_raw", "adapter_model"):
        a, b = (read_tensors(run / f"{name}.safetensors") for run in (one, two))
        assert a.keys() == b.keys()
        for key, tensor in a.items():
            torch.testing.assert_close(b[key], tensor, rtol=1e-3, atol=2e-5, msg=key)
