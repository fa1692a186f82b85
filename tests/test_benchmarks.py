"""A benchmark is one module: what the built-in ones declare, and two added from outside."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fault_server import FaultServer

from cluster.cli.main import main
from fgaif.errors import DataError
from fgaif.eval import benchmarks
from fgaif.eval.answers import AnswerRow
from fgaif.eval.benchmarks import benchmark_names, load_benchmark
from fgaif.eval.benchmarks.pope import pope_metrics, score_pope
from fgaif.eval.figures import OF_KIND, Figure, find_figure
from fgaif.eval.yes_no import YesNoQuestion
from fgaif.types import Json

Run = Callable[..., tuple[int, str, str]]

GROUPS = {
    "pope": ("random", "popular"),
    "chair": (),
    "amber": (),
    "hallusion": (),
    "object-halbench": (),
    "faithscore": ("object", "counting"),
    "dcscore": (),
    "mmhal": ("attribute", "relation"),
    "llava-bench": (),
}
COLUMNS = {
    "pope": 2 * 9,
    "chair": 7,
    "amber": 9 + 5 * 9,
    "hallusion": 2 * 18,
    "object-halbench": 8,
    "faithscore": 4 + 2 * 2 + 1,
    "dcscore": 6,
    "mmhal": 1 + 3 * 3 + 1,
    "llava-bench": 7,
}

CATEGORIES = '''
"""Yes/no questions in categories, with a pair of questions per image: accuracy, and pairs right."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fgaif.eval.answers import read_answers
from fgaif.eval.benchmark import Benchmark, PreparedBenchmark, needed
from fgaif.eval.figures import Figure
from fgaif.eval.rows import read_rows
from fgaif.eval.scored import Scored, ratio
from fgaif.eval.yes_no import YesNoQuestion, pair_answers, read_strictly


@dataclass(frozen=True, kw_only=True)
class Options:
    questions: Annotated[Path | None, typer.Option(help="Rows with a category.")] = None
    answers: Annotated[Path | None, typer.Option(help="Answers that exist.")] = None
    limit: Annotated[int, typer.Option(min=1, help="Questions at most.")] = 100


def prepare(options, context):
    builder = context.builder_unless(options.answers)
    file = needed(options.questions, "categories", "--questions")
    rows = read_rows(file)[: options.limit]
    questions = [
        YesNoQuestion(
            where=row.where, id=row.identity("question_id"), image=row.text("image"),
            text=row.text("text"), label=row.text("label") == "yes",
        )
        for row in rows
    ]
    asked = ()
    if builder is not None:
        asked = (builder.build("categories", [(q.id, q.image, q.text) for q in questions], 8),)
    answers = asked[0].file if asked else needed(options.answers, "categories", "--answers")

    async def score(judges, progress):
        paired, _ = pair_answers(questions, read_answers(answers))
        kinds = [row.text("category") for row in rows]
        groups = tuple(dict.fromkeys(kinds))
        right = [read_strictly(paired[q.id].text) == q.label for q in questions]
        images = [q.image for q in questions]
        # An item is an image: per group its questions and the right ones, then whether all are.
        ids = tuple(dict.fromkeys(images))
        stats = []
        for image in ids:
            own = [n for n, name in enumerate(images) if name == image]
            row = [1.0, float(all(right[n] for n in own))]
            for group in groups:
                mine = [n for n in own if kinds[n] == group]
                row += [len(mine), sum(right[n] for n in mine)]
            stats.append(row)
        return Scored(
            benchmark="categories", ids=ids, units=ids, stats=np.array(stats),
            figures=figures_of(groups), groups=groups, items=tuple({"id": i} for i in ids),
        )

    return PreparedBenchmark(
        benchmark="categories", score=score, questions=asked,
        files={"questions": file, "answers": answers}, items=len(questions),
    )


def figures_of(groups):
    def figures(sums):
        found = {
            "accuracy": ratio(sums[..., 3::2].sum(-1), sums[..., 2::2].sum(-1)),
            "pairs": ratio(sums[..., 1], sums[..., 0]),
        }
        for place, name in enumerate(groups, start=1):
            found[f"{name}/accuracy"] = ratio(sums[..., 2 * place + 1], sums[..., 2 * place])
        return found

    return figures


def prepare_official(data, context, count):
    file = data / "categories.jsonl"
    return prepare(Options(questions=file), context) if file.is_file() else file


