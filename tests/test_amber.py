"""AMBER: both halves by the official rules, on small files of the official formats."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import eval_command
from PIL import Image

from fgaif.eval.amber_files import AmberAnswer, AmberRow, AmberWords
from fgaif.eval.amber_rules import describe_stats
from fgaif.eval.benchmarks.amber import score_amber
from fgaif.eval.nouns import nouns_among
from fgaif.types import Json

__all__ = ["eval_command"]
Run = Callable[..., tuple[int, str, str]]
OFFICIAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "amber"

ANNOTATIONS = [
    {"id": 1, "type": "generative", "truth": ["grass", "ground", "dog"], "hallu": ["sky", "bird"]},
    {"id": 2, "type": "generative", "truth": ["table"], "hallu": ["boat"]},
    {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 4, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 5, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 6, "type": "discriminative-attribute-state", "truth": "no"},
    {"id": 7, "type": "discriminative-attribute-number", "truth": "yes"},
    {"id": 8, "type": "discriminative-attribute-action", "truth": "no"},
    {"id": 9, "type": "discriminative-relation", "truth": "yes"},
    {"id": 10, "type": "relation", "truth": "no"},
]
RELATION = {
    "grass": ["ground", "lawn"], "ground": ["floor"], "dog": [], "sky": [], "bird": [],
    "table": ["desk"], "boat": ["canoe"], "ship": [], "cat": [], "camera": [],
}  # fmt: skip
QUERIES = [
    {"id": i, "image": f"AMBER_{1 + i % 2}.jpg", "query": f"Is it {i}?" if i > 2 else "Describe."}
    for i in range(1, 11)
]
WORDS = AmberWords(
    synonyms=RELATION,
    safe=frozenset({"camera"}),
    near=frozenset({frozenset({"ship", "boat"}), frozenset({"cat", "dog"})}),
)
DOG = AmberRow(truth=("grass", "ground", "dog"), hallu=("sky", "bird"))
TABLE = AmberRow(truth=("table",), hallu=("boat",))


def counts(text: str, row: AmberRow) -> list[float]:
    """Hallucinating, nouns, hallucinated, truth, covered, lures, named."""
    return describe_stats(text, row, WORDS)[0][1:-1]


@pytest.mark.parametrize(
    ("text", "row", "expected"),
    [
        # The synonym of an earlier object comes before the object itself: "ground" is the grass.
        ("A dog on the ground.", DOG, [0, 2, 0, 3, 2, 2, 0]),
        ("The floor.", DOG, [0, 1, 0, 3, 1, 2, 0]),
        ("Two birds and a boat.", DOG, [1, 2, 2, 3, 0, 2, 1]),
        # A camera is kept, and never hallucinated; a word of no object is not kept.
        ("A camera and a sofa.", TABLE, [0, 1, 0, 1, 0, 1, 0]),
        # Near a true object: no hallucination. Near a lure: named, and hallucinated.
        ("A cat.", DOG, [0, 1, 0, 3, 1, 2, 0]),
        ("A ship.", TABLE, [1, 1, 1, 1, 0, 1, 1]),
        ("", TABLE, [0, 0, 0, 1, 0, 1, 0]),
        # As in the script, a capital letter makes another word.
        ("Tables. Table.", TABLE, [0, 0, 0, 1, 0, 1, 0]),
    ],
)
def test_nouns_of_a_description(text: str, row: AmberRow, expected: list[float]) -> None:
    assert counts(text, row) == expected


def test_an_object_that_stands_twice_is_covered_once() -> None:
    """As in the script: the second of two equal objects is never covered."""
    twice = AmberRow(truth=("boat", "boat"), hallu=())
    assert counts("A boat and a boat.", twice) == [0, 2, 0, 2, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("The dog can be seen; a can of paint lies there.", ["can"]),
        ("An orange cat beside two oranges.", ["orange"]),
        ("People watch the boats, one wears a watch.", ["watch"]),
        ("They plan to train, next to trains.", ["train"]),
        ("He tries to ski on skis under the traffic light.", ["ski", "light"]),
        ("Leaves and leaves; a tie, a light brown table.", ["tie"]),
    ],
)
def test_words_that_can_be_more_than_nouns(text: str, nouns: list[str]) -> None:
    words = {"can", "orange", "watch", "train", "ski", "light", "leave", "tie"}
    assert nouns_among(text, words) == nouns


def write(path: Path, tree: object) -> Path:
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The benchmark's files; returns the annotations."""
    write(tmp_path / "relation.json", RELATION)
    (tmp_path / "safe_words.txt").write_text("camera\n")
    write(tmp_path / "query_all.json", QUERIES)
    return write(tmp_path / "annotations.json", ANNOTATIONS)


