"""Results on disk and as tables: nothing lost on the way, nothing escaped from the page."""

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fgaif.errors import DataError
from fgaif.eval.answers import AnswerRow, Caption
from fgaif.eval.benchmark_results import (
    benchmarks_in,
    comparison_json,
    read_scored,
    result_json,
    with_length_figures,
    worst_items,
    write_scored,
)
from fgaif.eval.benchmarks.chair import score_chair
from fgaif.eval.benchmarks.pope import score_pope
from fgaif.eval.scored import Scored
from fgaif.eval.tables import (
    comparison_table,
    for_console,
    markdown,
    render_page,
    results_table,
    show_items,
)
from fgaif.eval.uncertainty import compare, intervals
from fgaif.eval.vocabulary import Vocabulary
from fgaif.eval.yes_no import YesNoQuestion


def pope(answers: str, splits: tuple[str, ...] = ("random",)) -> Scored:
    """Two questions per image, the first of which has the answer yes; "y" and "n" answer them."""
    rows = [
        YesNoQuestion(
            where="q", id=str(i), image=f"{i // 2}.png", text=f"Is {i}?", label=i % 2 == 0
        )
        for i in range(len(answers))
    ]
    given = [
        AnswerRow(where="a", id=str(i), text="yes" if c == "y" else "No")
        for i, c in enumerate(answers)
    ]
    return score_pope(dict.fromkeys(splits, rows), dict.fromkeys(splits, given))


def chair(text: str = "There is a dog on a small red sofa.") -> Scored:
    captions = [Caption(where="c", id="1", image="1", text=text)]
    return score_chair(captions, {"1": {"cat"}}, Vocabulary.from_nouns(["dog", "cat"]))


def printed(table: object) -> str:
    stream = StringIO()
    Console(file=stream, width=80).print(for_console(table))  # type: ignore[arg-type]
    return stream.getvalue()


def page(scored: Scored, images: Path | None = None) -> str:
    table = results_table("R", [(scored, intervals(scored, resamples=20))])
    return render_page("A <title>", [table], {"Worst": show_items(scored, images)})


@pytest.mark.parametrize("scored", [pope("ynyy", ("random", "popular")), chair()])
def test_a_result_comes_back_as_it_was(tmp_path: Path, scored: Scored) -> None:
    path = write_scored(
        tmp_path, scored, intervals(with_length_figures(scored), resamples=20), seed=3
    )
    back = read_scored(tmp_path, scored.benchmark)
    assert benchmarks_in(tmp_path) == [scored.benchmark]
    assert (back.ids, back.units, back.items) == (scored.ids, scored.units, scored.items)
    assert (back.counts, back.provenance, back.groups) == (
        scored.counts, scored.provenance, scored.groups,
    )  # fmt: skip
    assert back.metrics() == pytest.approx(scored.metrics())
    assert np.array_equal(back.stats, scored.stats)
    tree = json.loads(path.read_text())
    assert (tree["seed"], tree["items"]) == (3, len(scored.ids))


def test_the_object_has_every_figure_by_name_and_null_for_what_is_not_known() -> None:
    scored = with_length_figures(chair("Nothing."))
    tree = result_json(scored, intervals(scored, resamples=20))
    assert tree["chair_s"] == 0
    assert tree["chair_i"] is None
    assert tree["segments_6_15/items"] == 0
    assert tree["intervals"]["chair_i"] == [None, None]
    assert tree["units"] == 1
    json.dumps(tree, allow_nan=False)


def test_only_descriptions_have_figures_by_length() -> None:
    assert with_length_figures(pope("yn")).metrics() == pope("yn").metrics()


@pytest.mark.parametrize("spoil", ["items", "figures", "json", "missing"])
def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, spoil: str) -> None:
    scored = pope("ynyn")
    path = write_scored(tmp_path, scored, intervals(scored, resamples=20))
    items = tmp_path / "pope_items.jsonl"
    if spoil == "items":
        items.write_text("".join(items.read_text().splitlines(keepends=True)[:-1]))
    elif spoil == "figures":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": 0.5}))
    elif spoil == "json":
        path.write_text("{")
    else:
        items.unlink()
    with pytest.raises(DataError, match=r"pope\.json.*score again"):
        read_scored(tmp_path, "pope")


