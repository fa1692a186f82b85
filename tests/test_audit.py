"""The audit of verdicts: its numbers by hand, its sample, its page in a browser, its answers."""

import html
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fgaif.data.images import image_ref
from fgaif.errors import DataError
from fgaif.feedback.audit import (
    AuditItem,
    audit_sample,
    read_answers,
    read_items,
    write_audit,
)
from fgaif.feedback.audit_report import (
    AuditReport,
    audit_report,
    audit_tables,
    failing_facts,
    file_agreement,
    oracle_report,
    vote_agreements,
)
from fgaif.feedback.intervals import Z, cohen_kappa, weighted_share, wilson
from fgaif.feedback.labels import feedback_accuracy, label_segments
from fgaif.types import (
    DEFAULT_KINDS,
    Answer,
    Fact,
    FactQuery,
    ImageRef,
    Kind,
    LabeledResponse,
    Prompt,
    Response,
    Segment,
    Verdict,
)

Stated = tuple[Kind, str, Answer]
NOWHERE = ImageRef(path="/gone.png", sha256="0" * 64)


def respond(
    name: str,
    stated: Sequence[Stated],
    *,
    image: ImageRef | None = None,
    text: str = "One piece. Another piece.",
    verifier: str = "v",
    **verdict: object,
) -> LabeledResponse:
    """A response of two segments that states facts in its second one."""
    image = image or ImageRef(path=f"/{name}.png", sha256=name)
    response = Response(
        prompt=Prompt(id=name, image=image, text="Describe."),
        sample=0,
        text=text,
        token_ids=np.array([1, 2]),
        rollout_logprobs=np.zeros(2, dtype=np.float32),
        finish="length",
        policy_version=0,
    )
    cut = len(text) // 2
    segments = (
        Segment(index=0, char_start=0, char_end=cut, token_start=0, token_end=1),
        Segment(index=1, char_start=cut, char_end=len(text), token_start=1, token_end=2),
    )
    facts = tuple(Fact(kind=kind, text=fact, segment=1) for kind, fact, _ in stated)
    verdicts = {
        fact: Verdict(query=FactQuery(image=image, text=fact), answer=answer, **verdict)  # type: ignore[arg-type]
        for _, fact, answer in stated
    }
    return LabeledResponse(
        response=response,
        kinds=DEFAULT_KINDS,
        segments=segments,
        facts=facts,
        verdicts=verdicts,
        labels=label_segments(segments, facts, verdicts, DEFAULT_KINDS),
        provenance={"verifier": verifier},
    )


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    [
        (0.8, 10, 0.4902, 0.9433),
        (0.5, 100, 0.4038, 0.5962),
        (0.0, 10, 0.0, 0.2775),
        (1.0, 10, 0.7225, 1.0),
        (1.0, 1, 0.2065, 1.0),
    ],
)
def test_wilson_gives_the_values_of_the_tables(
    share: float, n: int, low: float, high: float
) -> None:
    assert wilson(share, n) == pytest.approx((low, high), abs=5e-5)


def test_equal_weights_count_like_none_and_unequal_ones_for_less() -> None:
    """Weights 5, 5, 30, 30, 30: 100^2 / (2 * 25 + 3 * 900) = 3.636 effective observations."""
    observed = [True] * 8 + [False] * 2
    for weight in (1.0, 7.0):
        estimate = weighted_share([(true, weight) for true in observed])
        assert estimate is not None
        assert (estimate.value, estimate.n) == (pytest.approx(0.8), 10)
        assert (estimate.low, estimate.high) == pytest.approx(wilson(0.8, 10))
    weights = [(True, 5.0), (False, 5.0), (True, 30.0), (True, 30.0), (False, 30.0)]
    estimate = weighted_share(weights)
    assert estimate is not None
    assert estimate.value == pytest.approx(0.65)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(0.65, 10000 / 2750))
    assert weighted_share([]) is None


def pairs(yes_yes: int, yes_no: int, no_yes: int, no_no: int) -> list[tuple[Answer, Answer]]:
    kinds: list[tuple[Answer, Answer]] = [
        ("yes", "yes"),
        ("yes", "no"),
        ("no", "yes"),
        ("no", "no"),
    ]
    counts = (yes_yes, yes_no, no_yes, no_no)
    return [pair for pair, count in zip(kinds, counts, strict=True) for _ in range(count)]


