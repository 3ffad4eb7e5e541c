"""The log, the progress line and the report say what happened, after interruptions too."""

import html.parser
import itertools
import json
import math
import re
import shutil

import pytest
import torch
from memory_source import MemorySource, random_rows, small_config

from hrmtext.artifacts import RunFolder
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.runtime.chart import Series, chart, number, smooth, ticks
from hrmtext.train import train_on, write_report
from hrmtext.train.heat import heat_map
from hrmtext.train.metrics import Interval, MetricsLog, read_metrics, truncate
from hrmtext.train.progress import TrainingProgress, format_time, summarise

CPU = torch.device("cpu")
RECORD = {
    "kind": "train", "step": 10, "epoch": 0, "loss": 2.5, "token_accuracy": 0.25,
    "exact_answer": 0.1, "gradient_norm": 1.0, "lr": 1e-3, "bp_steps": 5, "tokens": 100,
    "supervised_tokens": 40,
    "timing": {"tokens_per_s": 1234.5, "flops_per_s": 5e9, "elapsed_s": 3.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run <1>"
    source = MemorySource(random_rows(40), heldout=random_rows(10, seed=5))
    train_on(small_config(tensorboard=True), source, run_folder=folder, progress="none")
    return RunFolder(folder)


def test_interval_means_survive_a_stop_exactly():
    whole, first = Interval(CPU), Interval(CPU)
    steps = [
        (torch.tensor([x * 0.1, x, x // 2, 4], dtype=torch.float64),
         {"steps": 1, "tokens": 7 * x, "supervised_tokens": 3 * x, "gradient_norm": x / 3})
        for x in range(1, 6)
    ]  # fmt: skip
    for sums, counts in steps:
        whole.add(sums, **counts)
    for sums, counts in steps[:3]:
        first.add(sums, **counts)
    second = Interval(CPU)
    second.restore(json.loads(json.dumps(first.state())))
    for sums, counts in steps[3:]:
        second.add(sums, **counts)
    expected = whole.take()
    assert second.take() == expected
    assert expected["loss"] == pytest.approx(1.5 / 45)
    assert expected["token_accuracy"] == pytest.approx(15 / 45)
    assert expected["exact_answer"] == pytest.approx(6 / 20)
    assert expected["gradient_norm"] == pytest.approx(1.0)
    assert whole.take()["loss"] == 0


def test_a_half_written_last_line_and_later_steps_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step}) for step in (2, 4, 6)]
    path.write_text("\n".join(lines) + '\n{"kind": "tr')
    assert [record["step"] for record in read_metrics(path)] == [2, 4, 6]
    truncate(path, 4)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"


def test_tensorboard_gets_the_numbers_of_the_log(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard_folder))
    events.Reload()
    training = [r for r in read_metrics(run.metrics_file) if r["kind"] == "train"]
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == [record["step"] for record in training]
    assert [e.value for e in scalars] == pytest.approx([r["loss"] for r in training])
    for name in ("validation/ema/loss", "validation/raw/loss_by_cycle_2", "train/lr"):
        assert events.Scalars(name)


