"""What an audit says of the feedback: against people or the oracle, and of two verifiers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Literal

from rich.table import Table
from rich.text import Text

from fgaif.feedback.audit import AuditItem, audit_item
from fgaif.feedback.intervals import Estimate, cohen_kappa, weighted_share
from fgaif.feedback.labels import Oracle, class_balance, distinct_facts
from fgaif.types import Answer, Json, Kind, LabeledResponse

ALL = "all"
"""The row of all kinds together."""

_FAILING = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KindAudit:
    """Verdicts of one kind against the truth; a hallucinated (false) fact is the positive class.

    ``accuracy``: right verdicts; ``precision``: of the facts judged false, those that are;
    ``recall``: of the false facts, those judged so. Shares are of all facts (weights), counts of
    the facts checked: ``missed`` false ones judged true, ``false_alarms`` true ones judged false.
    Facts of one image err together, which the intervals do not know.
    """

    judged: int
    missed: int
    false_alarms: int
    accuracy: Estimate | None
    precision: Estimate | None
    recall: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Two verifiers on the same distinct facts: ``observed`` agreement and Cohen's kappa.

    ``facts`` were decided by both, ``undecided`` not by both. Kappa is None where it has no value,
    as when both gave one and the same answer to everything.
    """

    first: str
    second: str
    facts: int
    undecided: int
    observed: Estimate | None
    kappa: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailingFact:
    """A statement judged false on ``images`` images, of ``stated`` on which it was made."""

    kind: Kind
    text: str
    images: int
    stated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """The audit of a run's labels; ``kinds`` has a row of all together, ``all``.

    ``verdicts`` counts the distinct facts of a kind: yes, no, and why unknown: ``undecided`` (the
    model's own doubt), ``failed``, ``unreadable``. ``classes`` counts segments by label. ``unsure``
    items are those that the person could not tell; ``unanswered`` have no answer yet.
    """

    truth: Literal["people", "oracle"]
    kinds: dict[Kind, KindAudit]
    unsure: int
    unanswered: int
    verdicts: dict[Kind, dict[str, int]]
    classes: dict[Kind, dict[str, int]]
    failing: tuple[FailingFact, ...]
    agreements: tuple[Agreement, ...]

    def to_json(self) -> Json:
        """The report as a JSON object."""
        return asdict(self)


def audit_report(
    labeled: Iterable[LabeledResponse],
    items: Sequence[AuditItem],
    answers: Mapping[str, Answer],
    kinds: Sequence[Kind],
    *,
    second: Iterable[LabeledResponse] | None = None,
) -> AuditReport:
    """Report on labels by a sample of their facts and a person's answers by item id.

    Args:
        labeled: iterated several times.
        second: labels of the same responses by another verifier, for the agreement of the two.
    """
    given = [(item, answers[item.id]) for item in items if item.id in answers]
    return AuditReport(
        truth="people",
        kinds=_audits(given, kinds),
        unsure=sum(answer == "unknown" for _, answer in given),
        unanswered=len(items) - len(given),
        **_of_labels(labeled, kinds, second),
    )


def oracle_report(
    labeled: Iterable[LabeledResponse],
    oracle: Oracle,
    kinds: Sequence[Kind],
    *,
    second: Iterable[LabeledResponse] | None = None,
) -> AuditReport:
    """The same report with every decided fact checked against the truth of the embedded world.

    ``unsure`` counts facts about something that is not there, which are neither true nor false.
    """
    given: list[tuple[AuditItem, Answer]] = []
    for response, fact in distinct_facts(labeled):
        item = audit_item(response, fact)
        if item.answer != "unknown":
            truth = oracle(response.response, fact)
            given.append((item, "unknown" if truth is None else "yes" if truth else "no"))
    return AuditReport(
        truth="oracle",
        kinds=_audits(given, kinds),
        unsure=sum(answer == "unknown" for _, answer in given),
        unanswered=0,
        **_of_labels(labeled, kinds, second),
    )


def vote_agreements(labeled: Iterable[LabeledResponse]) -> tuple[Agreement, ...]:
    """Agreement of each pair of a panel's members; empty if no verdict holds votes."""
    votes: list[tuple[Answer, ...]] = []
    names: list[str] = []
    for item, fact in distinct_facts(labeled):
        verdict = item.verdicts[fact.text]
        if verdict.votes:
            votes.append(verdict.votes)
            names = item.provenance.get("verifier", "").split(" + ")
    count = max(map(len, votes), default=0)
    if len(names) != count:
        names = [f"verifier {number}" for number in range(1, count + 1)]
    return tuple(
        _agreement(names[i], names[j], [(v[i], v[j]) for v in votes if len(v) == count])
        for i, j in combinations(range(count), 2)
    )


def file_agreement(
    first: Iterable[LabeledResponse], second: Iterable[LabeledResponse]
) -> Agreement:
    """Agreement of two label sets on the facts (image and text) that are in both."""
    sides, names = [], []
    for labeled in (first, second):
        verdicts: dict[tuple[str, str], Answer] = {}
        name = ""
        for item, fact in distinct_facts(labeled):
            key = (item.response.prompt.image.sha256, fact.text)
            verdicts[key] = item.verdicts[fact.text].answer
            name = item.provenance.get("verifier", "")
        sides.append(verdicts)
        names.append(name)
    one, other = sides
    pairs = [(answer, other[key]) for key, answer in one.items() if key in other]
    return _agreement(names[0] or "first", names[1] or "second", pairs)