def test_kappa_of_the_textbook_table() -> None:
    """20, 5, 10, 15 of 50: observed 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5, kappa 0.4."""
    kappa = cohen_kappa(pairs(20, 5, 10, 15))
    assert kappa is not None
    assert (kappa.value, kappa.n) == (pytest.approx(0.4), 50)


@pytest.mark.parametrize("cells", [(20, 5, 10, 15), (60, 3, 9, 8), (5, 20, 1, 4)])
def test_the_kappa_interval_is_that_of_the_delta_method(cells: tuple[int, int, int, int]) -> None:
    """Variance of f(p) with multinomial p: (sum p g^2 - (sum p g)^2) / n, g the gradient of f."""

    def kappa(p: list[float]) -> float:
        total = sum(p)
        a, b, c, d = (x / total for x in p)
        chance = (a + b) * (a + c) + (c + d) * (b + d)
        return (a + d - chance) / (1 - chance)

    n, step = sum(cells), 1e-6
    p = [count / n for count in cells]
    slopes = []
    for index in range(4):
        up, down = p.copy(), p.copy()
        up[index] += step
        down[index] -= step
        slopes.append((kappa(up) - kappa(down)) / (2 * step))
    mean = sum(x * g for x, g in zip(p, slopes, strict=True))
    variance = (sum(x * g**2 for x, g in zip(p, slopes, strict=True)) - mean**2) / n
    estimate = cohen_kappa(pairs(*cells))
    assert estimate is not None
    half = Z * math.sqrt(variance)
    assert estimate.value == pytest.approx(kappa(p))
    assert estimate.low == pytest.approx(estimate.value - half, abs=1e-5)
    assert estimate.high == pytest.approx(estimate.value + half, abs=1e-5)


def test_kappa_where_there_is_nothing_to_tell() -> None:
    assert cohen_kappa([]) is None
    assert cohen_kappa(pairs(7, 0, 0, 0)) is None
    assert cohen_kappa(pairs(0, 0, 0, 7)) is None
    full = cohen_kappa(pairs(4, 0, 0, 3))
    assert full is not None
    assert (full.value, full.low, full.high) == (1, 1, 1)
    against = cohen_kappa(pairs(0, 5, 5, 0))
    assert against is not None
    assert against.value == pytest.approx(-1)
    one_sided = cohen_kappa(pairs(6, 0, 2, 0))  # the second always says yes
    assert one_sided is not None
    assert one_sided.value == pytest.approx(0)


def many(yes: int, no: int, kind: Kind = "object") -> list[LabeledResponse]:
    """One image for each fact."""
    answers: list[Answer] = ["yes"] * yes + ["no"] * no
    return [respond(f"{kind}{i}", [(kind, f"f{i}", a)]) for i, a in enumerate(answers)]


def test_the_sample_takes_the_same_number_of_each_kind_and_verdict() -> None:
    labeled = many(90, 10) + many(50, 2, "relation") + [respond("u", [("object", "u", "unknown")])]
    items = audit_sample(labeled, 20, seed=0)
    counts = Counter((item.kind, item.answer) for item in items)
    assert counts == {
        ("object", "no"): 6,
        ("object", "yes"): 6,
        ("relation", "no"): 2,
        ("relation", "yes"): 6,
    }
    weights = {(item.kind, item.answer): item.weight for item in items}
    assert weights["object", "yes"] == pytest.approx(15)
    assert weights["relation", "no"] == 1
    assert sum(item.weight for item in items) == pytest.approx(152)
    assert len({item.id for item in items}) == 20
    first = items[0]
    assert first.text[first.start : first.end] == first.text[12:]


def test_the_draw_depends_on_the_seed_and_not_on_the_order() -> None:
    labeled = many(90, 30)
    items = audit_sample(labeled, 20, seed=0)
    assert audit_sample(labeled[::-1] + labeled, 20, seed=0) == items
    assert audit_sample(labeled, 20, seed=1) != items
    assert [item.answer for item in items] != sorted(item.answer for item in items)
    assert len(audit_sample(labeled, 1000, seed=0)) == 120
    with pytest.raises(DataError, match="no fact has a yes/no verdict"):
        audit_sample([respond("u", [("object", "u", "unknown")])], 5, seed=0)


