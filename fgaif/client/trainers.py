"""Reward functions for verl, EasyR1 and ms-swift that ask the service.

Each has the signature that the trainer's release named in docs/serving.md calls; none of them needs
the trainer. A text that the reward models cannot read gets 0 where a number is needed, and is
logged.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fgaif.client.batches import RowRewards, score_rows
from fgaif.client.client import RewardClient
from fgaif.client.requests import Image, ScoreItem
from fgaif.errors import DataError
from fgaif.serving.schema import DEFAULT_PROMPT
from fgaif.types import Json, Kind

log = logging.getLogger(__name__)

_PLACEHOLDER = "<image>"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerlReward:
    """verl's ``compute_score``; see :func:`verl_reward`."""

    client: RewardClient
    kind: Kind | None = None

    def __call__(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Json:
        """Return ``score`` of one response, the sums per kind, and whether it was refused.

        Args:
            data_source: verl's name of the data set; not used.
            solution_str: the response, without special tokens.
            ground_truth: the image, where ``extra_info`` holds none.
            extra_info: ``image`` (a path, data URI or URL) and ``prompt``, both by choice.
        """
        extra = extra_info or {}
        image, prompt = extra.get("image", ground_truth), extra.get("prompt", DEFAULT_PROMPT)
        found = _scored(self.client, [solution_str], [image], [prompt], self.kind)
        return {
            "score": found.total.get(0, 0.0),
            **found.kinds.get(0, {}),
            "refused": float(0 in found.refused),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EasyR1Reward:
    """EasyR1's reward function, batched or one by one; see :func:`easyr1_reward`."""

    client: RewardClient
    kind: Kind | None = None

    def __call__(self, reward_inputs: Any, **_: Any) -> Any:
        """Return ``overall`` and the sums per kind for each input, or for the one that is given.

        Args:
            reward_inputs: ``{"response", "response_length", "ground_truth"}``, or a list of them;
                ``ground_truth`` is the image, or a JSON object with ``image`` and ``prompt``.
        """
        if isinstance(reward_inputs, Mapping):
            return self([reward_inputs])[0]
        texts = [str(given["response"]) for given in reward_inputs]
        truths = [_truth(given["ground_truth"]) for given in reward_inputs]
        images, prompts = [image for image, _ in truths], [prompt for _, prompt in truths]
        found = _scored(self.client, texts, images, prompts, self.kind)
        none = dict.fromkeys(next(iter(found.kinds.values()), {}), 0.0)
        return [
            {"overall": found.total.get(row, 0.0), **found.kinds.get(row, none)}
            for row in range(len(texts))
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwiftReward:
    """A reward of ms-swift's GRPO; see :func:`swift_reward`."""

    client: RewardClient
    kind: Kind | None = None

    def __call__(
        self,
        completions: Sequence[str],
        images: Sequence[Any] | None = None,
        messages: Sequence[Sequence[Mapping[str, Any]]] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Return one reward per completion; None, which swift leaves out, for a refused one.

        Args:
            completions: the responses.
            images: column of the data set: per row an image or a list of one.
            messages: the conversations; what is asked is the last message of the user.

        Raises:
            DataError: a row without an image or with several.
        """
        pictures = [_one(row, one) for row, one in enumerate(images or [None] * len(completions))]
        asked = [_asked(row) for row in messages or [()] * len(completions)]
        found = _scored(self.client, completions, pictures, asked, self.kind)
        empty = {row: 0.0 for row, text in enumerate(completions) if not text.strip()}
        return [(found.total | empty).get(row) for row in range(len(completions))]


def verl_reward(client: RewardClient, kind: Kind | None = None) -> VerlReward:
    """The total reward, or that of one kind, as verl's ``compute_score``."""
    return VerlReward(client=client, kind=kind)


def easyr1_reward(client: RewardClient, kind: Kind | None = None) -> EasyR1Reward:
    """The total reward, or that of one kind, as EasyR1's ``compute_score``."""
    return EasyR1Reward(client=client, kind=kind)


def swift_reward(client: RewardClient, kind: Kind | None = None) -> Callable[..., SwiftReward]:
    """An entry of ms-swift's ``orms``: swift calls it once, with its arguments, for the reward."""

    def make(*_: Any, **__: Any) -> SwiftReward:
        return SwiftReward(client=client, kind=kind)

    return make


def _scored(
    client: RewardClient,
    texts: Sequence[str],
    images: Sequence[Image],
    prompts: Sequence[str],
    kind: Kind | None,
) -> RowRewards:
    """Rewards by row; blank texts are in neither part, which makes them 0."""
    items = {
        row: ScoreItem(image=image, text=text, prompt=prompt)
        for row, (text, image, prompt) in enumerate(zip(texts, images, prompts, strict=True))
        if text.strip()
    }
    found = score_rows(client, items, kind)
    if found.refused:
        first = next(iter(found.refused.values()))
        log.warning("%d of %d have no reward; the first: %s", len(found.refused), len(texts), first)
    return found


def _truth(given: Any) -> tuple[Image, str]:
    """Image and prompt of EasyR1's ``ground_truth``: a path, or JSON with both."""
    if isinstance(given, str) and given.lstrip().startswith("{"):
        tree = json.loads(given)
        return tree["image"], tree.get("prompt", DEFAULT_PROMPT)
    image: Image = given
    return image, DEFAULT_PROMPT


def _one(row: int, given: Any) -> Image:
    """The image of a row: swift hands over paths, or ``{"bytes", "path"}``, in a list or alone."""
    pictures = given if isinstance(given, list | tuple) else [given]
    if len(pictures) != 1 or pictures[0] is None:
        count = sum(picture is not None for picture in pictures)
        raise DataError(f"row {row} of the batch: {count} images; the reward models look at one")
    picture = pictures[0]
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path")
    image: Image = picture
    return image


def _asked(messages: Sequence[Mapping[str, Any]]) -> str:
    said = [message["content"] for message in messages if message.get("role") == "user"]
    if not said:
        return DEFAULT_PROMPT
    content = said[-1]
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    return str(content).replace(_PLACEHOLDER, "").strip() or DEFAULT_PROMPT
