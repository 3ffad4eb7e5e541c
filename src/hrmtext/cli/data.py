"""hrm-text data: from raw rows to packed training data, at once or stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from hrmtext.data.engine import Engine
    from hrmtext.data.prepare import PreparedData
    from hrmtext.data.sources.source import Source

EngineName = Literal["local", "ray"]
MOST_LINES = 8
"""Strata that are named when rows were dropped for one reason; of more, their sum is shown."""


def overview() -> int:
    """Clean, tokenise, sample and inspect data; `hrm-text data --help` lists the stages."""
    return 0


def run(
    config: Annotated[Path, tyro.conf.Positional],
    arguments: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    engine: EngineName = "local",
    address: str | None = None,
    num_workers: int | None = None,
) -> int:
    """Run a recipe to its end: every stage of `prepare`, then the report and the manifest.

    Stages that are up to date are skipped; an interrupted run goes on where it stopped.

    Args:
        config: a YAML recipe, for example configs/data/local.yaml.
        arguments: folder of the results (default: runs/RECIPE/data), then changes to the recipe
            as key=value, for example tokenizer.vocab_size=8192.
        engine: where the tasks of cleaning and tokenising run: processes of this machine, or a Ray
            cluster. The result is the same.
        address: of a running Ray cluster, auto on one of its nodes; None: start one here.
        num_workers: processes on this machine; None: one a core.
    """
    from hrmtext.cli.progress import stage_progress
    from hrmtext.data.report import write_manifest, write_report

    named = bool(arguments) and "=" not in arguments[0]
    out = Path(arguments[0]) if named else Path("runs") / config.stem / "data"
    with _engine(engine, address, num_workers) as workers:
        _prepare(config, out, arguments[named:], workers)
    with stage_progress() as progress:
        paths = [write_report(out, progress), write_manifest(out, progress)]
    print("\n".join(f"written: {path}" for path in paths))
    return 0


def prepare(
    config: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    engine: EngineName = "local",
    address: str | None = None,
    num_workers: int | None = None,
) -> int:
    """Run the stages that make training data; `run` is the same and ends with the report.

    Stages that are up to date are skipped; an interrupted run goes on where it stopped.

    Args:
        config: a YAML recipe, for example configs/data/local.yaml.
        out: folder of the results.
        overrides: changes to the recipe as key=value, for example tokenizer.vocab_size=8192.
        engine: where the tasks of cleaning and tokenising run; see `run`.
        address: of a running Ray cluster, auto on one of its nodes; None: start one here.
        num_workers: processes on this machine; None: one a core.
    """
    with _engine(engine, address, num_workers) as workers:
        _prepare(config, out, overrides, workers)
    return 0


def _prepare(config: Path, out: Path, overrides: tuple[str, ...], engine: Engine) -> None:
    from rich.console import Console

    from hrmtext.cli.progress import stage_progress
    from hrmtext.config.base import load
    from hrmtext.config.data import DataConfig
    from hrmtext.data.prepare import prepare as run_prepare

    settings = load(DataConfig, config, overrides)
    with stage_progress() as progress:
        prepared = run_prepare(settings, out, progress, engine=engine)
    print_prepared(Console(highlight=False), prepared)


def tokenizer(
    clean: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    vocab_size: int = 65_536,
    max_rows_per_stratum: int | None = 100_000,
    max_rows: int | None = None,
    max_chars_per_text: int = 10_000,
    seed: int = 0,
) -> int:
    """Train a byte-level BPE tokenizer with the system's special tokens.

    Args:
        clean: folder (or file) of cleaned rows, JSONL or Parquet.
        out: folder to write tokenizer.json into.
        vocab_size: entries, the 31 special tokens and 256 bytes included.
        max_rows_per_stratum: rows read of each file, drawn at random; None for all.
        max_rows: rows read of all files together; None: no such bound.
        max_chars_per_text: characters read of each text.
        seed: of the rows that are drawn.
    """
    from hrmtext.cli.progress import stage_progress
    from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer
    from hrmtext.data.tokenizer_texts import TextSample, training_texts
    from hrmtext.runtime.io import atomic_folder

    sample = TextSample(
        max_rows_per_stratum=max_rows_per_stratum, max_rows=max_rows,
        max_chars=max_chars_per_text, seed=seed,
    )  # fmt: skip
    with stage_progress() as progress:
        texts = training_texts(clean, sample, progress)
        trained = PromptTokenizer(train_tokenizer(texts, vocab_size))
    with atomic_folder(out) as temporary:
        trained.save(temporary)
    print(f"{trained.vocab_size:,} entries written to {out}")
    return 0


def tokenize(
    clean: Annotated[Path, tyro.conf.Positional],
    tokenizer: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    engine: EngineName = "local",
    address: str | None = None,
    num_workers: int | None = None,
) -> int:
    """Tokenise cleaned rows, in parallel; files that are up to date are left alone.

    Args:
        clean: folder (or file) of cleaned rows, JSONL or Parquet.
        tokenizer: tokenizer.json or its folder.
        out: folder of the result, one folder a stratum.
        engine: where tasks run: processes of this machine, or a Ray cluster.
        address: of a running Ray cluster, auto on one of its nodes; None: start one here.
        num_workers: processes on this machine; None: one a core.
    """
    from rich.console import Console

    from hrmtext.cli.progress import stage_progress
    from hrmtext.data.tokenize import tokenize_files
    from hrmtext.data.tokenizer import PromptTokenizer

    with _engine(engine, address, num_workers) as workers, stage_progress() as progress:
        report = tokenize_files(
            clean, out, PromptTokenizer.load(tokenizer), engine=workers, progress=progress
        )
    print(
        f"{report.num_strata} strata ({report.num_redone} tokenised now, {report.num_removed} "
        f"removed), {report.num_rows:,} rows, {report.num_tokens:,} tokens"
    )
    _print_dropped(Console(highlight=False), report.dropped)
    return 0


def sample(
    tokenized: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    config: Path | None = None,
    replace: bool = False,
) -> int:
    """Draw epochs of rows from tokenised strata, by caps and repeats.

    Args:
        tokenized: folder made by `hrm-text data tokenize`.
        out: folder of the result.
        overrides: changes as key=value, for example epochs=2 max_seq_len=1024.
        config: a YAML file with the sampling section's keys.
        replace: overwrite `out`.
    """
    from hrmtext.cli.progress import stage_progress
    from hrmtext.config.base import load
    from hrmtext.config.data import SamplingConfig
    from hrmtext.data.sample import sample as run_sample

    settings = load(SamplingConfig, config, overrides)
    with stage_progress() as progress:
        report = run_sample(tokenized, out, settings, replace=replace, progress=progress)
    print(report.text())
    return 0


def inspect(folder: Annotated[Path, tyro.conf.Positional], /) -> int:
    """Summarise a folder of any stage: rows, tokens, lengths, conditions, strata.

    Args:
        folder: cleaned, tokenised, sampled or held-out folder, or one that holds them all.
    """
    from hrmtext.data.inspect import inspect as summarise

    print(summarise(folder).text())
    return 0


def sources(name: Annotated[str | None, tyro.conf.Positional] = None, /) -> int:
    """List the public sources: where from, licence, conditions, rule of sampling.

    Args:
        name: show one source in full, its cleaning rule too.
    """
    from rich.console import Console
    from rich.table import Column, Table

    from hrmtext.data.sources.recipe.catalog import SOURCES, find_source

    console = Console(highlight=False)
    if name is not None:
        _print_source(console, find_source(name))
        return 0
    table = Table(
        Column("name", no_wrap=True), Column("from", overflow="fold"), "licence", "conditions",
        "rows an epoch",
    )  # fmt: skip
    for source in SOURCES.values():
        conditions = " | ".join(condition or "none" for condition in source.conditions)
        table.add_row(
            source.name, source.hub or "files", source.licence, conditions, source.sampling
        )
    console.print(table)
    return 0


def _print_source(console: Console, source: Source) -> None:
    import inspect as introspect

    rows = {
        "name": source.name,
        "from": f"{source.hub} on the Hub" if source.hub else source.where,
        "parts": ", ".join(
            "/".join(filter(None, (part.config, part.split or "all splits", part.name)))
            for part in source.parts
        ),
        "files": ", ".join(pattern for part in source.parts for pattern in part.files),
        "columns": ", ".join(source.columns),
        "conditions": " | ".join(condition or "none" for condition in source.conditions),
        "rows an epoch": source.sampling,
        "licence": source.licence,
        "citation": source.citation,
        "rule": introspect.cleandoc(source.rule.__doc__ or ""),
    }
    for key, value in rows.items():
        console.print(f"{key + ':':<15}{value}", markup=False)


def report(data: Annotated[Path, tyro.conf.Positional], /) -> int:
    """Write report.html (one page, no network) and manifest.json into a prepared folder.

    Args:
        data: folder made by `hrm-text data prepare`.
    """
    from hrmtext.cli.progress import stage_progress
    from hrmtext.data.report import write_manifest, write_report

    with stage_progress() as progress:
        paths = [write_report(data, progress), write_manifest(data, progress)]
    print("\n".join(f"written: {path}" for path in paths))
    return 0


def contamination(
    data: Annotated[Path, tyro.conf.Positional],
    benchmarks: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    *,
    sizes: tuple[int, ...] = (13, 20),
    name: str | None = None,
) -> int:
    """Search training rows for a benchmark's questions; where scores are given, test their effect.

    Writes contamination/NAME.json and NAME.html into the folder; `hrm-text data report` shows it.

    Args:
        data: folder made by `hrm-text data prepare`, or a tokenised one.
        benchmarks: JSONL files with `question` and, in every line or none, a number `score`.
        sizes: lengths in tokens of the runs searched for.
        name: of the result's files; None: the benchmarks' names.
    """
    from hrmtext.cli.progress import stage_progress
    from hrmtext.data.contamination import audit, audit_text, read_benchmark
    from hrmtext.data.report import write_audit

    with stage_progress() as progress:
        tokenized = data / "tokenized" if (data / "tokenized").is_dir() else data
        read = [read_benchmark(path) for path in benchmarks]
        result = audit(tokenized, read, sizes=sizes, progress=progress)
    path = write_audit(result, data, name or "-".join(benchmark.name for benchmark in read))
    print(audit_text(result))
    print(f"written: {path} and {path.with_suffix('.html').name}")
    return 0


def _engine(name: EngineName, address: str | None, num_workers: int | None) -> Engine:
    from hrmtext.config.base import build
    from hrmtext.config.engine import EngineConfig
    from hrmtext.data.engine import open_engine

    values = {"name": name, "address": address, "num_workers": num_workers}
    return open_engine(build(EngineConfig, values, where="the options of the engine"))


def print_prepared(console: Console, prepared: PreparedData) -> None:
    """The tables that tell what `prepare` made, what it dropped, and that nothing is shared."""
    from rich.table import Table

    report = prepared.report
    sources, cleaned = report["sources"], report["clean"]
    table = Table("stratum", "training rows", "held-out rows")
    for name, stratum in cleaned["strata"].items():
        held_out = sources["held_out_rows"].get(name, 0)
        table.add_row(name, f"{stratum['kept']:,}", f"{held_out:,}")
    console.print(table)
    families = sources.get("reasoning_gym", {}).get("families", {})
    hub = sources.get("hub", {})
    stages = (
        {name: family["dropped"] for name, family in families.items()},
        {name: source["left_out"] | source["problems"] for name, source in hub.items()},
        {name: of["dropped"] | of["unreadable"] for name, of in cleaned["strata"].items()},
        report["tokenized"]["dropped"],
        {name: stratum["dropped"] for name, stratum in report["sampled"]["strata"].items()},
    )
    for dropped in stages:
        _print_dropped(console, dropped)
    console.print(
        f"prompts that training and held-out rows share: "
        f"{sources['train_rows_with_a_held_out_prompt']} (checked: every prompt of "
        f"{sources['train_rows_compared']:,} training rows against "
        f"{sum(sources['held_out_rows'].values()):,} held-out prompts)"
    )
    sampled = report["sampled"]
    console.print(
        f"vocabulary {report['tokenizer']['vocab_size']:,}; {sampled['rows_per_epoch']:,} rows and "
        f"{sampled['tokens_per_epoch']:,.0f} tokens an epoch"
    )
    if prepared.skipped:
        console.print(f"up to date, not repeated: {', '.join(prepared.skipped)}", style="dim")


def _print_dropped(console: Console, stage: Mapping[str, Mapping[str, Any]]) -> None:
    """What a stage dropped: a line for each part and reason, or one where many parts share one."""
    by_reason: dict[str, dict[str, int]] = {}
    for name, dropped in stage.items():
        for reason, count in dropped.items():
            rows = count["rows"] if isinstance(count, dict) else count
            by_reason.setdefault(reason, {})[name] = rows
    for reason, parts in by_reason.items():
        if len(parts) > MOST_LINES:
            parts = {f"{len(parts)} strata": sum(parts.values())}
        for name, rows in parts.items():
            console.print(f"left out of {name}: {rows:,} rows ({reason})", style="dim")
