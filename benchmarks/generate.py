"""How fast is batched generation against transformers' `generate`, each side at its best setting?

Same weights, same 32 prompts of different length, the same number of new tokens for every row,
greedy. In fp32 both sides must give the same tokens. "ours" is what a user gets who sets nothing.
Eager and compiled are told apart: torch.compile costs seconds for every new shape, which a single
batch does not earn back.

    python benchmarks/generate.py [--rounds 7] [--preset micro] [--rows 32] [--new-tokens 64]
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable

import torch
from common import interleave, number_formats, ratios, read_bytes_per_s, summary, write_result

from hrmtext.artifacts.hf_folder import to_hf_config, to_split
from hrmtext.config.base import build
from hrmtext.config.generate import GenerateConfig
from hrmtext.config.model import preset
from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer
from hrmtext.generate.runner import TextModel
from hrmtext.model import build_model
from hrmtext.model.flops import decode_bytes
from hrmtext.runtime.device import pick_device

Side = Callable[[], list[list[int]]]


def texts(count: int, seed: int) -> list[str]:
    """Short questions of different length."""
    rng = random.Random(seed)
    return [
        "What is " + " + ".join(str(rng.randrange(100)) for _ in range(rng.randint(2, 9))) + "?"
        for _ in range(count)
    ]


def our_side(model: TextModel, prompts: list[str], new_tokens: int, *, step: str = "auto") -> Side:
    """Our batched greedy generation; by default as it comes."""
    config = build(GenerateConfig, {"max_new_tokens": new_tokens, "step": step}, where="benchmark")

    def run() -> list[list[int]]:
        answers = model.generate_tokens(prompts, config=config, stop_tokens=(), with_logprobs=False)
        return [answer.tokens for answer in answers]

    return run


def their_side(
    config, state: dict[str, torch.Tensor], ids: list[list[int]], new_tokens: int,
    device: torch.device, dtype: torch.dtype, cache: str, compiled: bool,
) -> Side:  # fmt: skip
    """transformers' generate with left padding and the prefix mask."""
    from transformers import HrmTextConfig, HrmTextForCausalLM

    settings = to_hf_config(config)
    for name in ("model_type", "architectures", "dtype"):
        settings.pop(name)
    model = HrmTextForCausalLM._from_config(HrmTextConfig(**settings), attn_implementation="sdpa")
    model.load_state_dict(to_split(state))
    model.to(device, dtype).eval()
    if compiled:
        model.forward = torch.compile(model.forward)
    width = max(map(len, ids))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)

    @torch.inference_mode()
    def run() -> list[list[int]]:
        out = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            token_type_ids=mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
        )
        return out[:, width:].tolist()

    return run


def main() -> None:
    """Measure and write results/generate-<device>.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    config = preset(arguments.preset)
    prompts = texts(arguments.rows, seed=0)
    tokenizer = PromptTokenizer(train_tokenizer(texts(500, seed=1), 290))
    ids = tokenizer.encode_prompts(prompts, "direct")
    ours: dict[str, Side] = {}
    theirs: dict[str, Side] = {}
    state = build_model(config, seed=0).state_dict()
    formats = number_formats(device)
    for name, dtype in formats.items():
        model = TextModel(build_model(config, seed=0, device=device).to(dtype), tokenizer)
        for step in ("auto", "eager", "compiled"):
            ours[f"{name}, {step}"] = our_side(model, prompts, arguments.new_tokens, step=step)
    ways = (("dynamic", False), ("static", False), ("static", True))
    for (name, dtype), (cache, compiled) in itertools.product(formats.items(), ways):
        how = "compiled" if compiled else "eager"
        theirs[f"{name}, {cache} cache, {how}"] = their_side(
            config, state, ids, arguments.new_tokens, device, dtype, cache, compiled
        )
    expected = theirs["fp32, dynamic cache, eager"]()
    agree = sum(a == b for a, b in zip(ours["fp32, auto"](), expected, strict=True))
    groups = {
        "ours": {name: side for name, side in ours.items() if name.endswith("auto")},
        "ours, eager": {name: side for name, side in ours.items() if name.endswith("eager")},
        "ours, compiled": {name: side for name, side in ours.items() if "compiled" in name},
        "transformers": {name: side for name, side in theirs.items() if name.endswith("eager")},
        "transformers, compiled": {n: side for n, side in theirs.items() if "compiled" in n},
    }
    best: dict[str, str] = {}
    trials: dict[str, dict[str, float]] = {}
    for group, settings in groups.items():
        trial = interleave(settings, rounds=2, device=device)
        trials[group] = {name: round(min(values), 4) for name, values in trial.items()}
        best[group] = min(trials[group], key=trials[group].__getitem__)
    sides = {group: settings[best[group]] for group, settings in groups.items()}
    seconds = interleave(sides, rounds=arguments.rounds, device=device)
    single = our_side(model=TextModel(build_model(config, seed=0, device=device), tokenizer),
                      prompts=prompts[:1], new_tokens=arguments.new_tokens)  # fmt: skip
    single_seconds = min(interleave({"one row": single}, rounds=3, device=device)["one row"])
    total = arguments.rows * arguments.new_tokens
    step_seconds = single_seconds / arguments.new_tokens
    moved = decode_bytes(config, 4, context_tokens=len(ids[0]))
    write_result(
        "generate",
        device,
        {
            "preset": arguments.preset,
            "rows": arguments.rows,
            "prompt_tokens": {"shortest": min(map(len, ids)), "longest": max(map(len, ids))},
            "new_tokens_per_row": arguments.new_tokens,
            "rows_with_equal_tokens_in_fp32": f"{agree} of {arguments.rows}",
            "best_setting": best,
            "trial_seconds": trials,
            "tokens_per_s": {
                side: summary([total / value for value in values])
                for side, values in seconds.items()
            },
            "times_faster": {
                f"{fast}, than {slow}": summary(ratios(seconds, slow, fast), digits=2)
                for fast in ("ours", "ours, eager", "ours, compiled")
                for slow in ("transformers", "transformers, compiled")
            },
            "one_row": {
                "tokens_per_s": round(1 / step_seconds, 1),
                "share_of_read_bandwidth": round(
                    moved / step_seconds / read_bytes_per_s(device), 3
                ),
            },
        },
    )


if __name__ == "__main__":
    main()