def test_estimates_over_samples_have_the_mean_of_all_facts() -> None:
    """True: 76 of 80 yes and 4 of 20 no: accuracy 0.92, precision 0.8, recall 16 / 20."""
    labeled = many(80, 20)
    truth = {f"f{i}": "yes" if i < 76 or i >= 96 else "no" for i in range(100)}
    drawn = []
    for seed in range(200):
        items = audit_sample(labeled, 20, seed)
        report = audit_report(labeled, items, {i.id: truth[i.fact] for i in items}, DEFAULT_KINDS)  # type: ignore[misc]
        kind = report.kinds["object"]
        assert kind.accuracy is not None
        assert kind.precision is not None
        drawn.append((kind.accuracy.value, kind.precision.value))
    for values, expected in zip(zip(*drawn, strict=True), (0.92, 0.8), strict=True):
        assert fmean(values) == pytest.approx(expected, abs=4 * stdev(values) / math.sqrt(200))


def item(kind: Kind, answer: Answer, weight: float, name: str) -> AuditItem:
    (found,) = audit_sample([respond(name, [(kind, name, answer)])], 1, 0)
    return replace(found, weight=weight)


def test_the_report_weighs_and_counts() -> None:
    """Object, 10 "no" by 2 items and 90 "yes" by 3: accuracy (5 + 60) / 100, recall 5 / 35."""
    truths: list[tuple[Kind, Answer, float, Answer]] = [
        ("object", "no", 5, "no"),
        ("object", "no", 5, "yes"),
        ("object", "yes", 30, "yes"),
        ("object", "yes", 30, "yes"),
        ("object", "yes", 30, "no"),
        ("relation", "yes", 2, "unknown"),
    ]
    items = [item(kind, said, w, f"n{i}") for i, (kind, said, w, _) in enumerate(truths)]
    answers: dict[str, Answer] = {i.id: t[3] for i, t in zip(items, truths, strict=True)}
    items.append(item("attribute", "yes", 1, "open"))
    report = audit_report([], items, answers, DEFAULT_KINDS)
    found = report.kinds["object"]
    assert (found.judged, found.missed, found.false_alarms) == (5, 1, 1)
    assert found.accuracy is not None
    assert found.accuracy.value == pytest.approx(0.65)
    assert found.precision is not None
    assert (found.precision.value, found.precision.n) == (0.5, 2)
    assert (found.precision.low, found.precision.high) == pytest.approx(wilson(0.5, 2))
    assert found.recall is not None
    assert found.recall.value == pytest.approx(1 / 7)
    assert (report.unsure, report.unanswered) == (1, 1)
    assert report.kinds["relation"].accuracy is None
    assert report.kinds["all"] == found


def test_the_oracle_gives_the_same_report_and_the_known_accuracy() -> None:
    stated: list[Stated] = [
        ("object", "a", "yes"),
        ("object", "b", "yes"),
        ("object", "c", "no"),
        ("object", "d", "no"),
        ("object", "e", "unknown"),
        ("attribute", "void", "yes"),
    ]
    labeled = [respond("x", stated), respond("x", stated)]
    truth = {"a": True, "b": False, "c": False, "d": True, "e": True, "void": None}
    report = oracle_report(labeled, lambda _, fact: truth[fact.text], DEFAULT_KINDS)
    known = feedback_accuracy(labeled, lambda _, fact: truth[fact.text], DEFAULT_KINDS)["object"]
    found = report.kinds["object"]
    assert (found.judged, found.missed, found.false_alarms) == (4, 1, 1)
    assert (known.judged, known.missed, known.false_alarms) == (4, 1, 1)
    assert found.accuracy is not None
    assert found.accuracy.value == pytest.approx(known.accuracy)
    assert found.recall is not None
    assert found.recall.value == 0.5
    assert (report.truth, report.unsure) == ("oracle", 1)
    assert report.verdicts["object"] == {
        "yes": 2, "no": 2, "undecided": 1, "failed": 0, "unreadable": 0,
    }  # fmt: skip
    assert report.classes["object"] == {"none": 2, "ok": 0, "hallu": 2, "unknown": 0}
    failed = [respond("y", [("object", "f", "unknown")], problem="failed")]
    assert oracle_report(failed, lambda *_: True, DEFAULT_KINDS).verdicts["object"]["failed"] == 1


