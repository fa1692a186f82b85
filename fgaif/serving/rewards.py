"""Score texts about images with trained reward models, in this process.

    rewards = load_rewards("runs/scenes/rewards")
    scores = rewards.score("photo.png", "There is a red circle. There is a blue moon.")
    print(scores)

The models read what PPO's scorers read and give their numbers; rewards are those of
``fgaif/reward/dense.py``. In a notebook, scores show the text coloured by segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import overload

import numpy as np
import torch

from fgaif.config import RewardConfig, RewardShapeConfig
from fgaif.data.images import MAX_PIXELS, Picture, as_image
from fgaif.data.scenes.questions import DESCRIBE
from fgaif.errors import CheckpointError, DataError
from fgaif.feedback.external import make_response
from fgaif.feedback.segment import segment_responses
from fgaif.kinds import kind_colours
from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.hub import local_folder, split_name
from fgaif.lvlm.model import base_of, load_lvlm, load_processor, resolve_checkpoint
from fgaif.reward.checkpoint import (
    SAVED_FILES,
    RewardCard,
    checkpoint_digest,
    common_image_pixels,
    common_min_words,
    common_shape,
    load_reward_model,
    load_shared_reward_models,
    read_cards,
    rewards_version,
    saved_kinds,
)
from fgaif.reward.dense import (
    RewardCenters,
    kind_weights,
    ordered_values,
    segment_penalties,
    segment_rewards,
    terminal_reward,
)
from fgaif.reward.inputs import load_reward_encoder
from fgaif.reward.model import RewardModel, SharedRewardModels, segment_probs
from fgaif.types import FloatArray, ImageRef, Kind, Response, Segment, SegmentClass

_EMBEDDED = "scenes:policy"
_GROUND = {SegmentClass.OK: "#e3f4e8", SegmentClass.HALLU: "#fde3e1"}
_MARKS = {SegmentClass.OK: "✓", SegmentClass.HALLU: "✗"}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class TextScores:
    """A scored text. ``print`` shows its segments; a notebook shows the text coloured by them.

    ``probs`` (S, K, C) are class probabilities of segment and kind, ``values`` (S, K) what they
    are worth, unweighted, and ``rewards`` (S,) what PPO adds at each segment's last token: the
    weighted sum of the values, less a penalty where a segment repeats an earlier one; ``terminal``
    is what is lost at the end of a response that never ended or is too long.
    """

    response: Response
    segments: tuple[Segment, ...]
    kinds: tuple[Kind, ...]
    probs: FloatArray
    values: FloatArray
    rewards: FloatArray
    terminal: float = 0.0

    @property
    def text(self) -> str:
        """The text."""
        return self.response.text

    @property
    def pieces(self) -> list[str]:
        """The text of each segment; joined they give the text."""
        return [self.text[segment.char_start : segment.char_end] for segment in self.segments]

    @property
    def total(self) -> float:
        """Sum of the segments' rewards."""
        return float(self.rewards.sum())

    @property
    def whole(self) -> float:
        """What responses are ranked by: the total, and what PPO adds at their end."""
        return self.total + self.terminal

    def classes(self) -> list[dict[Kind, SegmentClass]]:
        """The most likely class of each segment, by kind."""
        rows = self.probs.argmax(-1).tolist()
        return [dict(zip(self.kinds, map(SegmentClass, row), strict=True)) for row in rows]

    def __repr__(self) -> str:
        lines = []
        rows = zip(self.pieces, self.rewards, self.classes(), self.probs, strict=True)
        for piece, reward, classes, probs in rows:
            notes = [
                f"{kind} hallucinated ({probs[k, SegmentClass.HALLU]:.2f})"
                for k, (kind, found) in enumerate(classes.items())
                if found == SegmentClass.HALLU
            ]
            lines.append(
                f"{_signed(reward)}  {' '.join(piece.split())}  {', '.join(notes)}".rstrip()
            )
        return "\n".join([*lines, f"{_signed(self.total)}  in all"])

    def _repr_html_(self) -> str:
        """The text for notebooks, each segment with its kinds; hover one for its numbers."""
        rows = zip(self.pieces, self.rewards, self.classes(), self.probs, strict=True)
        spans = [self._span(*row) for row in rows]
        legend = " ".join(
            f"{_chip(kind, colour, SegmentClass.HALLU)} {escape(kind)} hallucinated"
            for kind, colour in kind_colours(self.kinds).items()
        )
        return (
            f'<div style="line-height:2">{"".join(spans)}</div>'
            f'<div style="font-size:85%;opacity:.75">reward {_signed(self.total)} · {legend}</div>'
        )

    def _span(
        self, piece: str, reward: float, classes: dict[Kind, SegmentClass], probs: FloatArray
    ) -> str:
        worst, colours = max(classes.values()), kind_colours(self.kinds)
        chips = [
            _chip(kind, colours[kind], found)
            for kind, found in classes.items()
            if found != SegmentClass.NONE
        ]
        numbers = [f"reward {_signed(reward)}"]
        for kind, row in zip(self.kinds, probs, strict=True):
            parts = ", ".join(f"{c.name.lower()} {row[c]:.2f}" for c in SegmentClass)
            numbers.append(f"{kind}: {parts}")
        ground = f"background:{_GROUND[worst]};color:#20242c;" if worst in _GROUND else ""
        return (
            f'<span title="{escape(chr(10).join(numbers))}" style="{ground}border-radius:4px;'
            f'padding:1px 4px;white-space:pre-wrap">{escape(piece.rstrip())} {"".join(chips)}'
            "</span> "
        )


