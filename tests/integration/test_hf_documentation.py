"""The Python of docs/huggingface.md runs as it stands, on an exported model."""

import re
from pathlib import Path

import pytest
from hf_tiny_run import next_rows, write_jsonl

DOCUMENT = Path(__file__).parents[2] / "docs" / "huggingface.md"


@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
# The page leaves pinned memory to transformers; without a GPU there is nothing to pin for.
@pytest.mark.filterwarnings("default:'pin_memory':UserWarning")
def test_every_block_of_the_page_runs_in_its_order(exported, tmp_path, monkeypatch):
    for package in ("datasets", "peft", "trl"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "hf").symlink_to(exported)
    write_jsonl(tmp_path / "train.jsonl", next_rows()[0])
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert len(blocks) == 6
    names = {}
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    assert len(names["answers"]) == 2 and isinstance(names["found"][0][0]["generated_text"], str)
    assert (tmp_path / "runs" / "tuned" / "final" / "model.safetensors").is_file()
    assert names["adapted"].get_nb_trainable_parameters()[0] > 0
    assert len(names["sft"].train_dataset) == len(names["rows"])
