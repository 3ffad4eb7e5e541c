"""Two ranks over gloo train the adapters that one rank trains."""

import torch
from data_parallel_ranks import train_adapters
from processes import ended, said, start_ranks

from hrmtext.artifacts import RunFolder, read_tensors
from hrmtext.artifacts.weights import save_model
from hrmtext.config import preset
from hrmtext.model import build_model
from hrmtext.runtime.io import atomic_folder


def test_weights_of_adapters_agree_within_rounding(tmp_path):
    model = build_model(preset("test"), seed=0)
    with atomic_folder(tmp_path / "base") as folder:
        save_model(folder, model.config, model.state_dict())
    ranks = []
    for count in (1, 2):
        place = (str(tmp_path / f"run{count}"), str(tmp_path / "base"))
        ranks += start_ranks(count, train_adapters, *place, log=tmp_path / f"log{count}")
    assert ended(ranks) == [0, 0, 0], [said(tmp_path / f"log{count}") for count in (1, 2)]
    one, two = (RunFolder(tmp_path / f"run{n}").latest() for n in (1, 2))
    assert one.name == two.name
    for name in ("adapter_raw", "adapter_model"):
        a, b = (read_tensors(run / f"{name}.safetensors") for run in (one, two))
        assert a.keys() == b.keys()
        for key, tensor in a.items():
            torch.testing.assert_close(b[key], tensor, rtol=1e-3, atol=2e-5, msg=key)
