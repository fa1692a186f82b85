"""Expected values: a result's set-up held against the table, and the table against the page."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import eval_command

from cluster.evaluation.run import shared_prompt
from fgaif.eval.benchmarks import load_benchmark
from fgaif.eval.expected import check_setup, image_list_digest, load_expected
from fgaif.eval.figures import find_figure
from fgaif.types import Json

__all__ = ["eval_command"]
Run = Callable[..., tuple[int, str, str]]
PAGE = Path(__file__).parents[1] / "docs" / "expected.md"
OFFICIAL = Path(__file__).resolve().parents[2] / "shared" / "data"
SUFFIX = "\nAnswer the question using a single word or phrase."


def result(folder: Path, **provenance: str) -> Path:
    tree: Json = {
        "random": {"f1": 0.8}, "intervals": {}, "items": 8910,
        "counts": {"questions_without_answer": 3}, "warnings": ["Hm."],
        "provenance": {"questions random": "c16b65d2df6d70bb", **provenance},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "pope.json").write_text(json.dumps(tree))
    return folder


def test_what_differs_is_named_and_what_is_not_said(tmp_path: Path) -> None:
    folder = result(
        tmp_path / "a", images="500 0000", asked=SUFFIX, max_new_tokens="64", decoding="greedy"
    )
    found = check_setup(folder)["pope"]
    verdicts = {check["what"]: check["verdict"] for check in found["checks"]}
    assert verdicts == {
        "questions random": "same", "questions popular": "not known",
        "questions adversarial": "not known", "images": "differs", "items": "same",
        "prompt": "same", "length limit": "same", "decoding": "same",
    }  # fmt: skip
    assert found["remarks"] == ["3 questions without answer", "Hm."]
    figures = found["published"][0]["figures"]
    assert figures["random/f1"] == {"published": 0.873, "here": 0.8}
    assert figures["popular/f1"]["here"] is None


def test_the_command_prints_lines_or_json(run: Run, tmp_path: Path) -> None:
    folder = result(tmp_path / "a", judge="gpt")
    code, out, err = run("--check-setup", folder)
    assert code == 0, err
    assert "questions random: same\n" in out
    assert "prompt: not known (here 'not said'" in out
    assert "LLaVA-1.5-7B: random/f1 0.873 (0.8), popular/f1 0.861 (–)" in out
    assert "judge: not known (here 'gpt', expected that of the figures you compare with)" in out
    code, out, _ = run("--check-setup", folder, "--json")
    assert (code, json.loads(out)) == (0, check_setup(folder))
    code, _, err = run("--check-setup", tmp_path)
    assert (code, "no results" in err) == (2, True)
    code, _, err = run("--check-setup", folder, "pope", "--questions", "q")
    assert (code, "--compare stands alone, as do --check-setup, --plots" in err) == (2, True)


def test_lists_of_images_are_told_apart_whatever_names_they_go_by() -> None:
    one = image_list_digest(["COCO_val2014_000000000042.jpg", "a/7.png", "42", ""])
    assert one == image_list_digest(["7.png", "000000000042"])
    assert one.startswith("2 ")
    assert one != image_list_digest(["7.png", "43"])


def test_the_prompt_of_many_questions_is_what_they_share() -> None:
    assert shared_prompt(["Describe.", "Describe."]) == "Describe."
    assert shared_prompt([f"Is {i} in the image?{SUFFIX}" for i in "ab"]) == SUFFIX
    assert shared_prompt(["Is it a?", "Is it b?"]) == ""
    assert shared_prompt([]) == ""


@pytest.mark.parametrize("name", list(load_expected()))
def test_published_figures_are_figures_of_the_benchmark_and_stand_on_the_page(name: str) -> None:
    benchmark, page = load_benchmark(name), PAGE.read_text()
    entry = load_expected()[name]
    digests = [digest for known in entry.get("files", {}).values() for digest in known]
    for text in (*digests, *entry.get("images", {})):
        assert text.rpartition(" ")[2] in page
    for row in entry["published"]:
        assert row["source"]
        assert row["model"] in page
        for key, value in row["figures"].items():
            figure = find_figure(benchmark.figures, key)
            assert figure.meaning
            shown = f"{100 * value:.1f}" if figure.share else f"{value:g}"
            assert shown in page, (row["model"], key)


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official files are not there")
def test_the_digests_are_those_of_the_official_files() -> None:
    table = load_expected()
    named = {
        "pope": {f"questions {s}": f"coco_pope_{s}.jsonl" for s in ("random", "popular")},
        "chair": {"synonyms": "chair_synonyms.txt"},
        "amber": {"annotations": "amber/annotations.json", "relation": "amber/relation.json"},
        "hallusion": {"questions": "hallusion/HallusionBench.json"},
        "llava-bench": {"questions": "qa90_questions.jsonl", "rules": "rule.json"},
    }
    for benchmark, paths in named.items():
        for key, path in paths.items():
            digest = hashlib.sha256((OFFICIAL / path).read_bytes()).hexdigest()[:16]
            assert table[benchmark]["files"][key] == [digest]