def _signed(number: float) -> str:
    return f"{round(float(number), 2) + 0.0:+.2f}"  # adding zero turns -0.0 into 0.0


def _chip(kind: Kind, colour: str, found: SegmentClass) -> str:
    fill = f"background:{colour};color:#fff" if found == SegmentClass.HALLU else f"color:{colour}"
    return (
        f'<span style="border:1.5px solid {colour};{fill};border-radius:4px;padding:0 3px;'
        f'font:600 10px sans-serif">{escape(kind[:1].upper())}{_MARKS[found]}</span>'
    )


class Rewards:
    """Reward models of all kinds, loaded once, to score any number of texts.

    Made by :func:`load_rewards`. ``version`` is the digest of the models, as the service tells it.
    """

    def __init__(
        self,
        folder: Path,
        backbone: Path,
        policy: Path,
        *,
        cards: dict[Kind, RewardCard],
        version: str,
        dtype: str,
        device: str,
        attention: str,
        shared: bool,
        micro_batch: int,
        shape: RewardShapeConfig,
    ) -> None:
        self.kinds: tuple[Kind, ...] = tuple(cards)
        self.shape = shape
        self.version = version
        self.cards = cards
        self._min_words = common_min_words(list(self.cards.values()))
        self._device = torch.device(device)
        self._micro_batch = micro_batch
        self._shared = shared
        seen = common_image_pixels(list(self.cards.values()))
        self._encoder = load_reward_encoder(
            backbone, policy, max_image_pixels=MAX_PIXELS, image_pixels=seen
        )
        self._tokenizer = load_processor(policy).tokenizer
        load = {"dtype": dtype, "device": device, "attention": attention}
        self._models: list[RewardModel | SharedRewardModels] = (
            [load_shared_reward_models(folder, backbone, self.kinds, load_lvlm, **load)]
            if shared
            else [load_reward_model(folder / kind, backbone, **load) for kind in self.kinds]
        )
        # Adapters leave the vision tower as it is: one cache serves all models.
        self._features = FeatureCache(self._models[0].backbone, self._encoder.encoder)

    @overload
    def score(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self,
        image: Picture | ImageRef,
        text: str,
        prompt: str | None = None,
        *,
        centers: RewardCenters | None = None,
    ) -> TextScores: ...

    @overload
    def score(
        self,
        image: Picture | ImageRef,
        text: Sequence[str],
        prompt: str | None = None,
        *,
        centers: RewardCenters | None = None,
    ) -> list[TextScores]: ...

    def score(
        self,
        image: Picture | ImageRef,
        text: str | Sequence[str],
        prompt: str | None = None,
        *,
        centers: RewardCenters | None = None,
    ) -> TextScores | list[TextScores]:
        """Score one text about an image, or several, which are read together.

        Args:
            image: a path, a file's bytes, or a Pillow image.
            text: what was said about it.
            prompt: what was asked; default: "Describe this image in detail."
            centers: running means of a PPO run, which it subtracts where ``shape.center`` is set;
                without them nothing is subtracted.

        Raises:
            DataError: the image cannot be read, or a text is too long or holds what the tokenizer
                cannot write, such as special tokens.
            CheckpointError: the models give numbers that are not finite.
        """
        texts = [text] if isinstance(text, str) else text
        seen = as_image(image)
        asked = DESCRIBE if prompt is None else prompt
        responses = [make_response(seen, each, self._tokenizer, prompt=asked) for each in texts]
        scores = self.score_responses(responses, centers=centers)
        return scores[0] if isinstance(text, str) else scores

    def score_responses(
        self, responses: Sequence[Response], *, centers: RewardCenters | None = None
    ) -> list[TextScores]:
        """Score responses with the ids that were sampled, about images of their own.

        Raises:
            DataError: one is too long or holds the image token.
            CheckpointError: the models give numbers that are not finite.
        """
        segments = segment_responses(responses, self._tokenizer, self._min_words)
        self._check_lengths(responses, segments)
        found = self._probs(responses, segments)
        if not all(np.isfinite(probs).all() for probs in found):
            raise CheckpointError(
                f"reward models {self.version}: their probabilities are not finite; train them "
                "again, or load them in float32"
            )
        return [
            self._scores(response, pieces, probs, centers)
            for response, pieces, probs in zip(responses, segments, found, strict=True)
        ]

    def __repr__(self) -> str:
        return f"Rewards({', '.join(self.kinds)}; version {self.version})"

    def _check_lengths(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> None:
        config = base_of(self._models[0].backbone).config
        most = int(config.text_config.max_position_embeddings)
        for index, (response, pieces) in enumerate(zip(responses, segments, strict=True)):
            length = len(self._encoder.row(response, pieces)[0])
            if length > most:
                raise DataError(
                    f"text {index}: {length} tokens with image and prompt, the model reads at "
                    f"most {most}; shorten it"
                )

    def _probs(
        self, responses: Sequence[Response], segments: Sequence[Sequence[Segment]]
    ) -> list[FloatArray]:
        """Class probabilities (S, K, C) per response."""
        by_model = [
            segment_probs(
                model,
                self._encoder,
                self._features,
                responses,
                segments,
                micro_batch=self._micro_batch,
                device=self._device,
            )
            for model in self._models
        ]
        if self._shared:
            return by_model[0]
        return [np.stack(rows, axis=1) for rows in zip(*by_model, strict=True)]

    def _scores(
        self,
        response: Response,
        segments: tuple[Segment, ...],
        probs: FloatArray,
        centers: RewardCenters | None,
    ) -> TextScores:
        shape = self.shape
        if centers is None:
            shape = shape.model_copy(update={"center": False})
            centers = RewardCenters.empty(self.kinds)
        values = ordered_values(probs, shape, centers.array(), self.kinds)
        penalties = segment_penalties(response.text, segments, (), shape.repeat_penalty)
        return TextScores(
            response=response,
            segments=segments,
            kinds=self.kinds,
            probs=probs,
            values=values,
            rewards=segment_rewards(values, kind_weights(shape, self.kinds), penalties),
            terminal=terminal_reward(response, shape),
        )


def load_rewards(
    folder: str | Path,
    *,
    backbone: str | Path | None = None,
    policy: str | Path | None = None,
    shape: RewardShapeConfig | None = None,
    dtype: str = "float32",
    device: str | None = None,
    attention: str = "sdpa",
    shared: bool = True,
    micro_batch: int | None = None,
) -> Rewards:
    """Load trained reward models of all kinds.

    Args:
        folder: with a folder of each kind, as ``fgaif train-reward`` writes it: RUN/rewards; or
            ``ORG/NAME@REVISION`` of the hub, as ``fgaif push`` has uploaded it.
        backbone: the checkpoint that they were trained on; default: where it was then.
        policy: whose tokenizer texts get; default: the backbone.
        shape: how rewards are made of probabilities; default: the ``ppo.shape`` of the training,
            from the models' cards.
        dtype: of the backbone, ``float32`` or ``bfloat16``.
        device: such as ``cpu`` or ``cuda:1``; default: a GPU if there is one.
        attention: transformers' implementation.
        shared: one backbone with the adapters taking turns, as with ``cluster.reward.shared``; else
            each kind has a merged backbone of its own: more memory, less time.
        micro_batch: texts in a forward pass; default: that of ``reward.micro_batch``.

    Raises:
        CheckpointError: something is missing, or does not fit the backbone.
    """
    folder = local_folder(str(folder), SAVED_FILES)
    kinds = saved_kinds(folder)
    version = rewards_version(folder, kinds)  # says what is missing
    cards = read_cards(folder, kinds)
    base = _backbone(folder, cards[kinds[0]]) if backbone is None else backbone
    path = resolve_checkpoint(str(base))
    return Rewards(
        folder,
        path,
        path if policy is None else resolve_checkpoint(str(policy)),
        cards=cards,
        version=version,
        dtype=dtype,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        attention=attention,
        shared=shared,
        micro_batch=micro_batch or RewardConfig().micro_batch,
        shape=shape or common_shape(list(cards.values())),
    )


def _backbone(folder: Path, card: RewardCard) -> str:
    """Where the card says that the backbone was, or the embedded one, which moves with fgaif."""
    if split_name(card.backbone) or (Path(card.backbone) / "config.json").is_file():
        return card.backbone
    if checkpoint_digest(resolve_checkpoint(_EMBEDDED)) == card.backbone_digest:
        return _EMBEDDED
    raise CheckpointError(
        f"{folder}: trained on {card.backbone}, which is not there; give "
        "backbone=DIRECTORY, or ORG/NAME@REVISION of the Hugging Face Hub"
    )
