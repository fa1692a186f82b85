"""What all reward functions for other trainers have in common: texts of rows to rewards."""

from collections.abc import Mapping
from dataclasses import dataclass

from fgaif.client.answers import ScoringRefused, rewards
from fgaif.client.client import RewardClient
from fgaif.client.requests import ScoreItem
from fgaif.types import Kind

_PER_REQUEST = 16
"""Texts in one request, so that their images stay below the size limit of a body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRewards:
    """Rewards by row: ``total`` (or of the one kind that was asked for), and of every kind.

    ``refused`` are the rows whose text the reward models cannot read, with the reasons.
    """

    total: dict[int, float]
    kinds: dict[int, dict[Kind, float]]
    refused: dict[int, ScoringRefused]


def score_rows(
    client: RewardClient, items: Mapping[int, ScoreItem], kind: Kind | None
) -> RowRewards:
    """Ask the service for the items of a batch, by row, in requests of bounded size.

    Raises:
        ScoringError: no scores, after all retries.
    """
    found = RowRewards(total={}, kinds={}, refused={})
    rows = list(items)
    for start in range(0, len(rows), _PER_REQUEST):
        part = rows[start : start + _PER_REQUEST]
        answers = client.score_batch([items[row] for row in part])
        for row, answer in zip(part, answers, strict=True):
            if isinstance(answer, ScoringRefused):
                found.refused[row] = answer
                continue
            (found.total[row],) = rewards(answer, kind)
            found.kinds[row] = dict(answer.results[0].rewards)  # type: ignore[union-attr]
    return found
