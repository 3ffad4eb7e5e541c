"""hrm-text selftest"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from hrmtext.generate.selftest import SelfTestReport


def selftest(
    model: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    engine: Literal["auto", "native", "transformers", "llama.cpp"] = "auto",
    url: str | None = None,
    url_model: str | None = None,
    reference: Path | None = None,
    prompts: Path | None = None,
    weights: Literal["auto", "ema", "raw"] = "auto",
    device: str = "auto",
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Prove that a way of running a model applies the prefix mask, the gate and the recurrence.

    Its logits, or a server's answers, are compared with ours in fp32; where they differ, the
    mistake that explains them best is named: a causal mask, a wrong end token, embedding scale,
    gate, number of cycles, rotary base and others. Exit status 0: right; 1: wrong, or undecided.

    Args:
        model: run folder, checkpoint, Hugging Face folder or GGUF file.
        engine: what runs the model; auto: llama.cpp for a GGUF file, else native.
        url: test a server with OpenAI's completions interface that serves this model instead.
        url_model: the name that the server knows the model by; the first it lists otherwise.
        reference: the right model, where MODEL itself may hold the mistake (a wrong config).
        prompts: a text file of prompts, one a line; answers to trained ones tell more apart.
        weights: averaged weights where present (auto), ema, or raw.
        device: auto, cpu, cuda or cuda:N; of the engine native.
        dtype: auto, fp32, bf16 or fp16; of the engines native and transformers.
        as_json: print the whole report as JSON.
    """
    from hrmtext.api import load
    from hrmtext.errors import DataError
    from hrmtext.generate.selftest import PROMPTS, RIGHT, check_answers, check_logits

    texts = list(PROMPTS)
    if prompts is not None:
        try:
            texts = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read prompts from {prompts}: {error}") from error
        if not texts:
            raise DataError(f"{prompts} holds no prompt")
    right = load(reference or model, device="cpu", dtype="fp32", weights=weights)
    if url is not None:
        from hrmtext.generate.selftest_paths import ServerPath

        report = check_answers(right, ServerPath(url, url_model), texts)
    else:
        if engine == "auto":
            engine = "llama.cpp" if model.suffix == ".gguf" else "native"
        if engine == "llama.cpp":
            from hrmtext.generate.llama_cpp import LlamaCppModel
            from hrmtext.generate.selftest_paths import LlamaCppPath

            with LlamaCppModel(model) as llama:
                report = check_logits(right, LlamaCppPath(llama), texts)
        elif engine == "transformers":
            from hrmtext.generate.selftest_paths import TransformersPath
            from hrmtext.runtime.device import pick_device, pick_dtype

            path = TransformersPath(model, pick_dtype(dtype, pick_device("cpu")))
            report = check_logits(right, path, texts)
        else:
            from hrmtext.generate.selftest_paths import NativePath

            native = NativePath(load(model, device=device, dtype=dtype, weights=weights))
            report = check_logits(right, native, texts)
    print(json.dumps(dataclasses.asdict(report), indent=2) if as_json else describe(report))
    return 0 if report.verdict == RIGHT else 1


def describe(report: SelfTestReport) -> str:
    """The verdict, and the nearest candidates where it is not plainly right."""
    lines = [f"{report.path}: {report.verdict}. {report.message}"]
    if report.verdict != "right":
        nearest = sorted(report.distances.items(), key=lambda item: item[1])[:4]
        lines += [f"  {distance:10.4f}  {name}" for name, distance in nearest]
    return "\n".join(lines)
