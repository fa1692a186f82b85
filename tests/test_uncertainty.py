"""Bootstrap intervals and paired tests: values that can be worked out by hand, and laws."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fgaif.errors import DataError
from fgaif.eval.scored import Scored, Stats
from fgaif.eval.uncertainty import Estimate, _weights, compare, holm, intervals, unit_sums


def figures(sums: Stats) -> Mapping[str, Stats]:
    """Columns: right answers, answers, right yes answers, yes answers."""
    right, asked, hits, said = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"accuracy": right / asked, "precision": hits / said}


def scored(rows: Sequence[Sequence[float]], units: Sequence[str] | None = None) -> Scored:
    ids = tuple(f"q{i}" for i in range(len(rows)))
    return Scored(
        benchmark="pope",
        ids=ids,
        units=tuple(units) if units else ids,
        stats=np.array(rows, dtype=np.float64),
        figures=figures,
    )


def answers(right: Sequence[int], units: Sequence[str] | None = None) -> Scored:
    return scored([[r, 1, r, 1] for r in right], units)


def width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def test_units_add_up_their_items_in_order_of_appearance() -> None:
    sums = unit_sums(["b", "a", "b"], np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert sums.tolist() == [[6.0, 8.0], [3.0, 4.0]]


def test_weights_of_a_resample_sum_to_the_units_and_blocks_to_the_resamples() -> None:
    blocks = list(_weights(300_000, 20, seed=1))  # seven rows fit into a block
    assert [len(block) for block in blocks] == [6, 6, 6, 2]
    assert all((block.sum(axis=1) == 300_000).all() for block in blocks)


def test_the_interval_is_that_of_the_binomial() -> None:
    """400 independent answers, 300 right: 0.75 +- 1.96 sqrt(0.75 * 0.25 / 400) = +- 0.0424."""
    found = intervals(answers([1] * 300 + [0] * 100))["accuracy"]
    assert found.value == 0.75
    assert found.low == pytest.approx(0.7076, abs=0.006)
    assert found.high == pytest.approx(0.7924, abs=0.006)


def test_answers_that_err_together_make_the_interval_wider() -> None:
    """Four copies of each answer in one unit carry the information of one: twice the width."""
    alone = intervals(answers([1] * 300 + [0] * 100))["accuracy"]
    units = [f"image{i // 4}" for i in range(400)]
    together = intervals(answers([1] * 300 + [0] * 100, units))["accuracy"]
    assert width(together) == pytest.approx(2 * width(alone), rel=0.15)


def test_a_figure_without_denominator_has_no_value_and_one_unit_no_interval() -> None:
    nothing = intervals(scored([[1, 1, 0, 0], [0, 1, 0, 0]]))["precision"]
    assert (nothing.value, nothing.low, nothing.high) == (None, None, None)
    single = intervals(answers([1, 0], ["one", "one"]))["accuracy"]
    assert (single.value, single.low, single.high) == (0.5, None, None)


def test_resamples_without_denominator_do_not_count() -> None:
    """One yes in ten answers: it is right, so precision is 1 wherever it is known."""
    found = intervals(scored([[1, 1, 1, 1]] + [[1, 1, 0, 0]] * 9))["precision"]
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_the_seed_decides() -> None:
    model = answers([1, 0, 1, 1, 0, 1, 1, 0])
    assert intervals(model, seed=3) == intervals(model, seed=3)
    noisy = answers(np.random.default_rng(0).integers(2, size=101).tolist())
    assert intervals(noisy, seed=3) != intervals(noisy, seed=4)


def test_the_sign_flip_test_tries_all_swaps_of_few_units() -> None:
    """Five units, B right where A is wrong: of the 32 swaps only two are as extreme, 2/32."""
    found = compare(answers([0] * 5), answers([1] * 5)).figures["accuracy"]
    assert (found.a, found.b, found.difference.value) == (0.0, 1.0, 1.0)
    assert found.p == 2 / 32
    assert (found.difference.low, found.difference.high) == (1.0, 1.0)


def test_items_of_a_unit_change_sides_together() -> None:
    """The same answers in two units: four swaps, two of them extreme."""
    units = ["x", "x", "x", "y", "y"]
    found = compare(answers([0] * 5, units), answers([1] * 5, units)).figures["accuracy"]
    assert found.p == 2 / 4


def test_equal_models_have_no_difference_and_p_one() -> None:
    model = answers(np.random.default_rng(0).integers(2, size=200).tolist())
    found = compare(model, model).figures["accuracy"]
    assert (found.difference.value, found.p, found.p_holm) == (0.0, 1.0, 1.0)


def test_random_swaps_agree_with_the_exact_test_of_mcnemar() -> None:
    """60 units, B better on 16 and worse on 4: binomial test of 4 in 20, two-sided p = 0.0118."""
    a = answers([0] * 16 + [1] * 4 + [1] * 40)
    b = answers([1] * 16 + [0] * 4 + [1] * 40)
    found = compare(a, b).figures["accuracy"]
    assert found.p == pytest.approx(0.0118, abs=0.004)
    assert found.difference.low is not None
    assert found.difference.low > 0


def test_p_values_are_uniform_when_nothing_differs() -> None:
    """100 pairs of equally good models: about 5 of the p-values are below 0.05."""
    rng = np.random.default_rng(7)
    small = 0
    for seed in range(100):
        a, b = (answers(rng.integers(2, size=80).tolist()) for _ in "ab")
        p = compare(a, b, resamples=2, permutations=400, seed=seed).figures["accuracy"].p
        assert p is not None
        small += p < 0.05
    assert 0 <= small <= 11


def test_models_are_compared_on_common_ids_and_the_others_counted() -> None:
    a = replace(answers([1, 0, 1]), ids=("x", "y", "z"), units=("x", "y", "z"))
    b = replace(answers([1, 1]), ids=("z", "x"), units=("z", "x"))
    found = compare(a, b)
    assert (found.common, found.only_a, found.only_b) == (2, 1, 0)
    assert found.figures["accuracy"].a == 1.0


def test_another_judge_is_a_warning_and_another_model_is_none() -> None:
    a = replace(answers([1, 0]), provenance={"model": "m1", "judge": "j1", "questions": "q"})
    b = replace(answers([1, 0]), provenance={"model": "m2", "judge": "j2", "questions": "q"})
    assert compare(a, b).warnings == ("pope: judge differs: j1 and j2",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"benchmark": "chair"}, "pope with chair"),
        ({"ids": ("u", "v"), "units": ("u", "v")}, "no item in common"),
        ({"units": ("one", "one")}, "q0.*belongs to"),
        ({"stats": np.ones((2, 5)), "figures": lambda sums: {"x": sums[..., 0]}}, "other figures"),
    ],
)
def test_results_that_do_not_match_are_refused(change: dict, words: str) -> None:
    model = answers([1, 0])
    with pytest.raises(DataError, match=words):
        compare(model, replace(model, **change))


def test_holm_multiplies_the_smallest_by_the_number_and_keeps_the_order() -> None:
    """Of 3: 0.01 * 3, 0.02 * 2 = 0.04, 0.03 * 1 raised to 0.04; None counts for nothing."""
    found = holm({"a": 0.02, "b": 0.01, "c": None, "d": 0.03})
    assert found == pytest.approx({"a": 0.04, "b": 0.03, "c": None, "d": 0.04})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    ordered = sorted(p for p in holm({str(i): i / 20 for i in range(20)}).values() if p is not None)
    assert all(x <= y for x, y in pairwise(ordered))
