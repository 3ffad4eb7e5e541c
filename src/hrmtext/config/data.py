"""Data configuration: where rows come from, how they are cleaned, tokenised and sampled."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from hrmtext.config.base import config_class
from hrmtext.errors import ConfigError

PiiKind = Literal["email", "phone", "ip", "card", "key"]
"""Kinds of personal data that have a form of their own."""
LongRows = Literal["truncate", "drop"]
"""What happens to a row beyond the context: its response is cut, or the row is dropped."""


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"{name} is {value}, expected at least {minimum}")


def refuse_urls(what: str, path: str) -> None:
    """Raise ConfigError for an address such as `s3://bucket/x`, no path of a file system."""
    scheme, found, _ = path.partition("://")
    if found and scheme.isalnum():
        raise ConfigError(
            f"{what} is {path}, an address of {scheme}; expected a path of a file system that all "
            "workers see. Mount the bucket, or copy the files"
        )


@config_class
class LocalSourceConfig:
    """JSONL or Parquet files of instruction/response pairs or of conversations, seen row by row.

    Pairs: `instruction`, `response`; conversations: `messages` (OpenAI) or `conversations`
    (ShareGPT); both optionally with `condition`.
    """

    path: str
    """A file, or a folder searched for .jsonl and .parquet files at any depth."""
    prefix: str = ""
    """Put in front of the strata's names, for example `flan__`."""
    eval_size: int = 0
    """Prompts of each file held out of training, chosen by a hash of the prompt."""
    strict: bool = False
    """Stop at the first bad row instead of counting it."""
    licence: str | None = None
    """Licence of the files, for the manifest."""

    def __post_init__(self) -> None:
        refuse_urls("local.path", self.path)
        _at_least("local.eval_size", self.eval_size, 0)


@config_class
class HubSourceConfig:
    """A public source by name, its rows taken by the recipe's rule; `hrm-text data sources`."""

    source: str
    """Name in the list of `hrm-text data sources`."""
    path: str | None = None
    """A copy of the source's files (folder, archive, file or Hub cache); None: read the Hub."""
    files: tuple[str, ...] = ()
    """Files of the source, in place of `path` or beside it."""
    revision: str | None = None
    """Commit, tag or branch of the Hub's data set; None: its main branch."""
    limit: int | None = None
    """Raw rows to read, spread evenly over the source's files or configs; None: all."""
    eval_size: int = 0
    """Prompts of each stratum held out of training, chosen by a hash of the prompt."""
    strict: bool = False
    """Stop at the first malformed row instead of counting it."""

    def __post_init__(self) -> None:
        for path in (self.path, *self.files):
            refuse_urls(f"hub source {self.source!r}: path", path or "")
        _at_least(f"hub source {self.source!r}: eval_size", self.eval_size, 0)
        if self.limit is not None:
            _at_least(f"hub source {self.source!r}: limit", self.limit, 1)
        if self.revision is not None and (self.path is not None or self.files):
            raise ConfigError(
                f"hub source {self.source!r} states a revision and files; the revision is of the "
                "Hub. Leave one out"
            )


@config_class
class FamilyConfig:
    """One reasoning-gym family."""

    name: str
    """Family, as reasoning_gym.create_dataset knows it."""
    label: str | None = None
    """Stratum name; None: `name`. Needed where one family is listed twice."""
    size: int | None = None
    """Training rows to generate; None: a share of `num_rows` by `weight`."""
    weight: float = 1.0
    """Share of `num_rows` where `size` is not given."""
    eval_size: int | None = None
    """Held-out rows; None: the mix's `eval_size`."""
    condition: str = "direct"
    """Condition of the family's rows."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Difficulty and other settings, passed to reasoning_gym.create_dataset as they are."""

    def __post_init__(self) -> None:
        if self.size is not None:
            _at_least(f"family {self.name!r}: size", self.size, 0)
        if self.eval_size is not None:
            _at_least(f"family {self.name!r}: eval_size", self.eval_size, 0)
        if not self.weight > 0:
            raise ConfigError(f"family {self.name!r}: weight is {self.weight}, expected above 0")
        for key in ("seed", "size"):
            if key in self.config:
                raise ConfigError(
                    f"family {self.name!r}: config may not set {key!r}; training and held-out rows "
                    "need seeds and sizes of their own. Set the mix's seed, or the family's size"
                )
        if not self.stratum or "/" in self.stratum or self.stratum.startswith("."):
            raise ConfigError(
                f"family {self.name!r}: label {self.stratum!r} cannot name a stratum; "
                "expected a plain file name"
            )

    @property
    def stratum(self) -> str:
        """Name of the family's stratum."""
        return self.name if self.label is None else self.label


