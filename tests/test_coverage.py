"""Fewer errors bought with what is left unsaid: said where two results are compared."""

import json
from collections.abc import Callable
from pathlib import Path

from cli_calls import eval_command

from fgaif.eval.benchmarks import benchmark_names, load_benchmark
from fgaif.eval.coverage import bought_with_coverage
from fgaif.eval.uncertainty import Comparison, Difference, Estimate
from fgaif.types import Json

__all__ = ["eval_command"]
Run = Callable[..., tuple[int, str, str]]


def difference(a: float, b: float, p: float = 0.001) -> Difference:
    spread = Estimate(value=b - a, low=b - a, high=b - a)
    return Difference(a=a, b=b, difference=spread, p=p, p_holm=p)


def said(**figures: Difference) -> list[str]:
    """CHAIR's sentence; what is not given is equal in both."""
    same = dict.fromkeys(
        ("chair_i", "chair_s", "recall", "objects", "length"), difference(1, 1, 1.0)
    )
    return bought_with_coverage(
        Comparison(benchmark="chair", common=9, only_a=0, only_b=0, figures=same | figures)
    )


def test_a_gain_with_less_recall_is_called_bought() -> None:
    """With a corrected p of .05 or more neither the gain nor a loss below a tenth is spoken of."""
    gain = difference(0.2, 0.1)
    [sentence] = said(chair_i=gain, recall=difference(0.6, 0.59))
    assert sentence.startswith("chair: B has the better CHAIR_i 20.0 % to 10.0 %, and says less:")
    assert said(chair_i=gain, recall=difference(0.6, 0.59, p=0.05)) == []
    assert said(chair_i=difference(0.2, 0.1, p=0.05), recall=difference(0.6, 0.3)) == []
    assert said(chair_i=gain, recall=difference(0.6, 0.61)) == []
    assert (
        "objects 9.00 to 8.00, length 90.00 to 50.00 (A to B)"
        in said(chair_i=gain, objects=difference(9, 8, p=0.5), length=difference(90, 50))[0]
    )


def test_it_is_said_of_the_first_model_too() -> None:
    [sentence] = said(
        chair_i=difference(0.1, 0.2), chair_s=difference(0.3, 0.5), recall=difference(0.5, 0.6)
    )
    assert "A has the better CHAIR_i 10.0 % to 20.0 % and CHAIR_s 30.0 % to 50.0 %" in sentence
    assert "and says less: recall 50.0 % to 60.0 % (A to B)" in sentence


def test_every_benchmark_names_figures_that_it_has() -> None:
    for name in benchmark_names():
        benchmark = load_benchmark(name)
        known = {figure.key for figure in benchmark.figures}
        for figure, beside in benchmark.coverage.items():
            assert {figure.rpartition("/")[2], *(b.rpartition("/")[2] for b in beside)} <= known


def test_compare_says_it_in_json_and_tables(run: Run) -> None:
    """Of ten images A names two objects and one wrong one each, B only one that is there."""
    names = ["person", "dog", "cat"]
    tree: Json = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(10)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i, "category_id": c} for i in range(10) for c in (0, 1)],
    }
    Path("instances.json").write_text(json.dumps(tree))
    for name, text in (("a", "A man, a dog and a cat."), ("b", "A man.")):
        rows = [{"image_id": i, "caption": text} for i in range(10)]
        Path(f"{name}.json").write_text(json.dumps(rows))
        code, _, err = run(
            "chair", "--annotations", "instances.json", "--captions", f"{name}.json", "--out", name
        )
        assert code == 0, err
    out = run("--compare", "a", "b", "--json", "--out", "ab")[1]
    [warning] = json.loads(out)["benchmarks"]["chair"]["warnings"]
    assert "B has the better CHAIR_i 33.3 % to 0.0 %" in warning
    assert "and says less: recall 100.0 % to 50.0 %" in warning
    assert f"beware: {warning}" in Path("ab/comparison.md").read_text()