def failing_facts(
    labeled: Iterable[LabeledResponse], limit: int = _FAILING
) -> tuple[FailingFact, ...]:
    """The statements judged false on most images; case, spaces and the final stop do not matter."""
    failed: Counter[tuple[Kind, str]] = Counter()
    stated: Counter[tuple[Kind, str]] = Counter()
    for item, fact in distinct_facts(labeled):
        key = (fact.kind, " ".join(fact.text.casefold().split()).rstrip("."))
        stated[key] += 1
        failed[key] += item.verdicts[fact.text].answer == "no"
    ranked = sorted((key for key in failed if failed[key]), key=lambda key: (-failed[key], key))
    return tuple(
        FailingFact(kind=key[0], text=key[1], images=failed[key], stated=stated[key])
        for key in ranked[:limit]
    )


def audit_tables(report: AuditReport) -> Iterator[Table]:
    """The report as tables for the console; what is in brackets is a 95 % interval."""
    who = "a person's answers" if report.truth == "people" else "the oracle"
    table = _table(f"verdicts against {who}", "", "checked", "accuracy", "precision", "recall")
    for name, kind in report.kinds.items():
        figures = (kind.accuracy, kind.precision, kind.recall)
        table.add_row(name, str(kind.judged), *map(_percent, figures))
    table.caption = (
        "positive: a false fact. "
        f"{report.unsure} could not be told, {report.unanswered} not answered"
    )
    yield table
    for title, counts in (
        ("distinct facts by verdict", report.verdicts),
        ("segments by label", report.classes),
    ):
        table = _table(title, "", *next(iter(counts.values())))
        for kind_name, by_name in counts.items():
            table.add_row(kind_name, *map(str, by_name.values()))
        yield table
    if report.agreements:
        table = _table("two verifiers", "first", "second", "facts", "agree", "kappa")
        for pair in report.agreements:
            kappa = _plain(pair.kappa)
            members = (Text(pair.first), Text(pair.second))  # not markup, whatever they hold
            table.add_row(*members, str(pair.facts), _percent(pair.observed), kappa)
        yield table
    if report.failing:
        table = _table("facts judged false on most images", "fact", "kind", "false", "stated")
        for fact in report.failing:
            table.add_row(Text(fact.text), fact.kind, str(fact.images), str(fact.stated))
        yield table


def _audits(
    given: Sequence[tuple[AuditItem, Answer]], kinds: Sequence[Kind]
) -> dict[Kind, KindAudit]:
    return {
        row: _audit(
            [
                (item.answer == "no", answer == "no", item.weight)
                for item, answer in given
                if answer != "unknown" and row in (item.kind, ALL)
            ]
        )
        for row in (*kinds, ALL)
    }


def _audit(checked: Sequence[tuple[bool, bool, float]]) -> KindAudit:
    """Figures of (judged false, is false, weight) triples."""
    return KindAudit(
        judged=len(checked),
        missed=sum(false and not said for said, false, _ in checked),
        false_alarms=sum(said and not false for said, false, _ in checked),
        accuracy=weighted_share([(said == false, w) for said, false, w in checked]),
        precision=weighted_share([(false, w) for said, false, w in checked if said]),
        recall=weighted_share([(said, w) for said, false, w in checked if false]),
    )


def _of_labels(
    labeled: Iterable[LabeledResponse],
    kinds: Sequence[Kind],
    second: Iterable[LabeledResponse] | None,
) -> Json:
    """The parts of a report that need no truth."""
    reasons = ("yes", "no", "undecided", "failed", "unreadable")
    verdicts = {kind: dict.fromkeys(reasons, 0) for kind in kinds}
    for item, fact in distinct_facts(labeled):
        verdict = item.verdicts[fact.text]
        unknown = verdict.answer == "unknown"
        verdicts[fact.kind][(verdict.problem or "undecided") if unknown else verdict.answer] += 1
    pairs = [] if second is None else [file_agreement(labeled, second)]
    return {
        "verdicts": verdicts,
        "classes": class_balance(labeled, kinds),
        "failing": failing_facts(labeled),
        "agreements": (*vote_agreements(labeled), *pairs),
    }


def _agreement(first: str, second: str, pairs: Sequence[tuple[Answer, Answer]]) -> Agreement:
    decided = [pair for pair in pairs if "unknown" not in pair]
    return Agreement(
        first=first,
        second=second,
        facts=len(decided),
        undecided=len(pairs) - len(decided),
        observed=weighted_share([(a == b, 1.0) for a, b in decided]),
        kappa=cohen_kappa(decided),
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _percent(figure: Estimate | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.value:.1%} ({figure.low:.0%} to {figure.high:.0%})"


def _plain(figure: Estimate | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.value:.2f} ({figure.low:.2f} to {figure.high:.2f})"
