"""Every public source by name."""

from __future__ import annotations

from hrmtext.config.base import nearest
from hrmtext.data.sources.recipe import (
    amps,
    competition,
    instructions,
    platypus,
    principia,
    ready,
    symbolic,
    synthetic,
    thinking,
    web,
)
from hrmtext.data.sources.source import Source
from hrmtext.errors import ConfigError

RECIPE: tuple[Source, ...] = (
    competition.GSM8K,
    competition.HENDRYCKS_MATH,
    competition.OMNI_MATH,
    competition.NUMINA_MATH,
    web.NATURAL_REASONING,
    web.WEBINSTRUCT_VERIFIED,
    principia.PRINCIPIA,
    web.NO_ROBOTS,
    amps.AMPS_KHAN,
    amps.AMPS_MATHEMATICA,
    symbolic.DM_MATHEMATICS,
    synthetic.OPENMATHINSTRUCT2,
    thinking.ACEREASON,
    thinking.OPENTHOUGHTS2,
    synthetic.TEXTBOOK_REASONING,
    synthetic.SYNTH,
    instructions.FLAN,
    instructions.TASKSOURCE,
    symbolic.SUDOKU_EXTREME,
    platypus.ARB,
    platypus.OPENBOOKQA,
    platypus.RECLOR,
    platypus.SCIBENCH,
    platypus.SCIENCEQA,
    platypus.THEOREMQA,
)
"""The published mixture, in the order of its cleaning table."""
OTHERS: tuple[Source, ...] = (ready.CLEANED, ready.EVALS)
"""In place of the recipe, or beside it."""
SOURCES: dict[str, Source] = {source.name: source for source in (*RECIPE, *OTHERS)}


def find_source(name: str) -> Source:
    """The source of that name; ConfigError with the nearest one otherwise."""
    if name not in SOURCES:
        raise ConfigError(f"unknown source {name!r}{nearest(name, list(SOURCES))}")
    return SOURCES[name]