BENCHMARK = Benchmark(
    name="categories",
    title="Categories",
    summary="yes/no questions in categories",
    answers="--answers",
    truth="--questions",
    options=Options,
    prepare=prepare,
    figures=(
        Figure(key="accuracy", title="accuracy", meaning="Right answers of a category", better=1),
        Figure(key="pairs", title="pairs", meaning="Images with both answers right", better=1),
    ),
    compute=figures_of,
    nested=True,
    official=prepare_official,
)
'''

MANNERS = '''
"""Descriptions that a judge calls polite or not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fgaif.chat.messages import ChatRequest
from fgaif.eval.answers import read_captions
from fgaif.eval.benchmark import Benchmark, PreparedBenchmark
from fgaif.eval.figures import Figure
from fgaif.eval.judge import failures, judge_all
from fgaif.eval.scored import Scored, ratio


@dataclass(frozen=True, kw_only=True)
class Options:
    answers: Annotated[Path, typer.Option(help="Captions.")]


def prepare(options, context):
    captions = read_captions(options.answers)

    async def score(judges, progress):
        found = await judge_all(
            judges.needed_judge,
            captions,
            lambda c: ChatRequest(prompt_version="v1", subject=c.id, text=c.text, max_tokens=8),
            lambda reply: {"polite": True, "rude": False}.get(reply),
            progress=progress,
        )
        kept = [(c, j) for c, j in zip(captions, found, strict=True) if j.value is not None]
        return Scored(
            benchmark="manners",
            ids=tuple(c.id for c, _ in kept),
            units=tuple(c.image for c, _ in kept),
            stats=np.array([[1.0, float(j.value)] for _, j in kept]),
            figures=figures,
            items=tuple({"id": c.id, "image": c.image, "answer": c.text} for c, _ in kept),
            counts=failures(found),
            provenance={"judge": judges.needed_judge.name},
        )

    return PreparedBenchmark(
        benchmark="manners", score=score, judged=True, files={"answers": options.answers},
        items=len(captions), cost_note="politeness has no price",
    )


def figures(sums):
    return {"polite": ratio(sums[..., 1], sums[..., 0])}


BENCHMARK = Benchmark(
    name="manners",
    title="Manners",
    summary="polite descriptions",
    answers="--answers",
    truth="none",
    options=Options,
    prepare=prepare,
    figures=(Figure(key="polite", title="polite", meaning="Polite answers", better=1),),
    compute=lambda groups: figures,
    models=("judge",),
    descriptions=True,
)
'''


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call ``fgaif eval`` with two more benchmarks, whose modules lie in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, source in (("categories", CATEGORIES), ("manners", MANNERS)):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    # The one line: a module's name in the list.
    monkeypatch.setattr(benchmarks, "MODULES", [*benchmarks.MODULES, "categories", "manners"])

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fgaif", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return call


def write_lines(path: str, rows: list[Json]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_questions(path: str) -> None:
    """Two images, each with a question about colour (yes) and one about number (no)."""
    rows = [
        {"question_id": 2 * image + n, "image": f"{image}.png", "text": f"Is it {image} {n}?",
         "category": category, "label": label}
        for image in range(2)
        for n, (category, label) in enumerate([("colour", "yes"), ("number", "no")])
    ]  # fmt: skip
    write_lines(path, rows)


def write_answers(path: str, answers: str) -> None:
    said = {"y": "Yes.", "n": "No."}
    write_lines(path, [{"question_id": i, "text": said[a]} for i, a in enumerate(answers)])


@pytest.mark.parametrize("name", benchmark_names())
def test_every_figure_is_explained_and_every_explained_figure_exists(name: str) -> None:
    benchmark = load_benchmark(name)
    assert benchmark.name == name
    sums = np.ones(COLUMNS[name])
    computed = benchmark.compute(GROUPS[name])(sums)
    assert all(find_figure(benchmark.figures, figure).meaning for figure in computed)
    found = {find_figure(benchmark.figures, figure).key for figure in computed}
    declared = {figure.key for figure in benchmark.figures} - {OF_KIND}
    assert declared <= found


def test_figures_of_one_name_keep_the_meaning_of_their_benchmark() -> None:
    """POPE's recall is about questions, CHAIR's about captions."""
    pope, chair = (find_figure(load_benchmark(n).figures, "recall") for n in ("pope", "chair"))
    assert pope.meaning == "Objects there that are confirmed"
    assert chair.meaning == "Objects of the image that the caption names"
    assert find_figure(load_benchmark("pope").figures, "random/strict_recall") == pope


def test_a_figure_of_one_group_can_have_a_meaning_of_its_own() -> None:
    told, asked = (
        Figure(key=key, title=key, meaning=meaning, better=1)
        for key, meaning in (("told/recall", "objects told"), ("recall", "yes answers found"))
    )
    assert find_figure([told, asked], "told/recall") is told
    assert find_figure([told, asked], "segments_6_15/told/recall") is told
    assert find_figure([told, asked], "asked/colour/recall") is asked
    assert find_figure([told, asked], "asked/strict_recall") is asked
    assert find_figure([told, asked], "other").meaning == ""


def test_the_embedded_world_and_answer_files_have_one_pope() -> None:
    """Of 7 questions 4 with yes as the answer; 3 said, 2 of them rightly: 4/7, 2/3, 1/2, 4/7."""
    said = [True, True, False, False, True, False, False]
    labels = [True, True, True, True, False, False, False]
    questions = [
        YesNoQuestion(where="q", id=str(i), image="0.png", text=f"Is it {i}?", label=label)
        for i, label in enumerate(labels)
    ]
    answers = [
        AnswerRow(where="a", id=str(i), text="Yes" if yes else "No") for i, yes in enumerate(said)
    ]
    scored = score_pope({"random": questions}, {"random": answers}).metrics()
    metrics = pope_metrics(said, labels)
    assert (metrics.accuracy, metrics.precision, metrics.recall) == (4 / 7, 2 / 3, 1 / 2)
    assert metrics.f1 == pytest.approx(4 / 7)
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert scored[name] == getattr(metrics, name)


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="'nope': unknown; known: pope, chair"):
        load_benchmark("nope")


def test_a_benchmark_named_unlike_its_module_is_refused(run: Run) -> None:
    Path("categories.py").write_text(CATEGORIES.replace('name="categories"', 'name="other"'))
    with pytest.raises(DataError, match="named 'other'; name it 'categories'"):
        load_benchmark("categories")


def test_the_list_names_every_benchmark_with_what_it_needs(run: Run) -> None:
    code, out, _ = run("--list", "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found) == [
        "pope", "chair", "amber", "hallusion", "object-halbench", "faithscore", "dcscore",
        "mmhal", "llava-bench", "categories", "manners",
    ]  # fmt: skip
    assert found["pope"]["asks"] == []
    assert found["faithscore"]["asks"] == ["judge", "verifier"]
    assert found["chair"]["truth"].startswith("--annotations")
    assert found["manners"]["figures"] == {"polite": "Polite answers"}
    code, out, _ = run("--list")
    assert code == 0
    for name in found:
        assert f"\n{name}: " in f"\n{out}"
    assert "manners" in run("--help")[1]


def test_a_benchmark_of_one_module_is_scored_kept_compared_and_explained(run: Run) -> None:
    """Answers y n y y: all of colour, half of number, 3 of 4, one image of two."""
    write_questions("q.jsonl")
    for name, answers in (("a", "ynyy"), ("b", "ynyn")):
        write_answers(f"{name}.jsonl", answers)
        code, out, err = run(
            "categories", "--questions", "q.jsonl", "--answers", f"{name}.jsonl", "--json",
            "--out", f"out_{name}",
        )  # fmt: skip
        assert code == 0, err
    assert json.loads(out)["accuracy"] == 1
    tree = json.loads(Path("out_a/categories.json").read_text())
    assert (tree["accuracy"], tree["pairs"]) == (0.75, 0.5)
    assert (tree["colour"], tree["number"]) == ({"accuracy": 1.0}, {"accuracy": 0.5})
    assert tree["intervals"]["accuracy"] == [0.5, 1.0]
    assert (tree["items"], tree["units"]) == (2, 2)
    assert "Images with both answers right" in Path("out_a/results.html").read_text()
    code, out, err = run("--compare", "out_a", "out_b", "--json")
    assert code == 0, err
    assert json.loads(out)["benchmarks"]["categories"]["figures"]["pairs"]["difference"] == 0.5
    code, out, _ = run("categories", "--questions", "q.jsonl", "--limit", "0")
    assert code == 2


def test_a_benchmark_of_one_module_takes_part_in_all(run: Run) -> None:
    from PIL import Image

    write_questions("categories.jsonl")
    for image in range(2):
        Image.new("RGB", (40, 40), "red").save(f"{image}.png")
    call = ("all", "--data", ".", "--model", "scenes:policy", "--images", ".", "--out", "o")
    code, out, err = run(*call, "--dry-run")
    assert code == 0, err
    assert "categories: 4 items" in out
    assert "4 answers to generate" in out
    assert "pope: left out" in err


def test_a_benchmark_of_one_module_asks_its_judge(run: Run) -> None:
    """Three captions, one reply of which cannot be read: of the other two one is polite."""
    texts = ["A fine cat.", "An ugly cat.", "A strange cat."]
    write_lines("c.jsonl", [{"image_id": i, "caption": text} for i, text in enumerate(texts)])
    code, _, err = run("manners", "--answers", "c.jsonl")
    assert (code, "--judge" in err) == (2, True)
    code, _, err = run("manners")
    assert (code, "Missing option" in err) == (2, True)

    def reply(body: Json) -> str:
        text = str(body["messages"])
        return "polite" if "fine" in text else "rude" if "ugly" in text else "what?"

    with FaultServer(reply) as server:
        judge = ("--judge-model", "j", "--judge-url", server.base_url)
        code, out, err = run("manners", "--answers", "c.jsonl", *judge, "--json")
        plan = run("manners", "--answers", "c.jsonl", *judge, "--dry-run")[1]
    tree = json.loads(out)
    assert (code, tree["polite"], tree["items"]) == (0, 0.5, 2), err
    assert tree["counts"]["judge_unreadable"] == 1
    assert tree["segments_6_15/items"] == 0
    assert "3 requests" in " ".join(plan.split())
    assert "politeness has no price" in plan
