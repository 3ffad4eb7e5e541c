"""Writers of small files in the forms of public data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
from pyarrow import parquet


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def gsm8k_rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"question": f"What is {i}+{i}?", "answer": f"Add.\n#### {2 * i}"}
        for i in range(start, start + count)
    ]
