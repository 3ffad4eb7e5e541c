"""From a data config to folders ready for training; a stage whose inputs are unchanged is skipped.

Layout of the result: `sources/` (of public sources), `clean/`, `heldout/` (with
`heldout/tokenized/`), `tokenizer/`, `tokenized/`, `sampled/`, `data.yaml` (the resolved config) and
`report.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hrmtext.config.base import dump_yaml, to_mapping
from hrmtext.config.data import DataConfig, LocalSourceConfig, refuse_urls
from hrmtext.data import clean as cleaning
from hrmtext.data.clean import SourceFile, clean_files, parts_path
from hrmtext.data.clean_rows import HELD_OUT
from hrmtext.data.engine import Engine, LocalEngine
from hrmtext.data.example import HeldOutRow
from hrmtext.data.format import REPORT_FILE, read_json
from hrmtext.data.heldout import write_held_out
from hrmtext.data.heldout_choice import choose_held_out, count_shared_prompts, held_out_key
from hrmtext.data.parts import PART_BYTES
from hrmtext.data.sample import sample
from hrmtext.data.sources import reasoning_gym
from hrmtext.data.sources.collect import collect, collect_inputs
from hrmtext.data.sources.local import find_files, stratum_label
from hrmtext.data.tokenize import tokenize_files
from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer
from hrmtext.data.tokenizer_texts import TextSample, training_texts
from hrmtext.data.workers import Progress
from hrmtext.errors import CheckpointError, DataError
from hrmtext.runtime.io import (
    atomic_folder,
    exclusive,
    explain_storage_errors,
    fingerprint,
    remove_leftovers,
    require_complete,
    write_json,
    write_text,
)

FORMAT_VERSION = 2
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


def prepare(
    config: DataConfig,
    out: str | Path,
    progress: Progress | None = None,
    *,
    engine: Engine | None = None,
    part_bytes: int | None = None,
) -> PreparedData:
    """Run every stage that is not up to date; an interrupted run goes on where it stopped.

    Args:
        progress: called with (what is done, done so far, total) of the running stage.
        engine: where the tasks of cleaning and tokenising run; None: processes of this machine.
        part_bytes: about how much of a file is one task; None: 32 MiB, in tokenising less where
            processes would have nothing to do. The result is the same.

    Raises:
        DataError: bad input, or a training prompt that is held out (checked at the end).
        ConfigError, BackendError, StorageError: as the stages raise them.
    """
    refuse_urls("the folder of the results", str(out))
    out = Path(out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive(out))
        if engine is None:
            engine = stack.enter_context(LocalEngine())
        out.mkdir(parents=True, exist_ok=True)
        return _Stages(config, out, engine, part_bytes, progress).run()


class _Stages:
    """The stages in their order; the caller holds the folder's lock."""

    def __init__(
        self,
        config: DataConfig,
        out: Path,
        engine: Engine,
        part_bytes: int | None,
        progress: Progress | None,
    ) -> None:
        self.config, self.engine = config, engine
        self.part_bytes, self.tokenize_part_bytes = part_bytes or PART_BYTES, part_bytes
        self.progress = progress
        self.done = PreparedData(folder=out, skipped=(), report={})
        self.work = out / ".sources.parts"
        self.skipped: list[str] = []

    def run(self) -> PreparedData:
        config, done = self.config, self.done
        remove_leftovers(done.folder, done.sources)
        inputs = _source_fingerprint(config)
        if _is_current(done.clean, inputs) and _is_current(done.heldout, inputs):
            self.skipped += ["clean", "heldout"]
        else:
            self._clean(inputs)
        for left in (self.work, parts_path(done.clean)):  # also by a run that was killed behind it
            shutil.rmtree(left, ignore_errors=True)

        inputs = fingerprint(
            FORMAT_VERSION, to_mapping(config.tokenizer), inputs, *_tokenizer_files(config)
        )
        if _is_current(done.tokenizer, inputs):
            self.skipped.append("tokenizer")
        else:
            with atomic_folder(done.tokenizer, replace=True, inputs=inputs) as temporary:
                self._tokenizer().save(temporary)
        shutil.rmtree(parts_path(done.tokenizer), ignore_errors=True)
        tokenizer = PromptTokenizer.load(done.tokenizer)

        tokenized = tokenize_files(
            done.clean, done.tokenized, tokenizer,
            engine=self.engine, part_bytes=self.tokenize_part_bytes, progress=self.progress,
        )  # fmt: skip
        held_out_files = {path.name: path for path in sorted(done.heldout.glob("*.jsonl"))}
        if held_out_files:
            tokenize_files(held_out_files, done.heldout_tokenized, tokenizer)
        if not tokenized.num_redone and not tokenized.num_removed:
            self.skipped.append("tokenized")

        inputs = fingerprint(
            FORMAT_VERSION, to_mapping(config.sampling), _strata_state(done.tokenized),
            *_benchmark_files(config),
        )  # fmt: skip
        if _is_current(done.sampled, inputs):
            self.skipped.append("sampled")
        else:
            sample(
                done.tokenized, done.sampled, config.sampling, replace=True, inputs=inputs,
                progress=self.progress,
            )  # fmt: skip

        report = {
            "sources": read_json(done.heldout / REPORT_FILE),
            "clean": read_json(done.clean / REPORT_FILE),
            "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
            "tokenized": read_json(done.tokenized / REPORT_FILE),
            "sampled": read_json(done.sampled / REPORT_FILE),
        }
        write_text(done.folder / "data.yaml", dump_yaml(config))
        write_json(done.folder / REPORT_FILE, report)
        report["tokenized"] = tokenized.to_mapping()
        return dataclasses.replace(done, skipped=tuple(self.skipped), report=report)

    def _tokenizer(self) -> PromptTokenizer:
        """The tokenizer that is asked for, loaded or trained."""
        config = self.config.tokenizer
        if config.path is not None:
            return PromptTokenizer.load(config.path)
        sample = TextSample(
            max_rows_per_stratum=config.max_rows_per_stratum,
            max_rows=config.max_rows,
            max_chars=config.max_chars_per_text,
            seed=config.seed,
        )
        texts = training_texts(
            self.done.clean, sample, self.progress,
            engine=self.engine, part_bytes=self.part_bytes, work=parts_path(self.done.tokenizer),
        )  # fmt: skip
        trained = train_tokenizer(texts, config.vocab_size, allow_fewer=config.allow_fewer)
        return PromptTokenizer(trained)

    def _clean(self, inputs: str) -> None:
        """Held-out rows first, then everything else through cleaning; both folders in the end."""
        config, done, engine = self.config, self.done, self.engine
        held_out: dict[str, list[HeldOutRow]] = {}
        source_report: dict[str, Any] = {}
        files: dict[str, SourceFile] = {}

        def add(name: str, file: SourceFile) -> None:
            if name in files:
                raise DataError(
                    f"two sources give the stratum {name!r}; set a prefix for one of them"
                )
            files[name] = file

        if config.reasoning_gym is not None:
            folder = done.sources / reasoning_gym.FOLDER
            report, held_out = reasoning_gym.collect(config.reasoning_gym, folder, self.progress)
            source_report[reasoning_gym.FOLDER] = report
            if any(config.reasoning_gym.sizes):
                for name, path in find_files(folder).items():
                    add(stratum_label(name), SourceFile(path=path, strict=True))
        for source, name, path in _local_files(config.local):
            add(name, SourceFile(path=path, strict=source.strict, eval_size=source.eval_size))
        for source in config.hub:
            folder = done.sources / source.source
            report = collect(source, folder, self.progress, engine)
            source_report.setdefault("hub", {})[source.source] = report
            for name, path in find_files(folder).items():
                file = SourceFile(path=path, strict=source.strict, eval_size=source.eval_size)
                add(stratum_label(name), file)
        with explain_storage_errors(self.work):
            self.work.mkdir(exist_ok=True)
        held_out |= choose_held_out(
            files, config.cleaning, engine, self.work,
            inputs=inputs, part_bytes=self.part_bytes, progress=self.progress,
        )  # fmt: skip
        prompts = frozenset(held_out_key(row) for rows in held_out.values() for row in rows)
        if _is_current(done.clean, inputs):  # left by a run that was stopped behind it
            cleaned = read_json(done.clean / REPORT_FILE)
        else:
            cleaned = clean_files(
                files, done.clean, config.cleaning, engine,
                held_out_prompts=prompts, inputs=inputs, part_bytes=self.part_bytes,
                progress=self.progress,
            ).to_mapping()  # fmt: skip
        shared, compared = count_shared_prompts(
            done.clean, prompts, engine, self.work, progress=self.progress
        )
        if shared:
            raise DataError(f"{shared} cleaned rows have a prompt that is held out")
        source_report |= {
            "held_out_rows": {name: len(rows) for name, rows in held_out.items()},
            "train_rows_compared": compared,
            "train_rows_with_a_held_out_prompt": shared,
            "train_rows_dropped_for_a_held_out_prompt": cleaned["dropped"].get(HELD_OUT, 0),
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


def _source_fingerprint(config: DataConfig) -> str:
    parts: list[Any] = [FORMAT_VERSION, cleaning.FORMAT_VERSION, to_mapping(config.cleaning)]
    for source, name, path in _local_files(config.local):
        stat = path.stat()
        parts.append([to_mapping(source), name, stat.st_size, stat.st_mtime_ns])
    parts += [[collect_inputs(source), source.eval_size] for source in config.hub]
    if config.reasoning_gym is not None:
        parts.append(reasoning_gym.collect_inputs(config.reasoning_gym))
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
