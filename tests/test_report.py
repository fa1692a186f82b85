"""The report of a synthetic run: schema, honesty about what is missing, a safe page, plots."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fgaif.config import Config, TrackingConfig, dump_config, load_config
from fgaif.data.images import image_ref
from fgaif.errors import DataError
from fgaif.eval.before_after import CAPTIONS, compare
from fgaif.eval.benchmarks.pope import pope_metrics
from fgaif.eval.captions import JudgedCaption
from fgaif.eval.plots import INK, calibration_figure, curves_figure, errors_figure
from fgaif.eval.policy import Captions
from fgaif.eval.report import build_report, console_table, render_html
from fgaif.eval.run_folder import read_run
from fgaif.eval.run_results import ORACLE, write_eval
from fgaif.eval.spread import Spread
from fgaif.eval.uncertainty import Estimate
from fgaif.reward.metrics import calibration_bins
from fgaif.tracking import Tracker
from fgaif.types import (
    DEFAULT_KINDS,
    CaptionMetrics,
    EvalReport,
    Fact,
    FactQuery,
    LabeledResponse,
    Prompt,
    Response,
    Segment,
    StepReport,
    Verdict,
)

EVIL = "A moon <script>alert(1)</script> & co."


def metrics(scale: float) -> CaptionMetrics:
    return CaptionMetrics(
        kinds={"object": 0.2 * scale, "attribute": 0.3 * scale, "relation": None},
        any=0.4 * scale,
        chair_s=0.5 * scale,
        chair_i=0.1 * scale,
        recall=0.9,
        true_facts=6.0,
        length=38.0,
        repetition=0.01,
        malformed=0.0,
    )


def caption(folder: Path) -> JudgedCaption:
    image = image_ref(folder / "moon.png")
    fact = Fact(kind="object", text="There is a <moon>.", segment=0)
    response = Response(
        prompt=Prompt(id="p", image=image, text="Describe & tell."),
        sample=0,
        text=EVIL,
        token_ids=np.arange(4),
        rollout_logprobs=np.zeros(4, np.float32),
        finish="length",
        policy_version=0,
    )
    verdict = Verdict(query=FactQuery(image=image, text=fact.text), answer="no")
    labeled = LabeledResponse(
        response=response,
        kinds=DEFAULT_KINDS,
        segments=(Segment(index=0, char_start=0, char_end=len(EVIL), token_start=0, token_end=4),),
        facts=(fact,),
        verdicts={fact.text: verdict},
        labels=np.array([[2, 0, 1]]),
    )
    return JudgedCaption(labeled=labeled, malformed=(True,))


def write_json(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "scenes")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report, for tests that only read it; drawing takes seconds."""
    folder = make_run(tmp_path_factory.mktemp("run") / "scenes")
    assert build_report(folder) == folder / "report" / "report.html"
    return folder


