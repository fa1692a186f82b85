"""Metrics on disk across interruptions, the glossary, and the console."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cluster.console import StepDisplay, _left, progress_bars
from fgaif.config import TrackingConfig
from fgaif.errors import ConfigError, DataError
from fgaif.tracking import (
    GLOSSARY,
    JsonlSink,
    Metric,
    Tracker,
    explain,
    log_results,
    read_metrics,
)
from fgaif.types import DEFAULT_KINDS, StepReport


def step(number: int, **metrics: float) -> StepReport:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return StepReport(step=number, version=number, metrics=named)


def steps_in(path: Path) -> list[int]:
    return [report.step for report in read_metrics(path)]


def test_steps_are_on_disk_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "policy", TrackingConfig())
    tracker.log(step(1, kl__response=0.5))
    assert list(read_metrics(tmp_path / "policy" / "metrics.jsonl")) == [step(1, kl__response=0.5)]
    tracker.close()


def test_a_resumed_run_cuts_what_it_does_again_and_says_so(tmp_path: Path) -> None:
    """Steps 1-4 and half of 5 were written; the checkpoint was at 2, so 3 is the next step."""
    said: list[str] = []
    path = tmp_path / "metrics.jsonl"
    with Tracker(tmp_path, TrackingConfig()) as tracker:
        for number in (1, 2, 3, 4):
            tracker.log(step(number, kl__response=1.0))
    with path.open("a") as file:
        file.write('{"step": 5, "ver')
    with Tracker(tmp_path, TrackingConfig(), say=said.append) as tracker:
        tracker.log(step(3, kl__response=2.0))
        tracker.log(step(4, kl__response=2.0))
    assert steps_in(path) == [1, 2, 3, 4]
    assert [r.metrics["kl/response"] for r in read_metrics(path)] == [1.0, 1.0, 2.0, 2.0]
    assert len(said) == 1
    assert "removed 3 lines from step 3 on" in said[0]


def test_nothing_is_cut_before_the_first_step_is_logged(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingConfig()) as tracker:
        tracker.log(step(1))
    Tracker(tmp_path, TrackingConfig()).close()
    assert steps_in(tmp_path / "metrics.jsonl") == [1]


def test_a_run_that_goes_on_in_order_is_not_cut(tmp_path: Path) -> None:
    said: list[str] = []
    for number in (1, 2):
        sink = JsonlSink(tmp_path / "metrics.jsonl", said.append)
        sink.log(step(number))
        sink.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2]
    assert said == []


def test_lines_are_strict_json_and_not_finite_values_come_back_as_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Tracker(tmp_path, TrackingConfig()) as tracker:
        tracker.log(step(1, value__loss=math.inf))
    assert json.loads(path.read_text())["metrics"] == {"value/loss": None}
    assert math.isnan(next(read_metrics(path)).metrics["value/loss"])


def test_a_broken_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "version": 1, "metrics": {}}\n[1]\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        list(read_metrics(path))


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_missing_tracker_names_key_and_extra(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"tracking\.{package} = true.*fgaif\[track\]"):
        Tracker(tmp_path, TrackingConfig(**{package: True}))


class FakeHosted:
    """W&B's module, or trackio's: what is called, by run id or name."""

    def __init__(self, *, tables: bool) -> None:
        self.runs: list[dict[str, object]] = []
        self.logged: list[object] = []
        self.summary: dict[str, float] = {}
        if tables:
            self.Table = lambda columns, data: {"columns": columns, "data": data}

    def init(self, **settings: object) -> "FakeHosted.Run":
        self.runs.append(settings)
        return FakeHosted.Run(self)

    class Run:
        def __init__(self, module: "FakeHosted") -> None:
            self._module = module
            if hasattr(module, "Table"):
                self.summary = module.summary

        def log(self, metrics: dict[str, object], step: int | None = None) -> None:
            self._module.logged.append((step, metrics))

        def finish(self) -> None:
            self._module.logged.append("finish")


def test_trackio_gets_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = FakeHosted(tables=False)
    monkeypatch.setitem(sys.modules, "trackio", module)  # type: ignore[arg-type]
    with Tracker(tmp_path, TrackingConfig(trackio=True, project="p"), name="n") as tracker:
        tracker.log(step(1, kl__response=1.0))
    assert module.runs[0]["project"] == "p"
    assert module.logged == [(1, {"kl/response": 1.0}), "finish"]


def test_wandb_gets_settings_steps_figures_and_samples_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FakeHosted(tables=True)
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    config, settings = TrackingConfig(wandb=True), {"ppo": {"lr": 3e-5}}
    with Tracker(tmp_path, config, name="n", settings=settings) as tracker:
        tracker.log(step(1, kl__response=1.0))
    log_results(tmp_path, config, "n", settings, {"after/sampled/any": 0.2}, ("text",), [["A."]])
    first, second = module.runs
    assert first["id"] == second["id"]
    assert (first["name"], first["config"], first["resume"]) == ("n", settings, "allow")
    assert module.summary == {"after/sampled/any": 0.2}
    assert (None, {"captions": {"columns": ["text"], "data": [["A."]]}}) in module.logged
    log_results(tmp_path, TrackingConfig(), "n", settings, {}, (), [])  # nobody is told
    assert len(module.runs) == 2


def test_runs_of_one_name_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name was the id, so that a second run of it went on in the first."""
    module = FakeHosted(tables=True)
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    for folder in ("a", "b", "a"):
        Tracker(tmp_path / folder, TrackingConfig(wandb=True), name="same").close()
    ids = [run["id"] for run in module.runs]
    assert ids[0] == ids[2] != ids[1]


