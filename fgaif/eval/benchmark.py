"""What a benchmark declares, what it is given, and what it hands back.

A benchmark is one module in ``fgaif/eval/benchmarks/`` with a ``BENCHMARK`` in it, and a line in
that package's list. Everything else is made from the declaration: the command ``fgaif eval NAME``,
its place in ``fgaif eval all`` and ``--list``, generation, judging, intervals, tables, result files
and comparisons.
"""

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from fgaif.chat.messages import ChatModel
from fgaif.errors import ConfigError
from fgaif.eval.figures import Figure
from fgaif.eval.judge import Progress
from fgaif.eval.questions import QuestionBuilder, QuestionSet
from fgaif.eval.scored import FigureFunction, Scored
from fgaif.kinds import KindConfig

if TYPE_CHECKING:
    from fgaif.config import EndpointConfig  # not loaded to score answers that exist

Options = TypeVar("Options")
ModelRole = Literal["judge", "verifier"]
"""A model that a benchmark asks: a judge over an API, or a checkpoint that verifies facts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judges:
    """The opened models that a benchmark asks: the judge, and the verifier if it is another."""

    judge: ChatModel | None = None
    verifier: ChatModel | None = None

    @property
    def needed_judge(self) -> ChatModel:
        """The judge of a benchmark that cannot do without; opened beforehand."""
        assert self.judge is not None, "a judged benchmark runs with a judge"
        return self.judge


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalContext:
    """What one call of ``fgaif eval`` gives to each of its benchmarks.

    ``builder`` makes the questions for ``--model``, and is None where answers exist. ``judge`` are
    the settings of the judge, ``verifier`` is a local checkpoint's name. ``seed`` is for drawing;
    ``min_words`` is that of the splitting into sub-sentences, ``kinds`` those of facts.
    """

    builder: QuestionBuilder | None = None
    images: Path | None = None
    judge: "EndpointConfig | None" = None
    verifier: str | None = None
    seed: int = 0
    min_words: int = 5
    kinds: tuple[KindConfig, ...] = KindConfig.default()

    def builder_unless(self, answers: object) -> QuestionBuilder | None:
        """Return the builder; ``answers`` are the option's values that name existing answers.

        Raises:
            ConfigError: there are both, a model and answers.
        """
        if self.builder is not None and answers:
            raise ConfigError(
                f"--model generates answers, and there are some already ({answers}); give one of "
                "the two"
            )
        return self.builder


Score = Callable[[Judges, Progress], Coroutine[None, None, Scored]]
"""Scores the answers, asking the models where the benchmark has some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedBenchmark:
    """A benchmark whose options and questions have been read: what is left is to answer and score.

    ``questions`` are put to the model first, if there are any. ``files`` are named in the
    provenance with their digests; answer files may not exist yet. ``judged`` says that it needs the
    judge, ``items`` how many answers it scores (0: not known), ``cost_note`` what a dry run cannot
    count of the judge's cost.
    """

    benchmark: str
    score: Score
    judged: bool = False
    questions: tuple[QuestionSet, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    items: int = 0
    cost_note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark(Generic[Options]):
    """The declaration of a benchmark.

    ``name`` is its command and its result files, ``title`` and ``summary`` say what it is.
    ``answers`` and ``truth`` say, for people, where answers that exist and the ground truth come
    from; ``models`` which models it may ask. ``options`` is the dataclass of its own options, each
    field annotated for typer; ``prepare`` reads the files that they name. ``figures`` explain the
    numbers; ``compute`` makes, for the groups of a result (splits, question types, ...), the
    function from sums to numbers. ``descriptions``: answers are free descriptions (``answer`` of
    each item), which get figures by their number of sub-sentences as well. ``nested``: the object
    with the figures holds those of a group, ``GROUP/NAME``, in an object ``GROUP`` of its own.

    ``coverage`` names, beside each figure of errors, those that say how much was said: recall,
    facts or objects, length. Errors can become fewer because less is said; ``--compare`` says so.

    ``official`` prepares the benchmark from a folder of official files, with a number of images
    where it draws some; or it returns the path of the first file that is not there. Without it
    ``fgaif eval all`` leaves the benchmark out.
    """

    name: str
    title: str
    summary: str
    answers: str
    truth: str
    options: type[Options]
    prepare: Callable[[Options, EvalContext], PreparedBenchmark]
    figures: tuple[Figure, ...]
    compute: Callable[[tuple[str, ...]], FigureFunction]
    models: tuple[ModelRole, ...] = ()
    descriptions: bool = False
    nested: bool = False
    coverage: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    official: Callable[[Path, EvalContext, int], PreparedBenchmark | Path] | None = None


def needed(path: Path | None, benchmark: str, option: str) -> Path:
    """Return a file that must have been named.

    Raises:
        ConfigError: it was not.
    """
    if path is None:
        raise ConfigError(f"fgaif eval {benchmark} needs {option}")
    return path
