"""The benchmarks of ``fgaif eval``, one module each; to add one, write its module and list it."""

from importlib import import_module
from typing import Any

from fgaif.errors import DataError
from fgaif.eval.benchmark import Benchmark

MODULES = [
    "fgaif.eval.benchmarks.pope",
    "fgaif.eval.benchmarks.chair",
    "fgaif.eval.benchmarks.amber",
    "fgaif.eval.benchmarks.hallusion",
    "fgaif.eval.benchmarks.object_halbench",
    "fgaif.eval.benchmarks.faithscore",
    "fgaif.eval.benchmarks.dcscore",
    "fgaif.eval.benchmarks.mmhal",
    "fgaif.eval.benchmarks.llava_bench",
]
"""In the order in which they run and are shown. A module holds ``BENCHMARK``, whose name is the
module's own with hyphens; it is imported when it is asked for."""


def benchmark_names() -> list[str]:
    """Return the names of all benchmarks, without importing one."""
    return [module.rpartition(".")[2].replace("_", "-") for module in MODULES]


def load_benchmark(name: str) -> Benchmark[Any]:
    """Import a benchmark's declaration.

    Raises:
        DataError: there is none of this name, or the declaration has another one.
    """
    modules = dict(zip(benchmark_names(), MODULES, strict=True))
    if name not in modules:
        raise DataError(f"benchmark {name!r}: unknown; known: {', '.join(modules)}")
    benchmark: Benchmark[Any] = import_module(modules[name]).BENCHMARK
    if benchmark.name != name:
        raise DataError(
            f"{modules[name]}: its BENCHMARK is named {benchmark.name!r}; name it {name!r}, as the "
            "module, with hyphens"
        )
    return benchmark
