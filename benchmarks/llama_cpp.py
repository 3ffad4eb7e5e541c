"""Tokens a second of llama.cpp and of us on a CPU: prompt and answer, same prompt, same run.

Random weights of a published size. The time of a prompt is that of an answer of one token; the
decode rate comes from how much longer an answer of `--new-tokens` more takes. Sides in turn.

    python benchmarks/llama_cpp.py [--preset XL] [--folder HF_FOLDER] [--gguf-folder FOLDER]
                                   [--types bf16 q8_0 q4_k_m] [--prompt-tokens 128]
                                   [--new-tokens 32] [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from common import interleave, read_bytes_per_s, summary, write_result
from convert import make_checkpoint

from hrmtext.artifacts.gguf_file import GgufFile
from hrmtext.config.generate import GenerateConfig
from hrmtext.config.model import preset
from hrmtext.convert.gguf import write_gguf
from hrmtext.convert.source import open_source
from hrmtext.generate import load
from hrmtext.generate.llama_cpp import LlamaCppModel


def prompt_of(tokenizer, num_tokens: int) -> str:
    """A text whose prompt has exactly `num_tokens` tokens."""
    text = ""
    while len(tokenizer.encode_prompt(text)) < num_tokens:
        text += "7"  # digits are one token each
    assert len(tokenizer.encode_prompt(text)) == num_tokens
    return text


def sides_of(models: dict[str, object], text: str, new_tokens: int) -> dict[str, Callable]:
    """Two sides a model: an answer of one token, and one of 1 + `new_tokens`."""
    sides = {}
    for name, model in models.items():
        for count in (1, 1 + new_tokens):
            config = GenerateConfig(max_new_tokens=count)
            sides[f"{name} {count}"] = lambda model=model, config=config: model.generate_tokens(
                text, config=config, stop_tokens=(), with_logprobs=False
            )
    return sides


def core_bytes(path: Path) -> int:
    """Weight bytes that one decoded token reads: each stack once a call, the head once."""
    file = GgufFile(path)
    block = sum(p.num_bytes for name, p in file.places.items() if name.startswith("blk."))
    calls = file.values["hrm_text.hrm.h_cycles"] * (file.values["hrm_text.hrm.l_cycles"] + 1)
    # The L stack runs L_cycles times as often as the H stack, and both are of equal size.
    return block // 2 * calls + file.places["output.weight"].num_bytes


def main() -> None:
    """Parse, make, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", default="XL")
    parser.add_argument("--folder", type=Path, help="checkpoint to use; made if absent")
    parser.add_argument("--gguf-folder", type=Path, help="where GGUF files are kept")
    parser.add_argument("--types", nargs="+", default=["bf16", "q8_0", "q4_k_m"])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        if not folder.exists():
            make_checkpoint(folder, preset(arguments.preset))
        measure(arguments, folder, arguments.gguf_folder or Path(scratch))


def measure(arguments: argparse.Namespace, folder: Path, gguf_folder: Path) -> None:
    """Write what is missing, time all sides, write the result."""
    source = open_source(folder)
    files = {}
    for kind in arguments.types:
        files[kind] = gguf_folder / f"{folder.name}-{kind}.gguf"
        if not files[kind].exists():
            # `hrm-text convert` checks files; here only time matters.
            write_gguf(
                source, files[kind], file_type=kind, tokenizer=source.tokenizer(), verify=False
            )
    models: dict[str, object] = {"ours bf16": load(folder, device="cpu", dtype="bf16")}
    for kind, path in files.items():
        models[f"llama.cpp {kind}"] = LlamaCppModel(path, threads=arguments.threads)
    text = prompt_of(source.tokenizer(), arguments.prompt_tokens)
    sides = sides_of(models, text, arguments.new_tokens)
    device = torch.device("cpu")
    seconds = interleave(sides, rounds=arguments.rounds, device=device)
    bandwidth = read_bytes_per_s(device)
    results = {}
    for name in models:
        prompt_s = seconds[f"{name} 1"]
        answer_s = seconds[f"{name} {1 + arguments.new_tokens}"]
        token_s = [(b - a) / arguments.new_tokens for a, b in zip(prompt_s, answer_s, strict=True)]
        kind = name.split()[1]
        reference = files.get(kind, next(iter(files.values())))
        weight_bytes = core_bytes(reference) if kind in files else None
        decode = {
            "ms_per_token": summary([1e3 * s for s in token_s]),
            "tokens_per_s": summary([1 / s for s in token_s], 2),
        }
        if weight_bytes is not None:
            rate = weight_bytes / statistics.median(token_s)
            decode["weight_bytes_per_token"] = weight_bytes
            decode["share_of_read_bandwidth"] = round(rate / bandwidth, 3)
        results[name] = {
            "prompt_tokens_per_s": summary([arguments.prompt_tokens / s for s in prompt_s], 2),
            "decode": decode,
        }
    write_result(
        "llama_cpp",
        device,
        {
            "llama_cpp": {"package": "xllamacpp", "version": version("xllamacpp")},
            "model": {"preset": arguments.preset, "weights": "random"},
            "threads": arguments.threads,
            "prompt_tokens": arguments.prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "rounds": arguments.rounds,
            "read_bytes_per_s": round(bandwidth),
            "file_bytes": {kind: path.stat().st_size for kind, path in files.items()},
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
