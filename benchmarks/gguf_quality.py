"""What number formats cost: a trained run as GGUF files in llama.cpp, against our fp32 model.

For each file type: the file's check, argmax agreement and divergence over the expected answers of
the held-out rows, exact match of greedy answers, and which answers changed. For f32 also the logits
for prompts of 1 to 500 tokens (the context is raised for that: rotary embedding has no length).

    python benchmarks/gguf_quality.py RUN HELD_OUT_FOLDER [--types f32 bf16 q8_0 q4_k_m q4_0]
                                      [--limit ROWS_A_FAMILY] [--name gguf_quality]
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from common import write_result

from hrmtext.config.evaluate import EvaluateConfig
from hrmtext.convert.gguf import write_gguf
from hrmtext.data.example import HeldOutRow
from hrmtext.data.heldout import read_held_out
from hrmtext.evaluate import evaluate
from hrmtext.generate import TextModel, load
from hrmtext.generate.llama_cpp import LlamaCppModel
from hrmtext.generate.reference import Distance, Row, reference_logits

LENGTHS = (1, 2, 3, 5, 10, 20, 50, 100, 150, 200, 255, 256, 257, 300, 400, 500)
LONG_CONTEXT = 512


def teacher_rows(model: TextModel, rows: list[HeldOutRow]) -> list[Row]:
    """Prompt and expected answer of every row that fits, the answer's last token not read."""
    prompts = model.tokenizer.encode_prompts(
        [row.instruction for row in rows], [row.condition for row in rows]
    )
    answers = model.tokenizer.encode_texts([row.response for row in rows])
    pairs = zip(prompts, answers, strict=True)
    return [(p, a) for p, a in pairs if len(p) + len(a) <= model.config.max_seq_len]


def prompt_lengths(model: TextModel, folder: Path) -> dict[str, object]:
    """f32 logits of llama.cpp against ours for prompts of 1 to 500 tokens of held-out text."""
    config = model.config.with_changes(max_seq_len=LONG_CONTEXT)
    model.model.config = model.model.model.config = config
    path = folder / "long.gguf"
    write_gguf(model, path, file_type="f32")
    rng = random.Random(0)
    found = {}
    with LlamaCppModel(path, cache="f32") as engine:
        for length in LENGTHS:
            tokens = [rng.randrange(31, model.tokenizer.vocab_size) for _ in range(length)]
            row = (tokens, [40, 41, 42])
            expected = reference_logits(model.model, [row])
            found[length] = dataclasses.asdict(Distance.between(expected, engine.logits(*row)))
    return {
        "lengths": list(LENGTHS),
        "argmax_agreement": min(one["argmax_agreement"] for one in found.values()),
        "max_kl": max(one["kl"] for one in found.values()),
        "max_difference": max(one["max_difference"] for one in found.values()),
    }


def file_type_result(
    model: TextModel, kind: str, rows: list[HeldOutRow], limit: int | None, folder: Path, base
) -> dict[str, object]:
    """One file type against our fp32 model."""
    path = folder / f"{kind}.gguf"
    report = write_gguf(model, path, file_type=kind)
    teacher = teacher_rows(model, rows if limit is None else limited(rows, limit))
    with LlamaCppModel(path) as engine:
        expected = reference_logits(model.model, teacher)
        logits = torch.cat([engine.logits(*row) for row in teacher])
        scored = evaluate(engine, rows, EvaluateConfig(limit=limit))  # type: ignore[arg-type]
    pairs = list(zip(base.predictions, scored.predictions, strict=True))
    assert report.comparison is not None
    return {
        "file_bytes": report.size_bytes,
        "number_formats": report.kinds,
        "check": dataclasses.asdict(report.comparison),
        "expected_answers": {
            "positions": len(logits),
            **dataclasses.asdict(Distance.between(expected, logits)),
        },
        "exact_match": scored.mean["exact_match"],
        "exact_match_change": scored.mean["exact_match"] - base.mean["exact_match"],
        "rows": len(pairs),
        "answers_changed": sum(a.answer != b.answer for a, b in pairs),
        "right_to_wrong": sum(a.right and not b.right for a, b in pairs),
        "wrong_to_right": sum(b.right and not a.right for a, b in pairs),
    }


def causal_result(
    model: TextModel, rows: list[HeldOutRow], limit: int | None, folder: Path, base
) -> dict[str, object]:
    """The f32 file as llama.cpp's own programs run it: the prompt causal, too."""
    path = folder / "causal.gguf"
    write_gguf(model, path, file_type="f32")
    teacher = teacher_rows(model, rows if limit is None else limited(rows, limit))
    with LlamaCppModel(path, cache="f32") as engine:
        engine.config = engine.config.with_changes(prefix_lm=False)
        expected = reference_logits(model.model, teacher)
        logits = torch.cat([engine.logits(*row) for row in teacher])
        scored = evaluate(engine, rows, EvaluateConfig(limit=limit))  # type: ignore[arg-type]
    return {
        "expected_answers": {
            "positions": len(logits),
            **dataclasses.asdict(Distance.between(expected, logits)),
        },
        "exact_match": scored.mean["exact_match"],
        "exact_match_change": scored.mean["exact_match"] - base.mean["exact_match"],
    }


def limited(rows: list[HeldOutRow], limit: int) -> list[HeldOutRow]:
    """The first `limit` rows of each family."""
    kept: dict[str, list[HeldOutRow]] = {}
    for row in rows:
        kept.setdefault(row.stratum, [])
        if len(kept[row.stratum]) < limit:
            kept[row.stratum].append(row)
    return [row for several in kept.values() for row in several]


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--types", nargs="+", default=["f32", "bf16", "q8_0", "q4_k_m", "q4_0"])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--name", default="gguf_quality")
    arguments = parser.parse_args()
    rows = read_held_out(arguments.held_out)
    model = load(arguments.run, device="cpu", dtype="fp32")
    base = evaluate(model, rows, EvaluateConfig(limit=arguments.limit))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        results = {
            kind: file_type_result(model, kind, rows, arguments.limit, folder, base)
            for kind in arguments.types
        }
        causal = causal_result(model, rows, arguments.limit, folder, base)
        lengths = prompt_lengths(load(arguments.run, device="cpu", dtype="fp32"), folder)
    write_result(
        arguments.name,
        torch.device("cpu"),
        {
            "llama_cpp": {"package": "xllamacpp", "version": version("xllamacpp")},
            "model": dataclasses.asdict(model.config),
            "rows_per_family": arguments.limit,
            "ours_fp32": {"exact_match": base.mean["exact_match"], "rows": len(base.predictions)},
            "prompts_of_1_to_500_tokens": lengths,
            "f32_run_causally": causal,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
