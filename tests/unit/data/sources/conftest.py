"""Small copies of public data sets in the layouts in which the Hub holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import gsm8k_rows, write_parquet


@pytest.fixture
def gsm8k_folder(tmp_path) -> Path:
    """openai/gsm8k: configs main and socratic, splits train and test."""
    root = tmp_path / "gsm8k"
    write_parquet(root / "main" / "train-00000-of-00001.parquet", gsm8k_rows(4))
    write_parquet(root / "main" / "test-00000-of-00001.parquet", gsm8k_rows(2, start=50))
    write_parquet(root / "socratic" / "train-00000-of-00001.parquet", gsm8k_rows(3, start=90))
    (root / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n"
            f"  - split: train\n    path: {name}/train-*\n"
            + ("  - split: test\n    path: main/test-*\n" if name == "main" else "")
            for name in ("main", "socratic")
        )
        + "---\n"
    )
    return root