def test_the_log_is_written_line_by_line(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start("a: 1\n", {})
    log = MetricsLog(run, resumed_step=0)
    log.write(RECORD)
    assert read_metrics(run.metrics_file) == [RECORD]
    log.sync()
    log.close()


WATCHED = [
    {"kind": "stability", "step": 6, "action": "skip", "applied": True, "loss": 9.25,
     "reason": "loss 9.250, 6.1 above its <median>", "gradient_norm": 3.0, "gradient_factor": 4.5,
     "rate": 1.0, "damped": {}, "totals": {"skip": 1, "damp": 0, "brake": 0}},
    *({"kind": "telemetry", "step": step, "lens_kl": {"1.L1": 2.0 / step, "1.H": 0.5},
       "update_ratio": {"H.0.mlp": 1e-3}} for step in (4, 8)),
    {"kind": "forgetting", "step": 10, "before": {"loss": 1.5, "exact_answer": 0.5},
     "after": {"loss": 1.75, "exact_answer": 0.375}},
]  # fmt: skip


class Outline(html.parser.HTMLParser):
    """Open elements must be closed in order; collects tags and what is fetched."""

    VOID = ("meta", "br", "line", "circle", "polyline")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_file_with_curves_facts_and_nothing_to_fetch(run):
    text = run.report_file.read_text()
    page = Outline()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert "://" not in text
    assert page.tags.count("svg") == 10
    for title in ("Loss", "Token accuracy", "Learning rate", "Backward depth", "Throughput"):
        assert f"<figcaption>{title}</figcaption>" in text
    assert "Validation loss after each H cycle" in text
    assert "prefers-color-scheme: dark" in text
    assert "run &lt;1&gt;" in text
    last = [r for r in read_metrics(run.metrics_file) if r["kind"] == "train"][-1]
    assert f"{last['loss']:.4f}" in text
    assert "<h2>Evaluation</h2>" not in text


def test_a_folder_that_is_called_run_has_the_name_of_the_one_above_it_in_the_report(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "maths" / "run")
    assert "<h1>maths/run</h1>" in write_report(tmp_path / "maths" / "run").read_text()


def test_the_report_shows_an_evaluation_that_came_later(run):
    family = {"name": "spell_<word>", "exact_match": 0.875, "low": 0.81, "high": 0.92,
              "majority": 0.05, "rows": 200}  # fmt: skip
    run.evaluation_file.write_text(json.dumps({"families": [family], "mean": 0.875}))
    text = write_report(run.path).read_text()
    for part in ("<h2>Evaluation</h2>", "spell_&lt;word&gt;", "87.5 %", "81.0 to 92.0 %", "5.0 %"):
        assert part in text
    run.evaluation_file.unlink()


def test_the_report_shows_what_the_guard_did_what_was_seen_inside_and_what_was_forgotten(run):
    before = run.metrics_file.read_text()
    assert "<h2>Stability</h2>" not in run.report_file.read_text()
    run.metrics_file.write_text(before + "".join(json.dumps(one) + "\n" for one in WATCHED))
    text = write_report(run.path).read_text()
    page = Outline()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert page.tags.count("svg") == 12
    assert text.count("class=mark ") == 2  # on the loss and on the gradient norm
    for part in (
        "left out: 1, damped: 0",
        "6.1 above its &lt;median&gt;",
        "Inside the recurrence",
        "1.L1: 0.5 at step 4",
        "H.0.mlp: 0.001 at step 8",
        "Forgetting",
        "1.7500",
        "37.5 %",
    ):
        assert part in text  # fmt: skip
    assert text.index(">1.L1</text>") < text.index(">1.H</text>")
    run.metrics_file.write_text(before)


def test_heat_maps_keep_the_newest_step_and_take_any_value():
    columns = [{"a": step} for step in range(1, 199)] + [{"a": 0.0, "b": math.nan}]
    text = heat_map("t", "u", range(1, 200), columns, ["a", "b", "c"])
    assert "a: 0 at step 199" in text
    assert ">c</text>" not in text
    assert heat_map("t", "", [], [], ["a"]) == ""


def test_a_report_of_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a run folder"):
        write_report(tmp_path)


def test_points_lie_where_their_values_say():
    text = chart("t", "u", [Series("a", [0, 50, 100], [0.0, 5.0, 10.0])])
    points = re.search(r'points="([^"]+)"', text).group(1).split()
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points)
    assert x1 == pytest.approx((x0 + x2) / 2)
    assert y1 == pytest.approx((y0 + y2) / 2)
    assert x0 < x2
    assert y0 > y2


def test_long_lines_are_thinned_but_end_at_the_newest_value():
    values = [math.sin(i / 50) for i in range(10_001)]
    text = chart("t", "", [Series("a", range(10_001), values)])
    points = re.search(r'points="([^"]+)"', text).group(1).split()
    assert 300 <= len(points) <= 600
    assert f"at step {10_000:,}" in text


def test_values_that_are_not_finite_leave_a_chart_readable():
    text = chart("t", "", [Series("a", [1, 2, 3], [1.0, math.nan, math.inf])])
    assert "nan" not in text
    assert "inf" not in text
    assert chart("t", "", [Series("a", [1], [math.nan])]) == ""
    assert chart("t", "", []) == ""


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3.2, 4.9), (-7, 12_345), (1e-7, 2.2e-4), (5, 5), (0, 0)]
)
def test_ticks_are_few_round_and_cover_the_range(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 9
    assert found[0] <= low + 1e-9 * abs(low)
    assert found[-1] >= high - 1e-9 * abs(high)
    steps = {round((b - a) / 10 ** math.floor(math.log10(b - a) + 1e-9), 6)
             for a, b in itertools.pairwise(found)}  # fmt: skip
    assert steps <= {1.0, 2.0, 5.0}


def test_smoothing_keeps_a_constant_and_the_length():
    assert smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    assert smooth([]) == []
    assert max(smooth([0.0, 1.0] * 100, span=20)[100:]) < 0.6


def test_numbers_and_times_read_well():
    assert [number(x) for x in (0, 0.0022, 2.2e-5, 1500, 3e6)] == [
        "0", "0.0022", "2.2e-05", "1.5k", "3M",
    ]  # fmt: skip
    assert [format_time(x) for x in (4.6, 200, 18_420, 183_600)] == [
        "5s", "3m20s", "5h07m", "2d03h",
    ]  # fmt: skip


def test_the_progress_line_says_all_that_matters(capsys):
    line = summarise(RECORD, 65)
    for part in ("loss 2.500", "25.0%", "depth 5", "1.00e-03", "tok/s", "5 GFLOP/s", "1m05s left"):
        assert part in line
    shared = {**RECORD, "timing": {**RECORD["timing"], "share_of_peak": 0.385}}
    assert "38.5% of peak" in summarise(shared, None)
    progress = TrainingProgress("lines", 100, line_every_s=3600)
    progress.update(RECORD, 65)
    progress.update({**RECORD, "step": 20}, 60)
    progress.update({**RECORD, "step": 100}, 0)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["10/100", "100/100"]


def test_the_bar_runs_and_no_progress_is_silent(capsys):
    for mode in ("bar", "none"):
        progress = TrainingProgress(mode, 100)
        progress.update(RECORD, 65)
        progress.say("hello")
        progress.close()
        shown = capsys.readouterr().err
        assert ("hello" in shown) == (mode == "bar")
    with pytest.raises(ConfigError, match="auto, bar, lines, none"):
        TrainingProgress("fancy", 1)
