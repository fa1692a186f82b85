"""Report, results and comparison pages in headless Chromium: wide and narrow, light and dark."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("playwright", reason="the screens' tests need playwright (the dev extra)")
if not shutil.which("chromium"):
    pytest.skip("the screens' tests need the program chromium on PATH", allow_module_level=True)

from page_stub import chromium
from playwright.sync_api import Browser
from test_eval import FALSE_CAPTION, MOON_AND_TREE, TRUE_CAPTION, make_response, split
from test_report import write_json

from fgaif.config import Config, TrackingConfig, dump_config
from fgaif.data.images import image_ref
from fgaif.data.scenes.files import write_split
from fgaif.eval.benchmarks.pope import score_pope
from fgaif.eval.policy import evaluate_policy
from fgaif.eval.report import build_report
from fgaif.eval.run_results import REWARDS, write_eval
from fgaif.eval.scenes import SceneJudge, scene_questions
from fgaif.eval.tables import comparison_table, render_page, results_table
from fgaif.eval.uncertainty import compare, intervals
from fgaif.tracking import Tracker
from fgaif.types import DEFAULT_KINDS, GenerationRequest, Prompt, Response, StepReport

WIDTHS = {1280: 900, 390: 844}
OVERFLOW = """() => {
  const wide = innerWidth + 1;
  const seen = (e) => e.checkVisibility() && e.getBoundingClientRect().width > 0;
  const outside = [...document.body.querySelectorAll("*")].filter(seen).filter((e) => {
    const box = e.getBoundingClientRect();
    return (box.right > wide || box.left < -1) && !e.closest(".tip");
  }).map((e) => `${e.tagName} ${e.className.baseVal ?? e.className} ${e.textContent.slice(0, 40)}`);
  const scrolled = [...document.querySelectorAll(".scroll")].filter(
    (e) => e.scrollWidth > e.clientWidth + 1).map((e) => `scroll ${e.textContent.slice(0, 60)}`);
  const page = document.documentElement.scrollWidth > wide ? ["the page scrolls sideways"] : [];
  return [...page, ...outside, ...scrolled];
}"""
OVERLAP = """() => {
  const boxes = [...document.querySelectorAll("table, .tile, .card, svg.figure")]
    .filter((e) => e.checkVisibility()).map((e) => [e, e.getBoundingClientRect()]);
  const hits = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
    && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  return boxes.flatMap(([e, a], i) => boxes.slice(i + 1)
    .filter(([f, b]) => !e.contains(f) && !f.contains(e) && hits(a, b))
    .map(([f]) => `${e.textContent.slice(0, 40)} | ${f.textContent.slice(0, 40)}`));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def said(texts: Sequence[str], requests: Sequence[GenerationRequest]) -> list[Response]:
    """Each image has its text, greedy and sampled."""
    return [
        make_response(texts[i % len(texts)], request.prompt, request.sample)
        for i, request in enumerate(requests)
    ]


def run_folder(folder: Path) -> Path:
    """A run with everything that a report shows, judged by a verifier with a long name."""
    write_split(folder / "scenes", "test", 12)
    images = sorted((folder / "scenes" / "images").iterdir())
    prompts = [
        Prompt(id=path.stem, image=image_ref(path), text="Describe this image in detail.")
        for path in images
    ]
    judge = SceneJudge(lambda _: MOON_AND_TREE, split)
    for phase, lies in (("before", 9), ("after", 3)):
        texts = [FALSE_CAPTION] * lies + [TRUE_CAPTION] * (len(prompts) - lies)
        say = partial(said, texts)
        report, captions, answers = evaluate_policy(
            say,
            lambda asked: [0.9 if i % 4 else 0.1 for i, _ in enumerate(asked)],
            prompts,
            judge=judge,
            judge_name="the verifier a-rather-long-name-of-a-checkpoint-13b-hf",
            others={REWARDS: list},
            questions=scene_questions(prompts, lambda _: MOON_AND_TREE, per_image=2, seed=0),
            config=Config(),
        )
        report = replace(report, judging={"requests": 1234, "tokens": 567890, "cost": 1.25})
        write_eval(folder / "eval", phase, report, captions, answers)  # type: ignore[arg-type]
    (folder / "config.yaml").write_text(dump_config(Config(seed=7)))
    bins = [
        {"confidence": 0.35 + 0.07 * i, "accuracy": min(1.0, 0.3 + 0.08 * i), "count": 4**i % 97}
        for i in range(10)
    ]
    scores = {"accuracy": 0.9, "precision": 0.8, "recall": 0.7, "f1_hallu": 0.75, "ece": 0.04}
    for kind in DEFAULT_KINDS:
        card = {"metrics": scores, "calibration": bins}
        write_json(folder / "rewards" / kind / "reward.json", card)
    summary = {"accuracy": {"object": 0.9, "attribute": 0.85}, "skipped": {"rows": 2}}
    write_json(folder / "feedback" / "summary.json", summary)
    seconds = dict.fromkeys(("sample", "annotate", "train-reward", "train"), 1234.5)
    write_json(
        folder / "stages.json", {n: {"digest": "x", "seconds": s} for n, s in seconds.items()}
    )
    names = [
        *(f"{group}/{kind}" for group in ("reward", "hallu") for kind in DEFAULT_KINDS),
        "kl/response", "length/tokens", "policy/clip_frac", "value/explained_variance",
        "mismatch/mean", "sync/arrived", "seconds/total",
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    with Tracker(folder / "policy", TrackingConfig()) as tracker:
        for step in range(1, 19):
            values = dict(zip(names, rng.random(len(names)).tolist(), strict=True))
            tracker.log(StepReport(step=step, version=step, metrics=values))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages by name."""
    folder = tmp_path_factory.mktemp("pages") / "run"
    folder.mkdir()
    found = {"report": build_report(run_folder(folder))}
    scored = [pope_of(seed) for seed in (0, 1)]
    tables = {
        "results": results_table(
            "Results in out/mine", [(one, intervals(one)) for one in scored[:1]]
        ),
        "comparison": comparison_table("A = out/base, B = out/mine", [compare(*scored)]),
    }
    for name, table in tables.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(render_page(f"fgaif: {name}", [table], {}))
    return found


def pope_of(seed: int):  # type: ignore[no-untyped-def]
    """A scored POPE of three splits with long names in its provenance."""
    from fgaif.eval.answers import AnswerRow
    from fgaif.eval.yes_no import YesNoQuestion

    rng = np.random.default_rng(seed)
    rows = [
        YesNoQuestion(where="q", id=str(i), image=f"{i // 2}.png", text=f"{i}?", label=i % 2 == 0)
        for i in range(60)
    ]
    given = [AnswerRow(where="a", id=r.id, text=str(rng.choice(["yes", "No"]))) for r in rows]
    splits = ("random", "popular", "adversarial")
    scored = score_pope(dict.fromkeys(splits, rows), dict.fromkeys(splits, given))
    return replace(
        scored, provenance={"model": "checkpoints/a-long-name-7b-hf+runs/x 0123456789ab"}
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "results", "comparison"])
def test_nothing_scrolls_sideways_and_nothing_overlaps(
    browser: Browser, pages: dict[str, Path], tmp_path: Path, name: str, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": WIDTHS[width]})
    page.goto(pages[name].as_uri())
    page.evaluate("() => document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    grounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        picture = tmp_path / f"{name}-{width}-{scheme}.png"
        page.screenshot(path=picture, full_page=True)
        assert picture.stat().st_size > 10_000
        grounds.add(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate(OVERFLOW) == []
        assert page.evaluate(OVERLAP) == []
    assert len(grounds) == 2
    page.close()


def test_a_page_that_is_too_wide_is_noticed(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(pages["report"].as_uri())
    page.add_style_tag(content="table { min-width: 900px; }")
    assert page.evaluate(OVERFLOW)
    page.close()


def test_parts_that_the_page_links_to_are_there(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["report"].as_uri())
    targets = [link.get_attribute("href") for link in page.locator(".parts a").all()]
    assert len(targets) == 5
    assert all(page.locator(str(target)).count() == 1 for target in targets)
    # Two figures with the same ids would draw each other's parts.
    twice = page.evaluate("""() => {
      const used = [...document.querySelectorAll("svg *")].flatMap((e) =>
        [...e.attributes].flatMap((a) => [...a.value.matchAll(/(?:url\\(|^)#([^)]+)/g)]))
        .map((found) => found[1]);
      return [...new Set(used)].filter((id) =>
        document.querySelectorAll(`[id="${CSS.escape(id)}"]`).length !== 1);
    }""")
    assert twice == []
    page.close()
