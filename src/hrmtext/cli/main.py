"""`hrm-text`: one command, verbs below it. Parses without torch; a verb imports when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from hrmtext import __version__
from hrmtext.cli import (
    ablate,
    chat,
    convert,
    data,
    doctor,
    evaluate,
    export,
    forgetting,
    generate,
    info,
    merge,
    quickstart,
    selftest,
    train,
)
from hrmtext.errors import HrmTextError, TrainingInterrupted

VERBS: dict[str, Callable[..., Any]] = {
    "quickstart": quickstart.quickstart,
    "data": data.overview,
    "train": train.train,
    "eval": evaluate.evaluate,
    "ablate": ablate.ablate,
    "generate": generate.generate,
    "chat": chat.chat,
    "selftest": selftest.selftest,
    "export": export.export,
    "convert": convert.convert,
    "doctor": doctor.doctor,
    "merge": merge.merge,
    "forgetting": forgetting.forgetting,
    "info": info.info,
}
DATA_VERBS: dict[str, Callable[..., Any]] = {
    "run": data.run,
    "prepare": data.prepare,
    "sources": data.sources,
    "tokenizer": data.tokenizer,
    "tokenize": data.tokenize,
    "sample": data.sample,
    "inspect": data.inspect,
    "report": data.report,
    "contamination": data.contamination,
}
DEBUG_VARIABLE = "HRM_TEXT_DEBUG"
"""Set to 1, errors are shown with their trace."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0 done, 1 failed check, 2 wrong input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # oneDNN keeps 1,024 kernels by default, one a shape; packed batches bring ever new shapes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if arguments == ["--version"]:
        print(f"hrm-text {__version__}")
        return 0
    try:
        return _run(arguments)
    except TrainingInterrupted as error:
        print(error, file=sys.stderr)
        return 130
    except HrmTextError as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["data"] and len(arguments) > 1:
        verbs, prog, rest = DATA_VERBS, "hrm-text data", arguments[1:]
        description = "From raw rows to packed training data; `run` does every stage."
    else:
        verbs, prog, rest = VERBS, "hrm-text", arguments
        description = (
            "Train, evaluate, export and run HRM-Text language models. `hrm-text VERB --help` "
            "explains a verb; `hrm-text data --help` lists the stages of the data pipeline."
        )
    if not rest or (verbs is VERBS and rest == ["data"]):
        rest = ["--help"]
    status = tyro.extras.subcommand_cli_from_dict(
        verbs,
        prog=prog,
        description=description,
        args=rest,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return int(status or 0)


if __name__ == "__main__":
    raise SystemExit(main())
