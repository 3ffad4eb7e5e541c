"""hrm-text chat"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


def chat(
    model: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    system: str | None = None,
    condition: str = "direct",
    file: Path | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 0.0,
    seed: int = 0,
    weights: Literal["auto", "ema", "raw"] = "auto",
    device: str = "auto",
    dtype: str = "auto",
) -> int:
    """Talk with a model that was trained on conversations, or answer those of a file.

    Each line on standard input is a question; the answer is printed, and both are remembered. An
    empty line begins a new conversation; Ctrl-D ends.

    Args:
        model: run folder, checkpoint or Hugging Face folder.
        system: text in front of the first question.
        condition: of every turn: direct, cot, noisy, synth, or several joined by commas.
        file: conversations to answer instead, a JSON object with `messages` a line.
        max_new_tokens: longest answer in tokens.
        temperature: 0 takes the most probable token; above 0 draws.
        top_k: draw from this many most probable tokens.
        top_p: draw from the fewest tokens that hold this probability.
        guidance: auto-guidance weight, from -0.5 to 0.5; 0 is off.
        seed: seed of the draws.
        weights: averaged weights where present (auto), ema, or raw.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, fp32, bf16 or fp16.
    """
    from hrmtext.api import load
    from hrmtext.config.base import build
    from hrmtext.config.generate import GenerateConfig
    from hrmtext.errors import ConfigError, DataError
    from hrmtext.generate.conversation import Conversation, answer_conversations

    values = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "guidance": guidance,
        "seed": seed,
    }
    config = build(GenerateConfig, values, where="chat")
    if file is not None and system is not None:
        raise ConfigError("--system cannot be used with --file: write it as a message of the file")
    conversations = None if file is None else _read_messages(file)
    text_model = load(model, device=device, dtype=dtype, weights=weights)
    if conversations is not None:
        for answer in answer_conversations(text_model, conversations, condition, config):
            print(answer.text)
        return 0
    talk = Conversation(text_model, system=system, condition=condition)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return 0
        question = line.rstrip("\n")
        if not question.strip():
            print("(a new conversation)", file=sys.stderr)
            talk = Conversation(text_model, system=system, condition=condition)
            continue
        try:
            print(talk.ask(question, config).text, flush=True)
        except DataError as error:
            print(f"error: {error}. An empty line starts a new one.", file=sys.stderr)


def _read_messages(file: Path) -> list[list[dict[str, Any]]]:
    """The `messages` of every line; DataError for anything else."""
    import json

    from hrmtext.errors import DataError

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read conversations from {file}: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
            raise DataError(f"{file}:{number} has no list `messages`")
        found.append(row["messages"])
    if not found:
        raise DataError(f"{file} holds no conversation")
    return found