def test_an_empty_folder_names_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pope\.json.*--out"):
        benchmarks_in(tmp_path)


def test_the_worst_come_first_one_per_image_and_none_that_went_well() -> None:
    scored = pope("nyynyy")  # image 0: two wrong answers, image 1: none, image 2: one
    assert [item["id"] for item in worst_items(scored, 5)] == ["random/0", "random/5"]
    assert [item["id"] for item in worst_items(scored, 1)] == ["random/0"]
    assert worst_items(replace(scored, badness=None), 5) == []


def test_one_split_and_a_rule_without_effect_are_not_printed_twice() -> None:
    scored = pope("yyyn")
    found = intervals(scored, resamples=20)
    text = printed(results_table("R", [(scored, found)]))
    assert text.count("accuracy") == 1
    assert "75.0 %" in text
    two = pope("yyyn", ("random", "popular"))
    assert printed(results_table("R", [(two, intervals(two, resamples=20))])).count("accuracy") == 3


def test_a_rule_with_effect_is_printed() -> None:
    rows = [YesNoQuestion(where="q", id="0", image="0.png", text="Is it?", label=True)]
    scored = score_pope({"r": rows}, {"r": [AnswerRow(where="a", id="0", text="Sure.")]})
    text = printed(results_table("R", [(scored, intervals(scored, resamples=20))]))
    assert "accuracy, strict" in text


def test_a_comparison_says_better_only_if_the_corrected_test_does() -> None:
    better = compare(pope("ny" * 12), pope("yn" * 12), resamples=50, permutations=500)
    same = compare(pope("yn" * 12), pope("yn" * 11 + "nn"), resamples=50, permutations=500)
    verdicts = {line.title: line.verdict for line in comparison_table("C", [better]).lines}
    assert verdicts["accuracy"] == "better"
    assert not any(line.verdict for line in comparison_table("C", [same]).lines)
    tree = comparison_json(better)
    assert tree["figures"]["accuracy"]["difference"] == 1.0
    assert tree["common"] == 24
    json.dumps(tree, allow_nan=False)


def test_tables_fit_into_80_columns_and_notes_say_what_differs() -> None:
    a = replace(pope("yn" * 9), provenance={"questions": "x"})
    b = replace(pope("ny" * 9), provenance={"questions": "y"})
    text = printed(comparison_table("C", [compare(a, b, resamples=20, permutations=99)]))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "p (Holm)" in text
    assert "beware: pope: questions differs: x and y" in text


def test_markdown_is_one_table_whose_cells_cannot_break_it() -> None:
    scored = replace(pope("yn"), provenance={"model": "a|b"})
    text = markdown(results_table("R", [(scored, intervals(scored, resamples=20))]))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {5}
    assert "| pope | accuracy | 100.0 % |" in text


def test_the_page_stands_alone_and_shows_the_worst_items(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (900, 600), "red").save(tmp_path / "deep" / "0.png")
    rows = [YesNoQuestion(where="q", id="0", image="0.png", text="<script>?", label=True)]
    scored = score_pope({"random": rows}, {"random": [AnswerRow(where="a", id="0", text="no <b>")]})
    html = page(scored, tmp_path)
    assert html.count("data:image/") == 1
    assert len(html) < 60_000  # the image was shrunk
    assert "<script" not in html
    assert "no &lt;b&gt;" in html
    assert "A &lt;title&gt;" in html
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", html)
    assert html.count('class="bar"') == len(results_table("", [(scored, intervals(scored))]).lines)


def test_an_image_that_is_not_there_is_named() -> None:
    assert "image not shown: 0.png: not found" in page(pope("nn"))
