"""Which rows of local and public files are held out, and that no training row has their prompts."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hrmtext.config.base import build, to_mapping
from hrmtext.config.data import CleaningConfig
from hrmtext.data.clean import SourceFile
from hrmtext.data.clean_rows import tidy
from hrmtext.data.engine import Engine
from hrmtext.data.example import Example, HeldOutRow, example_keys, prompt_keys
from hrmtext.data.parts import PART_BYTES, Part, plan_parts
from hrmtext.data.sources.local import RowProblems, check_row, find_files, read_batches
from hrmtext.data.workers import Progress
from hrmtext.runtime.io import write_json
from hrmtext.runtime.log import logger


def choose_held_out(
    files: Mapping[str, SourceFile],
    config: CleaningConfig,
    engine: Engine,
    work: Path,
    *,
    inputs: str = "",
    part_bytes: int = PART_BYTES,
    progress: Progress | None = None,
) -> dict[str, list[HeldOutRow]]:
    """The first row of each of the `eval_size` prompts with the smallest hashes, by stratum.

    The choice depends on the prompts only: rows added later do not move it much. Files that hold
    out none are not read.

    Args:
        work: folder for the parts' choices, from which an interrupted run goes on.
        inputs: what the rows depend on.
    """
    asked = {name: file for name, file in files.items() if file.eval_size}
    folder = work / "held_out"
    folder.mkdir(parents=True, exist_ok=True)
    requests, weights = [], []
    results: dict[str, list[Path]] = {name: [] for name in asked}
    for number, (name, file) in enumerate(asked.items()):
        cuts = plan_parts(file.path, part_bytes)
        for at, cut in enumerate(cuts):
            results[name].append(folder / f"{number:06}.{at:06}.json")
            stat = file.path.stat()
            requests.append(
                {
                    "task": "hold out",
                    "what": f"choosing held-out rows of {file.path}",
                    "source": str(file.path),
                    "part": list(cut),
                    "strict": file.strict,
                    "eval_size": file.eval_size,
                    "config": to_mapping(config),
                    "result": str(results[name][-1]),
                    "key": [inputs, name, stat.st_size, stat.st_mtime_ns, *cut],
                }
            )
            weights.append(stat.st_size / len(cuts))
    total = sum(file.path.stat().st_size for file in asked.values())
    _ask(engine, requests, weights, total, folder, "choosing held-out rows, bytes", progress)
    return {name: _smallest(name, asked[name], results[name]) for name in asked}


def count_shared_prompts(
    folder: Path,
    prompts: frozenset[str],
    engine: Engine,
    work: Path,
    *,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Cleaned rows whose prompt is held out, read back from the files; and rows compared."""
    if not prompts:
        return 0, 0
    listed = work / "held_out.json"
    write_json(listed, sorted(prompts))
    requests, weights = [], []
    for path in find_files(folder).values():
        cuts = plan_parts(path)
        for cut in cuts:
            requests.append(
                {
                    "task": "hold out",
                    "what": f"comparing prompts of {path}",
                    "compare": str(listed),
                    "source": str(path),
                    "part": list(cut),
                }
            )
            weights.append(path.stat().st_size / len(cuts))
    total = round(sum(weights))
    answers = _ask(engine, requests, weights, total, work, "comparing prompts, bytes", progress)
    return sum(shared for shared, _ in answers), sum(compared for _, compared in answers)


def held_out_key(row: HeldOutRow) -> str:
    """What the row is asked, in the form for comparison."""
    instructions = [*(turn.instruction for turn in row.history), row.instruction]
    return prompt_keys(instructions, [turn.response for turn in row.history])[-1]


def answer(request: dict[str, Any]) -> Any:
    """Do one task: choose from a part, or compare a part's prompts with those held out."""
    part = Part(*request["part"])
    if "compare" in request:
        path = Path(request["compare"])
        prompts = _load_prompts(path.resolve(), path.stat().st_mtime_ns)
        shared = compared = 0
        for batch in read_batches(Path(request["source"]), RowProblems(), part):
            compared += len(batch)
            shared += sum(not prompts.isdisjoint(example_keys(row)) for row in batch)
        return shared, compared
    result = Path(request["result"])
    with contextlib.suppress(FileNotFoundError):
        if json.loads(result.read_text(encoding="utf-8"))["key"] == request["key"]:
            return None
    config = build(CleaningConfig, request["config"], where="a task")
    chosen: dict[str, Example] = {}
    heap: list[tuple[int, str]] = []
    problems = RowProblems(strict=request["strict"])
    for batch in read_batches(Path(request["source"]), problems, part):
        for raw in batch:
            example = tidy(raw, config)
            if not isinstance(example, str):
                _offer(chosen, heap, request["eval_size"], example_keys(example)[-1], example)
    rows = [[prompt, example.to_mapping()] for prompt, example in chosen.items()]
    write_json(result, {"key": request["key"], "rows": rows})
    return None


def _offer(
    chosen: dict[str, Example], heap: list[tuple[int, str]], count: int, prompt: str, row: Example
) -> None:
    """Keep the row if its prompt is new and among the `count` with the smallest hashes so far."""
    if prompt in chosen:
        return
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    key = (-int.from_bytes(digest, "little"), prompt)
    if len(heap) < count:
        heapq.heappush(heap, key)
    elif key > heap[0]:
        _, dropped = heapq.heappushpop(heap, key)
        del chosen[dropped]
    else:
        return
    chosen[prompt] = row


def _smallest(name: str, file: SourceFile, results: Sequence[Path]) -> list[HeldOutRow]:
    chosen: dict[str, Example] = {}
    heap: list[tuple[int, str]] = []
    for path in results:  # in the order of the file, so that of one prompt the first row stays
        for prompt, row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            example = check_row(row)
            assert isinstance(example, Example), f"a tidy row cannot be read back: {example}"
            _offer(chosen, heap, file.eval_size, prompt, example)
    if len(chosen) < file.eval_size:
        logger.warning(
            "%s has %d different prompts, all held out; asked for %d",
            file.path, len(chosen), file.eval_size,
        )  # fmt: skip
    return [
        HeldOutRow(
            stratum=name,
            condition=example.condition,
            instruction=example.instruction,
            response=example.response,
            history=example.history,
        )
        for example in chosen.values()
    ]


def _ask(
    engine: Engine,
    requests: Sequence[dict[str, Any]],
    weights: Sequence[float],
    total: int,
    work: Path,
    what: str,
    progress: Progress | None,
) -> list[Any]:
    done = 0.0

    def advance(index: int) -> None:
        nonlocal done
        done += weights[index]
        if progress is not None:
            progress(what, round(done), total)

    if not requests:
        return []
    engine.require(written=[work], read=sorted({Path(r["source"]) for r in requests}))
    return engine.ask(requests, advance, num_bytes=total)


@lru_cache(maxsize=1)
def _load_prompts(path: Path, mtime_ns: int) -> frozenset[str]:
    return frozenset(json.loads(path.read_text(encoding="utf-8")))