def responses(*answers: str, first: int = 3) -> list[Json]:
    return [{"id": first + i, "response": text} for i, text in enumerate(answers)]


def scored(run: Run, files: Path, answers: list[Json]) -> Json:
    given = write(files.parent / "answers.json", answers)
    code, out, err = run("amber", "--annotations", files, "--answers", given, "--json")
    assert code == 0, err
    tree: Json = json.loads(out)
    return tree


def test_no_is_the_positive_class(run: Run, files: Path) -> None:
    """Answers to 3..10 whose truth is no no yes no yes no yes no: said No thrice, rightly twice
    (3 and 6, not 7); "no" and "No." are no answers by the official rule, by the first word they
    are."""
    answers = responses("No", "Yes", "Yes", "No", "No", "no", "Yes", "No.")
    tree = scored(run, files, answers)
    found = tree["discriminative"]
    assert (found["accuracy"], found["precision"], found["recall"]) == (4 / 8, 2 / 3, 2 / 5)
    assert found["f1"] == pytest.approx(2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5))
    # 66.7 and 40.0 per cent: 2 * .667 * .4 / (.667 + .4 + .0001) = .50005
    assert found["official_f1"] == 0.5
    assert found["existence"]["precision"] == 1
    assert found["existence"]["recall"] == 1 / 2
    assert found["attribute"]["accuracy"] == 2 / 4
    assert found["attribute"]["state"]["f1"] == 1
    assert (
        found["attribute"]["number"] | {"recall": 0.0, "precision": 0.0}
        == (found["attribute"]["number"])
    )
    assert found["relation"] | {"accuracy": 1 / 2, "recall": 0.0} == found["relation"]
    assert found["lenient_recall"] == 4 / 5
    assert tree["generative"]["chair"] is None
    assert tree["counts"]["questions_without_answer"] == 2
    assert "rule disagree on 2 of 8 answers, as 'no'" in tree["warnings"][0]


def test_existence_gets_the_scripts_own_small_number(run: Run, files: Path) -> None:
    """Precision 100 and recall 50 per cent: 2 * .5 / (1.5 + .001) = .6662, 66.6 for 66.7."""
    tree = scored(run, files, responses("No", "Yes"))
    assert tree["discriminative"]["existence"]["f1"] == pytest.approx(2 / 3)
    assert tree["discriminative"]["existence"]["official_f1"] == 0.666


def test_descriptions_give_the_four_figures(run: Run, files: Path) -> None:
    """Kept: dog, ground, sky; cat and boat: 3 of 5 wrong (with no dog near, the cat is), 2 of 4
    objects covered, both descriptions hallucinate, 2 of 3 lures named."""
    answers = responses("A dog on the ground under the sky.", "A cat in a boat.", first=1)
    tree = scored(run, files, answers)
    assert tree["generative"] == {
        "chair": 3 / 5, "cover": 2 / 4, "hal": 1, "cog": 2 / 3, "objects": 2.5, "length": 6.5,
    }  # fmt: skip
    assert tree["discriminative"]["accuracy"] is None
    assert tree["discriminative"]["existence"]["f1"] is None
    assert (tree["amber_score"], tree["warnings"]) == (None, [])
    tree = scored(run, files, answers + responses("No", "No"))
    assert tree["amber_score"] == pytest.approx((1 - 3 / 5 + 1) / 2)
    assert tree["units"] == 2


def test_without_the_synonyms_file_it_is_said(run: Run, files: Path) -> None:
    (files.parent / "relation.json").unlink()
    tree = scored(run, files, responses("A dog on the ground.", "A desk.", first=1))
    assert "no relation.json beside the annotations" in tree["warnings"][-1]
    assert tree["generative"]["cover"] == 2 / 4