def test_members_of_a_panel_are_compared_pair_by_pair() -> None:
    votes: list[tuple[Answer, ...]] = [
        ("yes", "yes", "no"), ("no", "no", "no"), ("yes", "no", "yes"), ("yes", "unknown", "no"),
    ]  # fmt: skip
    labeled = [
        respond(f"p{i}", [("object", f"f{i}", "yes")], votes=v, verifier="a + b + c")
        for i, v in enumerate(votes)
    ]
    first, second, third = vote_agreements([*labeled, *labeled])
    assert (first.first, first.second, first.facts, first.undecided) == ("a", "b", 3, 1)
    assert first.observed is not None
    assert first.observed.value == pytest.approx(2 / 3)
    assert (second.first, second.second, second.facts) == ("a", "c", 4)
    assert (third.first, third.second) == ("b", "c")
    assert vote_agreements([respond("p", [("object", "f", "yes")])]) == ()


def test_two_label_files_are_compared_on_what_both_state() -> None:
    def labels(verifier: str, **answers: Answer) -> list[LabeledResponse]:
        return [respond(f, [("object", f, a)], verifier=verifier) for f, a in answers.items()]

    one = labels("small", a="yes", b="no", c="yes", d="yes", e="unknown", only="no")
    other = labels("large", a="yes", b="no", c="no", d="yes", e="yes")
    found = file_agreement(one, other)
    assert (found.first, found.second, found.facts, found.undecided) == ("small", "large", 4, 1)
    assert found.kappa is not None
    assert found.kappa.value == pytest.approx(0.5)  # observed 3/4, by chance 3/8 + 1/8
    assert audit_report(one, [], {}, DEFAULT_KINDS, second=other).agreements == (found,)


def test_failing_facts_are_counted_over_images_in_normal_form() -> None:
    labeled = [
        respond("x", [("object", "There is a dog.", "no"), ("object", "There is a cat.", "yes")]),
        respond("y", [("object", "there  is a Dog", "no"), ("object", "There is a cat.", "no")]),
        respond("z", [("object", "There is a dog.", "yes")]),
    ]
    dog, cat = failing_facts([*labeled, *labeled])
    assert (dog.text, dog.images, dog.stated) == ("there is a dog", 2, 3)
    assert (cat.text, cat.images, cat.stated) == ("there is a cat", 1, 2)
    assert failing_facts(labeled, limit=1) == (dog,)


def printed(report: AuditReport) -> str:
    console = Console(file=StringIO(), width=120)
    for table in audit_tables(report):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_report_is_json_and_tables_and_texts_are_no_markup() -> None:
    labeled = [respond("x", [("object", "A [red]dog[/red].", "no")], votes=("no", "yes"))]
    items = audit_sample(labeled, 1, 0)
    report = audit_report(labeled, items, {items[0].id: "no"}, DEFAULT_KINDS)
    tree = json.loads(json.dumps(report.to_json()))
    assert tree["kinds"]["object"]["accuracy"]["value"] == 1
    assert tree["kinds"]["relation"]["accuracy"] is None
    text = printed(report)
    assert "100.0% (21% to 100%)" in text
    assert "a [red]dog[/red]" in text
    assert "NaN" not in json.dumps(tree)
    assert "0 not answered" in " ".join(printed(audit_report([], [], {}, DEFAULT_KINDS)).split())