def test_tensorboard_writes_an_event_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Tracker(tmp_path, TrackingConfig(tensorboard=True)) as tracker:
        tracker.log(step(1, kl__response=1.0))
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_the_glossary_explains_names_of_a_group() -> None:
    assert explain("reward/object") is GLOSSARY["reward/KIND"]
    assert explain("seconds/rollout") is GLOSSARY["seconds/STAGE"]
    assert explain("seconds/total") is GLOSSARY["seconds/total"]
    assert explain("something/else") is None


def test_healthy_ranges_are_closed_and_readable() -> None:
    both, high, none = (
        Metric(meaning="", low=0, high=1),
        Metric(meaning="", high=0.005),
        Metric(meaning=""),
    )
    assert [both.ok(value) for value in (-0.1, 0, 1, 1.1)] == [False, True, True, False]
    assert [entry.healthy for entry in (both, high, none)] == ["0 to 1", "at most 0.005", ""]
    assert none.ok(1e9)


def shown(*, terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120)
    with StepDisplay(3, DEFAULT_KINDS, console) as display:
        for number in (1, 2):
            display.update(
                step(
                    number,
                    kl__response=number / 8,
                    hallu__object=0.2,
                    reward__object=0.5,
                    seconds__total=1.5,
                )
            )
    return text.getvalue()


def test_without_a_terminal_each_step_is_one_plain_line() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0].startswith("PPO, 3 steps: starting learner")
    assert [line.split("  ")[0] for line in lines[1:]] == ["step 1/3", "step 2/3"]
    assert "KL 0.25" in lines[2]
    assert "reward object 0.5" in lines[2]
    assert "hallucinated object 0.2" in lines[2]
    assert "\x1b" not in lines[1]


def test_on_a_terminal_the_display_has_bar_kinds_and_values() -> None:
    text = shown(terminal=True)
    for part in ("2/3", "hallucinated", "attribute", "0.25", "left"):
        assert part in text


def test_time_left_is_the_mean_pace_of_this_process() -> None:
    assert _left(elapsed=30.0, seen=3, remaining=9) == "1:30 left"
    assert _left(elapsed=30.0, seen=3, remaining=0) == "done"
    assert _left(elapsed=0.0, seen=0, remaining=9) == "9 steps left"


def test_starting_actors_is_no_part_of_the_pace() -> None:
    """Ten minutes until the first step is done, then a minute each."""
    ticks = iter([600.0, 660.0])
    text = io.StringIO()
    console = Console(file=text, force_terminal=False, width=200)
    with StepDisplay(5, DEFAULT_KINDS, console, clock=lambda: next(ticks)) as display:
        display.update(step(1))
        display.update(step(2))
    assert "4 steps left" in text.getvalue()
    assert "3:00 left" in text.getvalue()


def test_without_a_terminal_progress_is_a_few_lines() -> None:
    """What is being started, then a line each quarter: a log, not a film."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=False, width=200)
    with progress_bars(console, "sampling") as progress:
        progress(0, 100, note="starting engines")
        for done in range(101):
            progress(done, 100)
    lines = text.getvalue().splitlines()
    assert lines[0] == "sampling: 0 of 100, starting engines"
    assert [line.split(",")[0] for line in lines[1:]] == [
        "sampling: 0 of 100", *(f"sampling: {done} of 100" for done in (25, 50, 75, 100))
    ]  # fmt: skip