def test_answers_to_other_questions_are_said(run: Run, files: Path) -> None:
    rows = [row | {"query": "Is it 9?"} for row in responses("No", "No", "Yes")]
    tree = scored(run, files, rows)
    assert "3 of 3 answers are to other questions" in tree["warnings"][0]
    rows = [row | {"prompt": f"Is it {row['id']}?\nAnswer."} for row in responses("No", "No")]
    assert scored(run, files, rows)["warnings"] == []


def test_descriptions_that_say_nothing_or_speak_another_language_are_said() -> None:
    rows = {"1": DOG, "2": TABLE}
    silent = score_amber(rows, {i: AmberAnswer(text="Nice.") for i in rows}, WORDS)
    assert "none of 2 descriptions names an object" in silent.warnings[0]
    german = "Ein Hund steht auf einer Wiese und bellt laut."
    foreign = score_amber(rows, {i: AmberAnswer(text=german) for i in rows}, WORDS)
    assert "2 of 2 texts do not look English" in foreign.warnings[0]


def test_odd_files_are_refused_with_their_place(run: Run, files: Path) -> None:
    def refused(rows: list[Json]) -> str:
        given = write(files.parent / "answers.json", rows)
        code, _, err = run("amber", "--annotations", files, "--answers", given, "--json")
        assert code == 2
        return err

    assert "no id of the answers (99, ...) is annotated" in refused([{"id": 99, "response": "No"}])
    assert "item 2: another answer to 3 is there" in refused([*responses("No"), *responses("Yes")])
    assert "key `response`: 1: expected a text" in refused([{"id": 3, "response": 1}])
    assert "no key `id` or `question_id`" in refused([{"response": "No"}])
    tree = scored(run, files, [*responses("No"), *responses("No")])
    assert tree["items"] == 1
    files.write_text(json.dumps([{"id": 3, "type": "discriminative-relation", "truth": "maybe"}]))
    assert "key `truth`: 'maybe': expected yes or no" in refused(responses("No"))


def test_results_are_kept_and_compared(run: Run, files: Path) -> None:
    texts = {"a": ("A dog on grass.", "A table."), "b": ("A dog under the sky.", "A boat.")}
    for name, two in texts.items():
        given = write(files.parent / f"{name}.json", responses(*two, first=1))
        call = ("--annotations", files, "--answers", given, "--out", files.parent / name)
        code, _, err = run("amber", *call)
        assert code == 0, err
    tree = json.loads(run("--compare", files.parent / "a", files.parent / "b", "--json")[1])
    figures = tree["benchmarks"]["amber"]["figures"]
    assert figures["generative/chair"]["difference"] == 2 / 3
    assert "Objects of the image that are named" in (files.parent / "a/results.html").read_text()


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official files are not there")
def test_the_official_files(run: Run, tmp_path: Path) -> None:
    """14,216 answers, all No: recall 1, and precision and accuracy the share of 9,427 questions."""
    rows = [{"id": i, "response": "No"} for i in range(1005, 15221)]
    given = write(tmp_path / "answers.json", rows)
    code, out, err = run(
        "amber", "--annotations", OFFICIAL / "annotations.json", "--answers", given, "--json"
    )
    found = json.loads(out)["discriminative"]
    assert (code, err) == (0, "")
    assert (found["accuracy"], found["precision"], found["recall"]) == (
        9427 / 14216, 9427 / 14216, 1,
    )  # fmt: skip
    assert (found["existence"]["accuracy"], found["attribute"]["accuracy"]) == (1, 0.5)
    assert found["relation"]["accuracy"] == 689 / 1664


def test_a_model_is_asked_both_halves(run: Run, files: Path) -> None:
    for name, colour in (("AMBER_1.jpg", "red"), ("AMBER_2.jpg", "blue")):
        Image.new("RGB", (40, 40), colour).save(files.parent / name)
    call = ("amber", "--annotations", files, "--model", "scenes:policy", "--dry-run")
    code, out, err = run(*call, "--images", files.parent, "--out", "o")
    assert code == 0, err
    assert "amber: 10 items" in out
    assert "10 answers to generate" in out
    assert "amber_discriminative_answers.jsonl (to be written)" in " ".join(out.split())
    (files.parent / "query_all.json").unlink()
    code, _, err = run(*call, "--images", files.parent, "--out", "o")
    assert (code, "needs --queries" in err) == (2, True)
