"""The reasoning-gym source: determinism, no shared prompt, counted drops, scorers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

from hrmtext.config import build
from hrmtext.config.data import ReasoningGymConfig
from hrmtext.data.example import normalize_prompt
from hrmtext.data.sources import reasoning_gym as source
from hrmtext.errors import ConfigError, DataError


def mix(*families, **values) -> ReasoningGymConfig:
    families = [{"name": f} if isinstance(f, str) else f for f in families]
    values = {"num_rows": 200, "eval_size": 20, "num_workers": 1} | values
    return build(ReasoningGymConfig, {"families": families, **values}, where="test")


@pytest.fixture(scope="module")
def data() -> source.ReasoningGymData:
    # isomorphic_strings walks through Python sets: its rows depend on PYTHONHASHSEED.
    return source.generate(
        mix("gcd", "coin_flip", "isomorphic_strings", num_rows=1800, num_workers=2)
    )


def test_rows_do_not_depend_on_workers_or_hash_seed(data):
    program = (
        "import hashlib, sys\n"
        "from hrmtext.config.data import ReasoningGymConfig, FamilyConfig\n"
        "from hrmtext.data.sources import reasoning_gym as source\n"
        "names = ['gcd', 'coin_flip', 'isomorphic_strings']\n"
        "config = ReasoningGymConfig(families=tuple(FamilyConfig(name=n) for n in names),\n"
        "    num_rows=1800, eval_size=20, num_workers=1)\n"
        "data = source.generate(config)\n"
        "print(hashlib.sha256(repr((data.train, data.held_out)).encode()).hexdigest())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    own = hashlib.sha256(repr((data.train, data.held_out)).encode()).hexdigest()
    assert run.stdout.strip() == own


def test_no_prompt_is_shared_and_held_out_prompts_are_unique(data):
    train = {normalize_prompt(row.instruction) for rows in data.train.values() for row in rows}
    held = [normalize_prompt(row.instruction) for rows in data.held_out.values() for row in rows]
    assert len(held) == len(set(held)) == 60
    assert not train & set(held)
    assert data.report.shared_prompts == 0
    assert data.report.prompts_compared == len(train)


def test_every_row_is_kept_or_counted(data):
    for name, report in data.report.families.items():
        dropped = sum(
            count for reason, count in report.dropped.items() if not reason.startswith("held-out")
        )
        assert report.train_rows == len(data.train[name])
        assert report.train_rows + dropped == 600
    # coin_flip has about 250 different prompts, so some training rows must have been held out.
    assert data.report.families["coin_flip"].dropped["prompt is held out"] > 0
    json.dumps(data.report.to_mapping())


def test_neighbouring_seeds_of_the_library_overlap_but_ours_do_not():
    import reasoning_gym

    first = reasoning_gym.create_dataset("gcd", seed=5, size=3)
    second = reasoning_gym.create_dataset("gcd", seed=4, size=3)
    assert first[0]["question"] == second[1]["question"]  # the trap this source is built around
    one = source.generate(mix("count_bits", num_rows=50, eval_size=50))
    assert one.report.families["count_bits"].dropped == {}


def test_duplicates_are_dropped_where_asked():
    data = source.generate(mix("coin_flip", num_rows=600, duplicates="drop"))
    prompts = [normalize_prompt(row.instruction) for row in data.train["coin_flip"]]
    assert len(prompts) == len(set(prompts)) < 600
    assert data.report.families["coin_flip"].dropped["prompt given before"] > 0


def test_too_few_different_prompts_are_reported():
    family = {"name": "coin_flip", "config": {"min_trials": 2, "max_trials": 2}, "eval_size": 50}
    report = source.generate(mix(family, num_rows=0)).report.families["coin_flip"]
    assert 0 < report.held_out_rows < report.held_out_asked == 50
    assert report.dropped["held-out: prompt given before"] > 900


def test_families_without_answers_are_refused():
    with pytest.raises(DataError, match=r"'graph_color' gave no usable held-out row: .* no answer"):
        source.generate(mix("graph_color", eval_size=2))


def test_unknown_families_and_refused_settings_are_named():
    with pytest.raises(ConfigError, match=r"'gdc'; perhaps you meant 'gcd'"):
        source.generate(mix("gdc"))
    with pytest.raises(ConfigError, match=r"'gcd' refuses its settings .*min_digits"):
        source.generate(mix({"name": "gcd", "config": {"min_digits": 1}}))
    with pytest.raises(DataError, match="unknown reasoning-gym family 'gdc'"):
        source.score("gdc", {}, "1")


def test_one_family_may_be_listed_twice_under_labels():
    hard = {"name": "gcd", "label": "gcd_hard", "config": {"min_value": 5000, "max_value": 9000}}
    data = source.generate(mix({"name": "gcd", "size": 30}, hard, num_rows=40, eval_size=5))
    assert {name: len(rows) for name, rows in data.train.items()} == {"gcd": 30, "gcd_hard": 40}
    assert data.held_out["gcd_hard"][0].family == "gcd"
    assert data.held_out["gcd_hard"][0].settings == hard["config"]
    assert data.held_out["gcd"][0].settings is None
    with pytest.raises(ConfigError, match="lists 'gcd' twice"):
        mix("gcd", "gcd")


def test_sizes_follow_weights_and_add_up():
    config = mix({"name": "a", "weight": 2}, "b", {"name": "c", "size": 7}, "d", num_rows=1001)
    assert sum(config.sizes) == 1008
    assert config.sizes[2] == 7
    assert abs(config.sizes[0] - 2 * config.sizes[1]) <= 2


def test_the_family_scorer_judges_answers(data):
    for rows in data.held_out.values():
        for row in rows[:5]:
            entry = {"question": row.instruction, "answer": row.response, "metadata": row.metadata}
            assert row.metadata is not None
            assert source.score(row.family, entry, row.response) == 1.0
            assert source.score(row.family, entry, "no idea") < 1.0


def test_a_scorer_that_fails_gives_zero(monkeypatch):
    class Broken:
        def score_answer(self, answer, entry):
            raise ZeroDivisionError

    monkeypatch.setattr(source, "_scorer", lambda family, config: Broken())
    assert source.score("gcd", {"question": "", "answer": "", "metadata": {}}, "1") == 0.0


def test_a_worker_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(source, "WORKER", "hrmtext.no_such_module")
    with pytest.raises(DataError, match=r"ended with status 1[\s\S]*no_such_module"):
        source.generate(mix("gcd"))


def test_config_refuses_seed_and_size_in_family_settings():
    with pytest.raises(ConfigError, match="config may not set 'seed'"):
        mix({"name": "gcd", "config": {"seed": 3}})
    with pytest.raises(ConfigError, match="asks for no rows"):
        mix("gcd", num_rows=0, eval_size=0)