@pytest.fixture
def sample(tmp_path: Path) -> tuple[AuditItem, ...]:
    """Three facts of two images, one of them lost, with texts that try to be HTML."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    hostile = "A 😀 piece </script><b>bold</b>. Another {{ piece }} & more."
    stated: list[Stated] = [("object", "There is <i>a</i> moon.", "no"), ("relation", "r", "yes")]
    labeled = [
        respond("a", stated, image=image_ref(tmp_path / "red.png"), text=hostile, p_yes=0.25),
        respond("b", [("attribute", "It is red.", "yes")], image=NOWHERE, votes=("yes", "no")),
    ]
    return audit_sample(labeled, 10, seed=0)


def test_the_page_stands_alone_and_the_items_come_back(
    tmp_path: Path, sample: tuple[AuditItem, ...]
) -> None:
    page = write_audit(tmp_path / "audit", sample).read_text(encoding="utf-8")
    assert read_items(tmp_path / "audit") == sample
    assert "data:image/png;base64," in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("</script>") == 2  # the texts have not closed one
    assert "<b>bold" not in page
    assert "gone.png: no such file" in page


def answered(sample: Sequence[AuditItem], folder: Path, answers: Mapping[str, object]) -> Path:
    digest = json.loads((folder / "audit_items.json").read_text())["audit"]
    path = folder / "answers.json"
    path.write_text(json.dumps({"audit": digest, "answers": answers}))
    return path


def test_answers_are_read_back_and_bad_ones_named(
    tmp_path: Path, sample: tuple[AuditItem, ...]
) -> None:
    write_audit(tmp_path, sample)
    good = {sample[0].id: "yes", sample[1].id: "unknown"}
    assert read_answers(answered(sample, tmp_path, good), sample) == good
    for answers, message in (
        ({sample[0].id: "maybe"}, f"item '{sample[0].id}': 'maybe'; expected yes, no or unknown"),
        ({sample[0].id: ["yes"]}, f"item '{sample[0].id}'"),
        ({"strange": "yes"}, "item 'strange' is not in the sample"),
    ):
        with pytest.raises(DataError, match=message):
            read_answers(answered(sample, tmp_path, answers), sample)
    with pytest.raises(DataError, match="answers to sample"):
        read_answers(answered(sample, tmp_path, good), sample[:2])
    (tmp_path / "answers.json").write_text("[1]")
    with pytest.raises(DataError, match="expected an object"):
        read_answers(tmp_path / "answers.json", sample)
    with pytest.raises(DataError, match=r"gone\.json: No such file"):
        read_answers(tmp_path / "gone.json", sample)


def test_a_changed_or_missing_sample_is_named(
    tmp_path: Path, sample: tuple[AuditItem, ...]
) -> None:
    with pytest.raises(DataError, match="draw a sample first"):
        read_items(tmp_path / "nowhere")
    write_audit(tmp_path, sample)
    path = tmp_path / "audit_items.json"
    path.write_text(path.read_text().replace('"answer": "no"', '"answer": "yes"'))
    with pytest.raises(DataError, match="was changed"):
        read_items(tmp_path)
    path.write_text('{"items": [{"id": "x"}]}')
    with pytest.raises(DataError, match="malformed"):
        read_items(tmp_path)


_DRIVER = """
<script>
const seen = [];
const note = () => seen.push([at("fact").textContent, at("verdict").textContent,
  at("text").querySelector("mark").textContent, at("text").textContent, at("count").textContent]);
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
URL.createObjectURL = (blob) => {
  blob.text().then((text) => { document.body.dataset.saved = text; });
  return "data:,";
};
HTMLAnchorElement.prototype.click = () => {};
note();
for (const key of ["y", "N", "u"]) { press(key); note(); }
for (const key of ["ArrowLeft", "ArrowLeft", "ArrowLeft"]) { press(key); note(); }
press("x");
at("save").click();
document.body.dataset.seen = JSON.stringify(seen);
</script>
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_the_page_works_in_a_browser(tmp_path: Path, sample: tuple[AuditItem, ...]) -> None:
    page = write_audit(tmp_path, sample)
    page.write_text(page.read_text(encoding="utf-8") + _DRIVER, encoding="utf-8")
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    body = re.search(r"<body[^>]*>", done.stdout)
    assert body is not None
    data = dict(re.findall(r'data-(\w+)="([^"]*)"', body.group()))
    seen = json.loads(html.unescape(data["seen"]))
    facts = [item.fact for item in sample]
    assert [row[0] for row in seen] == [*facts, facts[2], facts[1], facts[0], facts[0]]
    assert [row[1] for row in seen[:3]] == ["", "", ""], "verdicts must not show before the answer"
    assert seen[2][4] == "2 of 3 answered, item 3"
    for row, place, mine in zip(seen[3:6], (2, 1, 0), ("cannot tell", "no", "yes"), strict=True):
        checked = sample[place]
        assert row[1].startswith(f"You: {mine}. Verifier: {checked.answer}")
        assert row[2] == checked.text[checked.start : checked.end]
        assert row[3] == checked.text
    saved = tmp_path / "answers.json"
    saved.write_text(html.unescape(data["saved"]))
    expected = dict(zip((item.id for item in sample), ("yes", "no", "unknown"), strict=True))
    assert read_answers(saved, read_items(tmp_path)) == expected
