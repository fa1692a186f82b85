"""Errors can become fewer because less is said: what a better figure of errors was bought with."""

from collections.abc import Iterator

from fgaif.eval.benchmarks import load_benchmark
from fgaif.eval.figures import Figure, find_figure, title_of
from fgaif.eval.uncertainty import Comparison, Difference

SIGNIFICANT = 0.05
"""Corrected p-value below which a difference is spoken of."""
_LESS = 0.1


def bought_with_coverage(comparison: Comparison) -> list[str]:
    """Say where the model with fewer errors also says less.

    The benchmark declares which figures say how much is said beside each figure of errors
    (``Benchmark.coverage``). Fewer errors count if the corrected p-value is below .05; less is said
    if that figure's is as well, or if it is lower by a tenth or more.
    """
    benchmark = load_benchmark(comparison.benchmark)
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, beside in benchmark.coverage.items():
        figure = find_figure(benchmark.figures, name)
        difference = comparison.figures[name]
        gain = _gain(figure, difference)
        if not gain or difference.p_holm is None or difference.p_holm >= SIGNIFICANT:
            continue
        costs = tuple(_costs(comparison, benchmark.figures, beside, gain))
        if costs:
            better = "B" if gain > 0 else "A"
            found.setdefault((better, costs), []).append(_told(figure, name, difference))
    return [
        f"{comparison.benchmark}: {better} has the better {' and '.join(figures)}, and says less: "
        f"{', '.join(costs)} (A to B); part of the gain may be bought with what is left unsaid"
        for (better, costs), figures in found.items()
    ]


def _gain(figure: Figure, difference: Difference) -> float:
    """Above 0 where B is better, below where A is."""
    return (difference.difference.value or 0.0) * figure.better


def _costs(
    comparison: Comparison, figures: tuple[Figure, ...], beside: tuple[str, ...], gain: float
) -> Iterator[str]:
    for name in beside:
        difference = comparison.figures[name]
        value, a, b = difference.difference.value, difference.a, difference.b
        if value is None or a is None or b is None or value * gain >= 0:
            continue
        sure = difference.p_holm is not None and difference.p_holm < SIGNIFICANT
        if sure or abs(value) >= _LESS * max(a, b):
            yield _told(find_figure(figures, name), name, difference)


def _told(figure: Figure, name: str, difference: Difference) -> str:
    return f"{title_of(figure, name)} {figure.show(difference.a)} to {figure.show(difference.b)}"