def make_run(folder: Path) -> Path:
    """Make a whole run folder as the stages leave it."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(Config(seed=7)))
    Image.new("RGB", (72, 72), "white").save(folder / "moon.png")
    pope = pope_metrics([True, False], [True, True])
    for phase, scale in (("before", 1.0), ("after", 0.25)):
        report = EvalReport(
            greedy=metrics(scale / 2),
            sampled=metrics(scale),
            pope=pope,
            pope_by_strategy={"random": pope},
        )
        captions = Captions(greedy=(caption(folder),), sampled=(caption(folder),))
        write_eval(folder / "eval", phase, report, captions)  # type: ignore[arg-type]
    for kind in DEFAULT_KINDS:
        card = {"metrics": {"accuracy": 0.9, "f1_hallu": 0.8, "none": 3.0}}
        write_json(folder / "rewards" / kind / "reward.json", card)
    summary = {"accuracy": {"object": 0.9, "attribute": 0.85}, "skipped": {"rows": 2}}
    write_json(folder / "feedback" / "summary.json", summary)
    write_json(folder / "stages.json", {"sample": {"digest": "x", "seconds": 2.5}, "train": 7.5})
    with Tracker(folder / "policy", TrackingConfig()) as tracker:
        for step in (1, 2, 3):
            values = {"kl/response": step / 10, "hallu/object": 0.1, "mismatch/mean": 0.5}
            tracker.log(StepReport(step=step, version=step, metrics=values))
    return folder


def report_of(run_dir: Path, wall_seconds: float | None = None) -> dict[str, Any]:
    return read_run(run_dir).to_json(wall_seconds)


def page_of(run_dir: Path) -> str:
    """The page without figures, which take the time."""
    results = read_run(run_dir)
    return render_html(results, results.to_json(None), {})


def test_report_json_has_the_promised_keys_and_values(built: Path) -> None:
    tree = json.loads((built / "report" / "report.json").read_text())
    assert tree["seed"] == 7
    assert tree["stages"] == {"sample": 2.5, "train": 7.5}
    assert tree["wall_seconds"] == 10.0
    assert tree["rewards"]["relation"] == {"accuracy": 0.9, "f1_hallu": 0.8}
    assert tree["feedback"] == {"object": 0.9, "attribute": 0.85}
    shown = {"kinds", "greedy", "sampled", "pope", "judge", "others", "judging"}
    assert set(tree["before"]) == shown
    assert tree["judge"] == tree["before"]["judge"] == ORACLE
    assert tree["kinds"] == tree["before"]["kinds"] == list(DEFAULT_KINDS)
    names = [*DEFAULT_KINDS, *(figure.key for figure in CAPTIONS)]
    assert list(tree["after"]["sampled"]) == names
    assert tree["after"]["sampled"]["any"] == 0.1
    assert tree["before"]["pope"]["yes_ratio"] == 0.5
    assert tree["provenance"]["skipped"] == {"rows": 2}
    assert tree["provenance"]["rewards_against"] == "labels"
    assert tree["missing"] == []


def test_settings_are_those_of_the_stages_and_not_of_the_last_command(run_dir: Path) -> None:
    """The last command's may be none of those that made these results: one was refused with a seed
    that the report then showed."""
    made = {"seconds": 1.0, "keys": {}, "contents": {"data.train": {"sha256": "abc", "rows": 3}}}
    evaluated = load_config(None, ["data.held_out=scenes:val"]).model_dump(mode="json")
    stages = {
        "sample": made | {"config": Config(seed=1).model_dump(mode="json")},
        "train": made | {"config": Config(seed=3).model_dump(mode="json")},
        "eval-after": made | {"config": evaluated},
    }
    write_json(run_dir / "stages.json", stages)
    tree = report_of(run_dir)
    assert tree["seed"] == 3
    assert tree["provenance"]["held_out"] == "scenes:val"
    sources = tree["provenance"]["stages"]
    assert {name: source["seed"] for name, source in sources.items()} == {
        "sample": 1, "train": 3, "eval-after": 0,
    }  # fmt: skip
    assert tree["provenance"]["config_digest"] == sources["train"]["config_digest"]
    assert sources["sample"]["config_digest"] != sources["train"]["config_digest"]
    assert sources["sample"]["contents"] == {"data.train": "abc"}


def test_a_measured_wall_time_wins_over_the_sum(run_dir: Path) -> None:
    assert report_of(run_dir, wall_seconds=99.0)["wall_seconds"] == 99.0


def test_rewards_against_the_truth_win_over_their_cards(run_dir: Path) -> None:
    bins = calibration_bins(np.array([[0.1, 0.9, 0.0], [0.3, 0.7, 0.0]]), np.array([1, 0]))
    truth = {
        kind: {"accuracy": 0.7, "f1_hallu": 0.6, "calibration": bins} for kind in DEFAULT_KINDS
    }
    write_json(run_dir / "eval" / "rewards.json", truth)
    tree = report_of(run_dir)
    assert tree["rewards"]["object"] == {"accuracy": 0.7, "f1_hallu": 0.6}
    assert tree["provenance"]["rewards_against"] == "oracle"
    results = read_run(run_dir)
    figure = calibration_figure(results.rewards, results.colours)
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(DEFAULT_KINDS)


def test_calibration_bins_by_hand() -> None:
    """Confidences .62 right, .66 wrong, .95 right: two bins of 2 and 1 segments."""
    probs = np.array([[0.62, 0.38, 0], [0.66, 0.34, 0], [0.05, 0.95, 0]])
    bins = calibration_bins(probs, np.array([0, 1, 1]))
    assert [row["count"] for row in bins] == [2, 1]
    assert bins[0]["confidence"] == pytest.approx(0.64)
    assert [row["accuracy"] for row in bins] == [0.5, 1.0]


def test_what_is_missing_is_said_and_not_invented(tmp_path: Path) -> None:
    tree = report_of(tmp_path)
    assert tree["before"] is None
    assert tree["rewards"] == tree["feedback"] == tree["stages"] == {}
    said = "\n".join(tree["missing"])
    for command in ("fgaif eval run", "fgaif train-reward", "fgaif annotate", "fgaif train"):
        assert command in said
    assert "Not in this report" in build_report(tmp_path).read_text()
    assert not list((tmp_path / "report").glob("*.png"))


def test_only_one_phase_still_makes_a_report(run_dir: Path) -> None:
    (run_dir / "eval" / "after.json").unlink()
    tree = report_of(run_dir)
    assert tree["after"] is None
    assert tree["before"]["sampled"]["any"] == 0.4
    assert tree["missing"] == ["evaluation after training: run `fgaif eval run`"]


def test_every_figure_is_drawn_and_a_stale_one_removed(run_dir: Path) -> None:
    (run_dir / "policy" / "metrics.jsonl").unlink()
    stale = run_dir / "report" / "ppo.png"
    stale.parent.mkdir()
    stale.write_bytes(b"of an older run")
    build_report(run_dir)
    assert [path.name for path in stale.parent.glob("*.png")] == ["hallucination.png"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("stages.json", "{", "stages.json: not valid JSON"),
        ("feedback/summary.json", "[]", "expected an object"),
        ("rewards/object/reward.json", "{}", "the key 'metrics' is missing"),
        ("eval/before.json", '{"greedy": 1}', "not a readable evaluation"),
        ("eval/after_captions.jsonl", "{}\n{", r"after_captions\.jsonl:2"),
    ],
)
def test_a_broken_file_is_named(run_dir: Path, name: str, content: str, said: str) -> None:
    (run_dir / name).write_text(content)
    with pytest.raises(DataError, match=said):
        build_report(run_dir)


def test_no_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder"):
        read_run(tmp_path / "nothing")


class Outline(HTMLParser):
    """Collects addresses, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "img", "br", "input", "hr", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes_what_a_model_wrote(built: Path) -> None:
    page = (built / "report" / "report.html").read_text()
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert "script" not in outline.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co." in page
    assert "There is a &lt;moon&gt;." in page
    assert all(address.startswith(("data:image/", "#")) for address in outline.addresses)
    assert "http-equiv" not in page


