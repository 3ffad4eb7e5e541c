"""Tokenising files against the bare `tokenizers` library, on the same text and cores.

    python benchmarks/data_tokenize.py --evals-wheel evals-3.0.1.post1-py3-none-any.whl
    python benchmarks/data_tokenize.py    # generated reasoning-gym text instead

The bare side is `encode_batch_fast` on texts that are in memory already, and its result is thrown
away. Ours reads and checks JSONL, builds prompts and responses, and writes a stratum to disk,
flushed and renamed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from common import interleave, ratios, summary, write_result
from tokenizers import Tokenizer

from hrmtext.data.tokenize import tokenize_files
from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer

LEFT_OUT = ("steganography", "schelling_point", "text_compression")
TEXTS_PER_BATCH = 2_000


def wheel_rows(wheel: Path, bytes_per_set: int) -> Iterator[tuple[str, str]]:
    """Prompt and ideal answer of the evals registry, at most so many bytes of each set."""
    taken: dict[str, int] = {}
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            name = info.filename
            if "registry/data/" not in name or not name.endswith(".jsonl"):
                continue
            which = name.split("/")[3]
            if any(word in which for word in LEFT_OUT):
                continue
            with archive.open(info) as stream:
                for line in stream:
                    if taken.get(which, 0) > bytes_per_set:
                        break
                    try:
                        row = json.loads(line)
                        asked, ideal = row["input"], row["ideal"]
                        if not isinstance(asked, str):
                            asked = "\n".join(message["content"] for message in asked)
                    except (ValueError, KeyError, TypeError):
                        continue
                    answer = ideal[0] if isinstance(ideal, list) and ideal else ideal
                    if isinstance(answer, str) and answer.strip() and isinstance(asked, str):
                        taken[which] = taken.get(which, 0) + len(line)
                        yield asked, answer


def generated_rows(count: int) -> Iterator[tuple[str, str]]:
    """Reasoning-gym questions and answers."""
    import reasoning_gym

    for family in ("gsm_symbolic", "syllogism", "word_sorting", "family_relationships"):
        for item in reasoning_gym.create_dataset(family, seed=0, size=count // 4):
            yield item["question"], str(item["answer"])


def main() -> None:
    """Compare, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evals-wheel", type=Path)
    parser.add_argument("--bytes-per-set", type=int, default=300_000)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.evals_wheel:
        rows = list(wheel_rows(args.evals_wheel, args.bytes_per_set))
    else:
        rows = list(generated_rows(40_000))
    texts = [text for row in rows for text in row]
    num_bytes = sum(len(text.encode()) for text in texts)
    cores = len(os.sched_getaffinity(0))
    tokenizer = PromptTokenizer(train_tokenizer(texts, args.vocab_size))
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "rows.jsonl"
        with source.open("w") as stream:
            for instruction, response in rows:
                row = {"instruction": instruction, "response": response}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        tokenizer.save(work)
        bare_tokenizer = Tokenizer.from_file(f"{work}/tokenizer.json")
        runs = 0

        def bare() -> None:
            for at in range(0, len(texts), TEXTS_PER_BATCH):
                bare_tokenizer.encode_batch_fast(
                    texts[at : at + TEXTS_PER_BATCH], add_special_tokens=False
                )

        def ours() -> None:
            nonlocal runs
            runs += 1
            tokenize_files(source, Path(work) / f"out{runs}", tokenizer, num_workers=cores)

        sides = {"bare": bare, "ours": ours}
        seconds = interleave(sides, rounds=args.rounds, device=torch.device("cpu"))
        tokens = tokenize_files(source, Path(work) / "out1", tokenizer).num_tokens
    share = summary(ratios(seconds, "bare", "ours"), 3)
    values = {
        "text": args.evals_wheel.name if args.evals_wheel else "reasoning-gym",
        "rows": len(rows),
        "bytes": num_bytes,
        "tokens": tokens,
        "vocab_size": args.vocab_size,
        "cores": cores,
        "seconds": {name: summary(times, 3) for name, times in seconds.items()},
        "tokens_per_s": {n: round(tokens / summary(t, 4)["median"]) for n, t in seconds.items()},
        "ours_as_share_of_bare": share,
    }
    write_result("data_tokenize", torch.device("cpu"), values)


if __name__ == "__main__":
    main()
