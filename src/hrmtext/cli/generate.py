"""hrm-text generate"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


def generate(
    model: Annotated[Path, tyro.conf.Positional],
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    condition: str = "direct",
    file: Path | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_samples: int = 1,
    guidance: float = 0.0,
    H_cycles: int | None = None,
    seed: int = 0,
    step: Literal["auto", "eager", "compiled", "cpp"] = "auto",
    weights: Literal["auto", "ema", "raw"] = "auto",
    engine: Literal["auto", "native", "llama.cpp"] = "auto",
    device: str = "auto",
    dtype: str = "auto",
) -> int:
    """Answer prompts: given as arguments, as lines of a file, or on standard input.

    Args:
        model: run folder, checkpoint, Hugging Face folder or GGUF file.
        prompts: the questions, one an argument.
        condition: direct, cot, noisy, synth, or several joined by commas (synth,cot).
        file: a text file with one prompt a line.
        max_new_tokens: longest answer in tokens.
        temperature: 0 takes the most probable token; above 0 draws.
        top_k: draw from this many most probable tokens.
        top_p: draw from the fewest tokens that hold this probability.
        num_samples: answers to each prompt, at a temperature above 0.
        guidance: auto-guidance weight, from -0.5 to 0.5; 0 is off.
        H_cycles: slow cycles to run, at most the model's own (None); fewer are for models that were
            trained for them.
        seed: seed of the draws.
        step: what takes a decode step: torch operations (eager, or compiled into a graph), or a C++
            kernel for CPUs; auto: the kernel for small models on a CPU with a C++ compiler.
        weights: averaged weights where present (auto), ema, or raw.
        engine: llama.cpp runs GGUF files, under the prefix mask; native runs everything else.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, fp32, bf16 or fp16.
    """
    from hrmtext.errors import DataError

    texts = list(prompts)
    if file is not None:
        try:
            texts += file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read prompts from {file}: {error}") from error
    if not texts:
        if sys.stdin.isatty():
            raise DataError('no prompt given; write it behind the model, for example "12 + 7 ="')
        texts = sys.stdin.read().splitlines()
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_samples": num_samples,
        "guidance": guidance,
        "seed": seed,
    }
    if engine == "auto":
        engine = "llama.cpp" if model.suffix == ".gguf" else "native"
    if engine == "llama.cpp":
        _refuse_native_options(
            device=device, dtype=dtype, weights=weights, step=step, H_cycles=H_cycles
        )
        from hrmtext.generate.llama_cpp import LlamaCppModel

        with LlamaCppModel(model) as llama:
            answers = llama.generate(texts, condition=condition, **sampling)
    else:
        from hrmtext.api import load

        text_model = load(model, device=device, dtype=dtype, weights=weights)
        depth = None if H_cycles is None else (H_cycles, text_model.config.L_cycles)
        answers = text_model.generate(
            texts, condition=condition, step=step, depth=depth, **sampling
        )
    for answer in answers:
        print(answer)
    return 0


def _refuse_native_options(
    *, device: str, dtype: str, weights: str, step: str, H_cycles: int | None
) -> None:
    """ConfigError for what a GGUF file has settled, or llama.cpp has not."""
    from hrmtext.errors import ConfigError

    given = {
        "--device": device not in ("auto", "cpu"),
        "--dtype": dtype != "auto",
        "--weights": weights != "auto",
        "--step": step != "auto",
        "--H-cycles": H_cycles is not None,
    }
    wrong = [name for name, is_given in given.items() if is_given]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)} cannot be used with the engine llama.cpp: a GGUF file holds one "
            "set of weights in its own number format, and it runs on the CPU"
        )