def test_the_page_shows_segments_verdicts_and_both_phases(built: Path) -> None:
    page = (built / "report" / "report.html").read_text()
    assert page.count("<article") == 1
    assert page.count('class="segment hallu flaw"') == 4
    assert page.count("before, sampled") == page.count("after, greedy") == 1
    assert page.count('class="chip hallu"') == 4 + len(DEFAULT_KINDS)
    assert "cut off" in page
    assert 'class="odd">0.5<' in page.replace(" ", "").replace("\n", "").replace(
        "tdclass", "td class"
    )


def test_an_image_that_moved_is_said_and_costs_nothing_else(run_dir: Path) -> None:
    (run_dir / "moon.png").unlink()
    page = page_of(run_dir)
    assert "image not shown" in page
    assert "data:image/png" not in page


def test_figures_take_the_colour_of_the_page(built: Path) -> None:
    page = (built / "report" / "report.html").read_text()
    assert page.count("<svg") == 2 * 2  # for wide and for narrow pages
    assert "fill: currentColor" in page
    assert INK not in page.split("</style>", 1)[1]


def test_without_data_there_is_no_figure() -> None:
    assert errors_figure({}) is None
    assert curves_figure([], {}) is None
    assert curves_figure([StepReport(step=1, version=1, metrics={"other": 1.0})], {}) is None


def test_changes_say_how_much_and_whether_it_is_better() -> None:
    def spread(low: float, high: float) -> Spread:
        return Spread(change=Estimate(value=-0.3, low=low, high=high))

    sure = {"any": spread(-0.35, -0.25), "recall": spread(-0.01, 0.02), "length": spread(1, 2)}
    rows = {row.figure.key: row for row in compare(metrics(1.0), metrics(0.25), spreads=sure)}
    assert (rows["any"].before, rows["any"].after) == ("40.0 %", "10.0 %")
    assert rows["any"].change == "−30.0 pt (×0.25)"
    assert rows["any"].verdict == "better"
    assert rows["any"].ranges == ("", "", "[−35.0, −25.0]")
    assert rows["recall"].verdict == "unclear"
    assert rows["chair_s"].verdict == ""  # no interval, no claim
    assert rows["length"].verdict == ""
    assert (rows["relation"].before, rows["relation"].change) == ("–", "")
    up = {"any": spread(0.25, 0.35)}
    assert next(
        row.verdict
        for row in compare(metrics(0.25), metrics(1.0), spreads=up)
        if row.figure.key == "any"
    ) == "worse"  # fmt: skip


def test_the_console_table_has_every_figure(built: Path) -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(console_table(built))
    text = console.export_text()
    assert "−30.0 pt (×0.25)" in text
    assert "POPE, mean of the strategies" in text
    assert "F1" in text
    assert "judged by the truth of the embedded world" in text
    assert "any error" in text


def test_the_console_table_copes_with_nothing(tmp_path: Path) -> None:
    console = Console(record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(console_table(tmp_path))
    assert "no evaluation yet" in console.export_text()