@config_class
class ReasoningGymConfig:
    """A declared mix of reasoning-gym families; the same values give the same rows anywhere."""

    families: tuple[FamilyConfig, ...]
    """The families of the mix."""
    num_rows: int = 0
    """Training rows shared by the families that state no `size` of their own."""
    eval_size: int = 100
    """Held-out rows of each family that states none of its own."""
    seed: int = 0
    """Seed of the mix; training and held-out rows get far apart seeds from it."""
    duplicates: Literal["keep", "drop"] = "keep"
    """What happens to a training prompt that its family gives twice."""
    num_workers: int | None = None
    """Processes that generate; None: one a core. The rows do not depend on it."""

    def __post_init__(self) -> None:
        _at_least("reasoning_gym.num_rows", self.num_rows, 0)
        _at_least("reasoning_gym.eval_size", self.eval_size, 0)
        if self.num_workers is not None:
            _at_least("reasoning_gym.num_workers", self.num_workers, 1)
        if not self.families:
            raise ConfigError("reasoning_gym.families is empty; name at least one family")
        names = [family.stratum for family in self.families]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"reasoning_gym.families lists {name!r} twice; give each its own label"
                )
        if sum(self.sizes) == 0 and not any(self.eval_sizes):
            raise ConfigError(
                "reasoning_gym asks for no rows; set num_rows, or a size for each family"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Training rows of each family; shares of `num_rows` are rounded down, then topped up."""
        weights = [f.weight if f.size is None else 0.0 for f in self.families]
        total = sum(weights)
        if total == 0:
            return tuple(f.size or 0 for f in self.families)
        shares = [int(self.num_rows * weight / total) for weight in weights]
        shared = [i for i, family in enumerate(self.families) if family.size is None]
        for i in shared[: self.num_rows - sum(shares)]:
            shares[i] += 1
        return tuple(
            share if family.size is None else family.size
            for share, family in zip(shares, self.families, strict=True)
        )

    @property
    def eval_sizes(self) -> tuple[int, ...]:
        """Held-out rows of each family."""
        return tuple(self.eval_size if f.eval_size is None else f.eval_size for f in self.families)


@config_class
class CleaningConfig:
    """Which rows are dropped or changed; each is counted by reason."""

    max_instruction_chars: int = 1_000_000
    """Longest instruction, in characters."""
    max_response_chars: int = 1_000_000
    """Longest response, in characters."""
    drop_duplicates: bool = False
    """Drop rows equal in condition, instruction and response to an earlier row of any stratum."""
    drop_control_characters: bool = True
    """Drop rows with control characters other than tab, line feed and carriage return."""
    remove_thinking: bool = False
    """Cut `<think>...</think>` out of responses; rows with nothing else are dropped."""
    boxed_answers: Literal["keep", "require", "extract"] = "keep"
    r"""Drop rows whose response has no `\boxed{...}`; with extract its last one is the response."""
    drop_code_fences: bool = False
    """Drop rows whose response has a fenced block of code."""
    drop_python: bool = False
    """Drop rows in which the word python stands on either side."""
    scripts: tuple[str, ...] = ()
    """Scripts that letters should be of (LATIN, CYRILLIC, CJK, ...); empty: any."""
    min_script_share: float = 0.9
    """Least share of a row's letters that are of `scripts`."""
    pii: Literal["keep", "drop", "mask"] = "keep"
    """Personal data in either text: drop the row, or put the kind in its place: `[email]`."""
    pii_kinds: tuple[PiiKind, ...] = ("email", "phone", "ip", "card", "key")
    """What counts as personal data."""
    near_duplicates: float | None = None
    """Drop all but one of rows alike: least share of 5-word pieces in common; None: off."""
    format: Literal["parquet", "jsonl"] = "parquet"
    """How cleaned rows are stored."""

    def __post_init__(self) -> None:
        for script in self.scripts:
            if not (script.isalpha() and script.isupper()):
                raise ConfigError(
                    f"cleaning.scripts has {script!r}; expected names as Unicode has them, in "
                    "capitals: LATIN, GREEK, CYRILLIC, ARABIC, HEBREW, CJK, HIRAGANA, HANGUL, ..."
                )
        for name, value, low in (
            ("min_script_share", self.min_script_share, 0.0),
            ("near_duplicates", self.near_duplicates, 0.5),
        ):
            if value is not None and not low <= value <= 1:
                raise ConfigError(f"cleaning.{name} is {value}, expected {low} to 1")
        _at_least("cleaning.max_instruction_chars", self.max_instruction_chars, 1)
        _at_least("cleaning.max_response_chars", self.max_response_chars, 1)


@config_class
class TokenizerConfig:
    """A tokenizer to load, or how to train one."""

    path: str | None = None
    """A tokenizer.json or its folder; None: train one on the cleaned rows."""
    vocab_size: int = 65_536
    """Entries of a trained vocabulary, the 31 special tokens and 256 bytes included."""
    allow_fewer: bool = False
    """Train a smaller vocabulary where the texts do not give `vocab_size` entries; else, stop."""
    max_rows_per_stratum: int | None = 100_000
    """Rows of each stratum that training reads, drawn at random; None: all."""
    max_rows: int | None = None
    """Rows of all strata together that training reads, drawn at random; None: no such bound."""
    seed: int = 0
    """Seed of the rows that are drawn."""
    max_chars_per_text: int = 10_000
    """Training reads that many characters of each instruction and each response."""

    def __post_init__(self) -> None:
        _at_least("tokenizer.vocab_size", self.vocab_size, 287)
        _at_least("tokenizer.max_chars_per_text", self.max_chars_per_text, 1)
        for name in ("max_rows_per_stratum", "max_rows"):
            if getattr(self, name) is not None:
                _at_least(f"tokenizer.{name}", getattr(self, name), 1)


@config_class
class StratumRule:
    """How strata whose name starts with `prefix` are sampled; the first rule that fits counts.

    Either by rows, each stratum for itself (`max_rows`, `repeat`: the published way), or by a
    budget of tokens for all of them together (`tokens` or `share`), whatever files they lie in.
    """

    prefix: str
    """Start of the strata's names; empty: all."""
    max_rows: int | None = None
    """Rows an epoch of each stratum, before `repeat`; None: all."""
    repeat: int = 1
    """Times that many rows an epoch."""
    tokens: int | None = None
    """Tokens an epoch of all these strata together; more than they have repeats rows."""
    share: float | None = None
    """Share of `sampling.total_tokens`, relative to the shares of the other rules."""
    long_rows: LongRows | None = None
    """What happens to rows beyond the context; None: as in `sampling.long_rows`."""

    def __post_init__(self) -> None:
        _at_least(f"rule {self.prefix!r}: repeat", self.repeat, 1)
        if self.max_rows is not None:
            _at_least(f"rule {self.prefix!r}: max_rows", self.max_rows, 1)
        if self.tokens is not None:
            _at_least(f"rule {self.prefix!r}: tokens", self.tokens, 1)
        if self.share is not None and not self.share > 0:
            raise ConfigError(f"rule {self.prefix!r}: share is {self.share}, expected above 0")
        if self.tokens is not None and self.share is not None:
            raise ConfigError(f"rule {self.prefix!r} states tokens and share; state one of them")
        if self.by_tokens and (self.max_rows is not None or self.repeat != 1):
            raise ConfigError(
                f"rule {self.prefix!r} states a budget of tokens and a number of rows (max_rows or "
                "repeat); state one of them"
            )

    @property
    def by_tokens(self) -> bool:
        """Whether the rule is a budget of tokens."""
        return self.tokens is not None or self.share is not None


@config_class
class DecontaminationConfig:
    """Training rows that hold a piece of a benchmark's questions are left out, and counted."""

    files: tuple[str, ...]
    """Benchmark files: JSONL with `question`."""
    ngram_tokens: int = 13
    """A row goes if its prompt or response shares that many tokens in a row with a question."""

    def __post_init__(self) -> None:
        _at_least("decontaminate.ngram_tokens", self.ngram_tokens, 5)
        if not self.files:
            raise ConfigError("decontaminate.files is empty; name at least one benchmark file")


@config_class
class SamplingConfig:
    """Which rows make up an epoch, and how long they may be."""

    rules: tuple[StratumRule, ...] = ()
    """Caps, repeats and budgets by stratum, in order; a stratum without a rule is taken whole."""
    total_tokens: int | None = None
    """Tokens an epoch that the rules with a `share` divide among them."""
    epochs: int = 4
    """Epochs to write."""
    max_seq_len: int = 4_096
    """Context in tokens; a row may have one more, which is predicted only."""
    long_rows: LongRows = "truncate"
    """What happens to rows beyond the context."""
    min_response_tokens: int = 2
    """Shortest response in tokens, its end token included, counted after truncation."""
    seed: int = 0
    """Seed of the order of rows."""
    decontaminate: DecontaminationConfig | None = None
    """Benchmarks whose questions no row may hold; None: rows are not searched."""

    def __post_init__(self) -> None:
        _at_least("sampling.epochs", self.epochs, 1)
        _at_least("sampling.max_seq_len", self.max_seq_len, 2)
        _at_least("sampling.min_response_tokens", self.min_response_tokens, 1)
        shares = [rule.prefix for rule in self.rules if rule.share is not None]
        if shares and self.total_tokens is None:
            raise ConfigError(
                f"sampling rule {shares[0]!r} states a share; set sampling.total_tokens, of which "
                "it is a share"
            )
        if self.total_tokens is not None:
            _at_least("sampling.total_tokens", self.total_tokens, 1)
            if not shares:
                raise ConfigError("sampling.total_tokens is set, but no rule states a share of it")

    def budget(self, rule: StratumRule) -> int | None:
        """Tokens an epoch of a rule's strata; None where it counts rows."""
        if rule.share is None or self.total_tokens is None:
            return rule.tokens
        shares = sum(other.share for other in self.rules if other.share is not None)
        return max(1, round(self.total_tokens * rule.share / shares))


@config_class
class DataConfig:
    """Everything `hrm-text data prepare` needs."""

    local: tuple[LocalSourceConfig, ...] = ()
    """Local files."""
    hub: tuple[HubSourceConfig, ...] = ()
    """Public sources, from the Hub or from copies of their files."""
    reasoning_gym: ReasoningGymConfig | None = None
    """Generated reasoning problems."""
    cleaning: CleaningConfig = CleaningConfig()
    """Which rows are dropped."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Which tokenizer is used or trained."""
    sampling: SamplingConfig = SamplingConfig()
    """Which rows make up an epoch."""

    def __post_init__(self) -> None:
        if not self.local and not self.hub and self.reasoning_gym is None:
            raise ConfigError("the data config names no source; set local, hub or reasoning_gym")
        names = [source.source for source in self.hub]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"hub lists {name!r} twice; give it several `files` instead")
