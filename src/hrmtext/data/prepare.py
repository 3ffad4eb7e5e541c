"""From a data config to folders ready for training; a stage whose inputs are unchanged is skipped.

Layout of the result: `sources/` (of public sources), `clean/`, `heldout/` (with
`heldout/tokenized/`), `tokenizer/`, `tokenized/`, `sampled/`, `data.yaml` (the resolved config) and
`report.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import importlib.metadata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hrmtext.config.base import dump_yaml, to_mapping
from hrmtext.config.data import CleaningConfig, DataConfig, HubSourceConfig, LocalSourceConfig
from hrmtext.data import clean as cleaning
from hrmtext.data.clean import SourceStratum, clean, tidy
from hrmtext.data.example import Example, HeldOutRow, example_keys, prompt_keys
from hrmtext.data.format import REPORT_FILE, read_json
from hrmtext.data.heldout import write_held_out
from hrmtext.data.sample import sample
from hrmtext.data.sources import reasoning_gym
from hrmtext.data.sources.collect import collect, collect_inputs
from hrmtext.data.sources.local import RowProblems, find_files, read_batches, stratum_label
from hrmtext.data.tokenize import tokenize_files
from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer
from hrmtext.data.workers import Progress
from hrmtext.errors import CheckpointError, DataError
from hrmtext.runtime.io import atomic_folder, fingerprint, require_complete, write_json, write_text
from hrmtext.runtime.log import logger

FORMAT_VERSION = 1
STAGES = ("clean", "heldout", "tokenizer", "tokenized", "sampled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Where the prepared folders are, and what happened."""

    folder: Path
    skipped: tuple[str, ...]
    """Stages that were up to date."""
    report: dict[str, Any]
    """Reports of all stages by name; also `report.json` in the folder."""

    @property
    def sources(self) -> Path:
        """Examples of the public sources before cleaning, one folder a source."""
        return self.folder / "sources"

    @property
    def clean(self) -> Path:
        """Cleaned rows, one file a stratum."""
        return self.folder / "clean"

    @property
    def heldout(self) -> Path:
        """Held-out rows as JSONL, one file a stratum; empty if none were asked for."""
        return self.folder / "heldout"

    @property
    def heldout_tokenized(self) -> Path:
        """Held-out rows as a tokenised folder; absent if there are none."""
        return self.folder / "heldout" / "tokenized"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.folder / "tokenizer"

    @property
    def tokenized(self) -> Path:
        """Tokenised strata."""
        return self.folder / "tokenized"

    @property
    def sampled(self) -> Path:
        """Epochs for the loader."""
        return self.folder / "sampled"


