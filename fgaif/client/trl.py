"""A reward function for TRL's trainers that asks the service."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fgaif.client.batches import score_rows
from fgaif.client.client import RewardClient
from fgaif.client.requests import Image, ScoreItem
from fgaif.errors import DataError
from fgaif.types import Kind

log = logging.getLogger(__name__)

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlReward:
    """A reward function for TRL's GRPOTrainer and RLOOTrainer; see :func:`trl_reward`."""

    client: RewardClient
    kind: Kind | None = None

    @property
    def __name__(self) -> str:
        """The name under which TRL logs the reward."""
        return f"fgaif_{self.kind or 'total'}"

    def __call__(
        self,
        prompts: Sequence[str | list[Message]],
        completions: Sequence[str | list[Message]],
        image: Sequence[Any] | None = None,
        images: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return one reward per completion; 0 for an empty one, None for one that is refused.

        Args:
            prompts: strings or conversations; what is asked is the last message of the user.
            completions: strings or conversations; what is scored is the last message.
            image: column of the data set with an image per row.
            images: column of the data set with a list of one image per row. Without both, the
                image is taken from the prompt.
            columns: TRL's other arguments; ``log_metric`` is told how many were refused.

        Raises:
            DataError: a row without an image or with several.
            ScoringError: no scores, after all retries.
        """
        found = images if images is not None else image
        items = {}
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if text := _text(completion):
                picture = _picture(row, prompt, found[row] if found is not None else None)
                items[row] = ScoreItem(image=picture, text=text, prompt=_text(prompt, "user"))
        scored = score_rows(self.client, items, self.kind)
        given: list[float | None] = [scored.total.get(row, 0.0) for row in range(len(prompts))]
        for row in scored.refused:
            given[row] = None
        if scored.refused:
            log.warning(
                "%d of %d completions have no reward; the first: %s",
                *(len(scored.refused), len(prompts), next(iter(scored.refused.values()))),
            )
        if (log_metric := columns.get("log_metric")) is not None:
            log_metric(f"{self.__name__}/refused", float(len(scored.refused)))
        return given


def trl_reward(client: RewardClient, kind: Kind | None = None) -> TrlReward:
    """The total reward, or that of one kind, as one of TRL's ``reward_funcs``."""
    return TrlReward(client=client, kind=kind)


def _text(said: str | list[Message], role: str | None = None) -> str:
    """The text of the last message, or of the last one of ``role``; blank counts as empty."""
    if isinstance(said, str):
        return said if said.strip() else ""
    contents = [m.get("content") or "" for m in said if role in (None, m["role"])]
    content = contents[-1] if contents else ""
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    return content if content.strip() else ""


def _picture(row: int, prompt: str | list[Message], column: Any) -> Image:
    if column is None and not isinstance(prompt, str):
        contents = [m["content"] for m in prompt if isinstance(m.get("content"), list)]
        column = [p["image"] for content in contents for p in content if p["type"] == "image"]
    pictures = column if isinstance(column, list | tuple) else [column]
    if len(pictures) != 1 or pictures[0] is None:
        count = sum(picture is not None for picture in pictures)
        raise DataError(f"row {row} of the batch: {count} images; the reward models look at one")
    image: Image = pictures[0]
    return image