def prepare(config: DataConfig, out: str | Path, progress: Progress | None = None) -> PreparedData:
    """Run every stage that is not up to date; an interrupted run goes on where it stopped.

    Args:
        progress: called with (what is done, done so far, total) of the running stage.

    Raises:
        DataError: bad input, or a training prompt that is held out (checked at the end).
        ConfigError, BackendError, StorageError: as the stages raise them.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    done = PreparedData(folder=out, skipped=(), report={})
    skipped = []

    inputs = _source_fingerprint(config)
    if _is_current(done.clean, inputs) and _is_current(done.heldout, inputs):
        skipped += ["clean", "heldout"]
    else:
        _run_sources(config, done, inputs, progress)

    inputs = fingerprint(
        FORMAT_VERSION, to_mapping(config.tokenizer), inputs, *_tokenizer_files(config)
    )
    if _is_current(done.tokenizer, inputs):
        skipped.append("tokenizer")
    else:
        if progress is not None:
            progress("tokenizer", 0, 1)
        with atomic_folder(done.tokenizer, replace=True, inputs=inputs) as temporary:
            _make_tokenizer(config, done.clean).save(temporary)
    tokenizer = PromptTokenizer.load(done.tokenizer)

    tokenized = tokenize_files(done.clean, done.tokenized, tokenizer, progress=progress)
    held_out_files = {path.name: path for path in sorted(done.heldout.glob("*.jsonl"))}
    if held_out_files:
        tokenize_files(held_out_files, done.heldout_tokenized, tokenizer)
    if not tokenized.num_redone and not tokenized.num_removed:
        skipped.append("tokenized")

    inputs = fingerprint(
        FORMAT_VERSION, to_mapping(config.sampling), _strata_state(done.tokenized),
        *_benchmark_files(config),
    )  # fmt: skip
    if _is_current(done.sampled, inputs):
        skipped.append("sampled")
    else:
        sample(
            done.tokenized, done.sampled, config.sampling, replace=True, inputs=inputs,
            progress=progress,
        )  # fmt: skip

    report = {
        "skipped": skipped,
        "sources": read_json(done.heldout / REPORT_FILE),
        "clean": read_json(done.clean / REPORT_FILE),
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        "tokenized": tokenized.to_mapping(),
        "sampled": read_json(done.sampled / REPORT_FILE),
    }
    write_text(out / "data.yaml", dump_yaml(config))
    write_json(out / REPORT_FILE, report)
    return dataclasses.replace(done, skipped=tuple(skipped), report=report)


def _run_sources(
    config: DataConfig, done: PreparedData, inputs: str, progress: Progress | None
) -> None:
    """Held-out rows first, then everything else through cleaning; both folders in the end."""
    held_out: dict[str, list[HeldOutRow]] = {}
    generated: dict[str, list[Example]] = {}
    source_report: dict[str, Any] = {}
    if config.reasoning_gym is not None:
        data = reasoning_gym.generate(config.reasoning_gym, progress)
        generated, held_out = data.train, dict(data.held_out)
        source_report["reasoning_gym"] = data.report.to_mapping()
    local = list(_local_files(config.local))
    for source in config.hub:
        folder = done.sources / source.source
        report = collect(source, folder, progress)
        source_report.setdefault("hub", {})[source.source] = report
        local += [(source, stratum_label(n), path) for n, path in find_files(folder).items()]
    for number, (source, name, path) in enumerate(local):
        if source.eval_size:
            rows = _choose_held_out(path, name, source, config.cleaning)
            if name in held_out:
                raise DataError(f"two sources give the stratum {name!r}; set a prefix for one")
            held_out[name] = rows
        if progress is not None:
            progress("choosing held-out rows", number + 1, len(local))
    prompts = frozenset(_held_out_key(row) for rows in held_out.values() for row in rows)

    def strata() -> Iterator[SourceStratum]:
        total = len(generated) + len(local)
        for number, (name, rows) in enumerate(generated.items()):
            yield SourceStratum(name=name, batches=[rows])
            if progress is not None:
                progress("cleaning strata", number + 1, total)
        for number, (source, name, path) in enumerate(local):
            problems = RowProblems(strict=source.strict)
            yield SourceStratum(name=name, batches=read_batches(path, problems), problems=problems)
            if progress is not None:
                progress("cleaning strata", len(generated) + number + 1, total)

    report = clean(strata(), done.clean, config.cleaning, held_out_prompts=prompts, inputs=inputs)
    shared, compared = _shared_prompts(done.clean, prompts)
    if shared:
        raise DataError(f"{shared} cleaned rows have a prompt that is held out")
    source_report |= {
        "held_out_rows": {name: len(rows) for name, rows in held_out.items()},
        "train_rows_compared": compared,
        "train_rows_with_a_held_out_prompt": shared,
        "train_rows_dropped_for_a_held_out_prompt": report.dropped.get(cleaning.HELD_OUT, 0),
    }
    with atomic_folder(done.heldout, replace=True, inputs=inputs) as temporary:
        for name, rows in held_out.items():
            if rows:
                write_held_out(temporary / f"{name}.jsonl", rows)
        write_json(temporary / REPORT_FILE, source_report)


def _local_files(sources: Iterable[LocalSourceConfig]) -> Iterator[tuple[Any, str, Path]]:
    for source in sources:
        for name, path in find_files(source.path).items():
            yield source, source.prefix + stratum_label(name), path


def _choose_held_out(
    path: Path, name: str, source: LocalSourceConfig | HubSourceConfig, config: CleaningConfig
) -> list[HeldOutRow]:
    """The first row of each of the `eval_size` prompts with the smallest hashes.

    The choice depends on the prompts only: rows added later do not move it much.
    """
    chosen: dict[str, Example] = {}
    heap: list[tuple[int, str]] = []
    for batch in read_batches(path, RowProblems(strict=source.strict)):
        for raw in batch:
            example = tidy(raw, config)
            if isinstance(example, str):
                continue
            prompt = example_keys(example)[-1]
            if prompt in chosen:
                continue
            digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
            key = (-int.from_bytes(digest, "little"), prompt)
            if len(heap) < source.eval_size:
                heapq.heappush(heap, key)
            elif key > heap[0]:
                _, dropped = heapq.heappushpop(heap, key)
                del chosen[dropped]
            else:
                continue
            chosen[prompt] = example
    if len(chosen) < source.eval_size:
        logger.warning(
            "%s has %d different prompts, all held out; asked for %d",
            path, len(chosen), source.eval_size,
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


def _shared_prompts(folder: Path, prompts: frozenset[str]) -> tuple[int, int]:
    """Cleaned rows whose prompt is held out, read back from the files; and rows compared."""
    shared = compared = 0
    if prompts:
        for path in find_files(folder).values():
            for batch in read_batches(path, RowProblems()):
                compared += len(batch)
                shared += sum(not prompts.isdisjoint(example_keys(row)) for row in batch)
    return shared, compared


def _held_out_key(row: HeldOutRow) -> str:
    instructions = [*(turn.instruction for turn in row.history), row.instruction]
    return prompt_keys(instructions, [turn.response for turn in row.history])[-1]


def _make_tokenizer(config: DataConfig, folder: Path) -> PromptTokenizer:
    if config.tokenizer.path is not None:
        return PromptTokenizer.load(config.tokenizer.path)
    texts = training_texts(
        folder, config.tokenizer.max_rows_per_stratum, config.tokenizer.max_chars_per_text
    )
    trained = train_tokenizer(
        texts, config.tokenizer.vocab_size, allow_fewer=config.tokenizer.allow_fewer
    )
    return PromptTokenizer(trained)


def training_texts(
    folder: str | Path, max_rows_per_stratum: int | None, max_chars: int
) -> Iterator[str]:
    """Instructions and responses for tokenizer training, stratum after stratum.

    Args:
        max_rows_per_stratum: rows taken from each file, spread evenly over it; None: all.
        max_chars: characters taken of each text.
    """
    for path in find_files(folder).values():
        stride = 1.0
        if max_rows_per_stratum is not None:
            rows = sum(len(batch) for batch in read_batches(path, RowProblems()))
            stride = max(1.0, rows / max_rows_per_stratum)
        number, wanted = 0, 0.0
        for batch in read_batches(path, RowProblems()):
            for example in batch:
                if number >= int(wanted):
                    wanted += stride
                    for turn in example.turns():
                        yield turn.instruction[:max_chars]
                        yield turn.response[:max_chars]
                number += 1


def _source_fingerprint(config: DataConfig) -> str:
    parts: list[Any] = [FORMAT_VERSION, cleaning.FORMAT_VERSION, to_mapping(config.cleaning)]
    for source, name, path in _local_files(config.local):
        stat = path.stat()
        parts.append([to_mapping(source), name, stat.st_size, stat.st_mtime_ns])
    parts += [[collect_inputs(source), source.eval_size] for source in config.hub]
    if config.reasoning_gym is not None:
        reasoning_gym.family_names()  # says what to install where it is missing
        mix = to_mapping(config.reasoning_gym)
        mix.pop("num_workers")
        parts += [mix, importlib.metadata.version("reasoning-gym")]
    return fingerprint(*parts)


def _tokenizer_files(config: DataConfig) -> list[Path]:
    if config.tokenizer.path is None:
        return []
    path = Path(config.tokenizer.path)
    file = path / "tokenizer.json" if path.is_dir() else path
    return [file] if file.is_file() else []


def _benchmark_files(config: DataConfig) -> list[Path]:
    asked = config.sampling.decontaminate
    files = [] if asked is None else [Path(file) for file in asked.files]
    for file in files:
        if not file.is_file():
            raise DataError(f"no such benchmark file: {file} (sampling.decontaminate.files)")
    return files


def _strata_state(folder: Path) -> list[Any]:
    state = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        marker = require_complete(path)
        state.append([path.name, marker["tokenizer"], marker["source"], marker["files"]])
    return state


def _is_current(folder: Path, inputs: str) -> bool:
    try:
        return require_complete(folder).get("inputs") == inputs
    except CheckpointError:
        return False
