"""Everything of a step's rollouts in one file, to look at and to compute anew.

JSON lines: a header with the step and what its numbers were computed with, then a row per response
with what PPO knew of each segment and token. Numbers are float32 and come back bit by bit; one that
is not finite is null, and comes back as NaN.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fgaif.config import Config, Estimator, PpoConfig, RewardShapeConfig
from fgaif.errors import DataError
from fgaif.files import write_whole
from fgaif.ppo.batch import make_batch
from fgaif.reward.dense import DenseRewards, RewardCenters, dense_rewards
from fgaif.types import (
    Evaluation,
    FloatArray,
    ImageRef,
    Json,
    Kind,
    Prompt,
    Response,
    Segment,
    SegmentClass,
    SegmentScores,
    TrainBatch,
)

T = TypeVar("T")
_FORMAT = 1
PER_TOKEN = (
    "rollout_logprobs",
    "old_logprobs",
    "reference_logprobs",
    "values",
    "task_rewards",
    "rewards",
    "advantages",
    "returns",
)
"""Arrays (T,) of a row; without a critic there are no values and returns."""
_OF_CRITIC = ("values", "returns")
COMPUTED = ("task_rewards", "rewards", "advantages", "returns")
"""Those that follow from scores, log-probs and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The step, and what its rewards and advantages were computed with.

    ``centers`` are the running means before the step, which the step's scores then moved.
    """

    step: int
    kl_coef: float
    gamma: float
    lam: float
    shape: RewardShapeConfig
    centers: RewardCenters
    estimator: Estimator = "gae"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One response: ``tokens`` holds the arrays (T,) of ``PER_TOKEN``, rewards by segment their
    parts: ``segment_values`` (S, K) and ``penalties`` (S,); ``reward`` is a preference model's."""

    response: Response
    segments: tuple[Segment, ...]
    malformed: frozenset[int]
    probs: FloatArray
    segment_values: FloatArray
    penalties: FloatArray
    tokens: dict[str, FloatArray]
    reward: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """A file's content."""

    header: Header
    rows: tuple[Row, ...]


def keep_rollouts(
    folder: Path,
    config: Config,
    *,
    step: int,
    kl_coef: float,
    centers: RewardCenters,
    batch: TrainBatch,
    segments: Sequence[Sequence[Segment]],
    scores: Sequence[SegmentScores],
    rewards: DenseRewards,
    malformed: Sequence[Collection[int]],
) -> None:
    """Write ``step_NNNNNN.jsonl`` if this step's rollouts are wanted (``tracking.rollouts``).

    ``step`` counts from 1; ``kl_coef`` and ``centers`` are those before the step.
    """
    every, ppo = config.tracking.rollouts, config.ppo
    if every == 0 or step % every:
        return
    header = Header(
        step=step,
        kl_coef=kl_coef,
        gamma=ppo.gamma,
        lam=ppo.lam,
        shape=ppo.shape,
        centers=centers,
        estimator=ppo.estimator,
    )
    rows = dump_rows(header, batch, segments, scores, rewards, malformed)
    write_dump(folder / f"step_{step:06d}.jsonl", rows)


def dump_rows(
    header: Header,
    batch: TrainBatch,
    segments: Sequence[Sequence[Segment]],
    scores: Sequence[SegmentScores],
    rewards: DenseRewards,
    malformed: Sequence[Collection[int]],
) -> list[Json]:
    """The header and a row per response of the batch, as JSON."""
    head: Json = {
        "format": _FORMAT,
        "step": header.step,
        "kl_coef": header.kl_coef,
        "gamma": header.gamma,
        "lam": header.lam,
        "shape": header.shape.model_dump(mode="json"),
        "centers": header.centers.to_json(),
        "estimator": header.estimator,
    }
    return [head] + [
        _row(batch, index, segments[index], scores[index], rewards, malformed[index])
        for index in range(len(batch.responses))
    ]


def write_dump(path: Path, rows: Iterable[Json]) -> None:
    """Write what :func:`dump_rows` gave; raises DataError if the file cannot be written."""
    write_whole(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_dump(path: Path) -> Dump:
    """Read a file of rollouts and check it.

    Raises:
        DataError: not such a file, or a row contradicts itself; the message gives the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; give a file step_*.jsonl") from error
    header = _parsed(path, 1, lines[0] if lines else "", _read_header)
    names = tuple(n for n in PER_TOKEN if header.estimator == "gae" or n not in _OF_CRITIC)
    read_row = partial(_read_row, kinds=header.centers.kinds, names=names)
    rows = [_parsed(path, n, line, read_row) for n, line in enumerate(lines[1:], start=2)]
    return Dump(header=header, rows=tuple(rows))


def recompute(dump: Dump, config: PpoConfig) -> dict[str, list[FloatArray]]:
    """The arrays of ``COMPUTED`` per response, anew from scores, log-probs and values.

    Reward shape, gamma, lambda and estimator are the configuration's; the KL coefficient is the
    dump's, as it may have been adapted. There are no returns without a critic.

    Raises:
        DataError: the estimator needs values, or several responses to a prompt, and the dump of
            another one has none.
    """
    rows = dump.rows
    responses = [row.response for row in rows]
    rewards = dense_rewards(
        responses,
        [row.segments for row in rows],
        [SegmentScores(probs=row.probs, reward=row.reward) for row in rows],
        [row.malformed for row in rows],
        config.shape,
        dump.header.centers,
    )
    batch = make_batch(
        responses,
        [row.tokens["old_logprobs"] for row in rows],
        [
            Evaluation(
                reference_logprobs=row.tokens["reference_logprobs"],
                values=row.tokens.get("values"),
            )
            for row in rows
        ],
        rewards.tokens,
        kl_coef=dump.header.kl_coef,
        gamma=config.gamma,
        lam=config.lam,
        estimator=config.estimator,
        own_rewards=rewards.own,
        token_penalty=config.token_penalty,
        kl_in_loss=config.kl.placement == "loss",
    )
    return {
        name: [array[index, : len(row.response.token_ids)] for index, row in enumerate(rows)]
        for name in COMPUTED
        if (array := getattr(batch, name)) is not None
    }


def _row(
    batch: TrainBatch,
    index: int,
    segments: Sequence[Segment],
    scores: SegmentScores,
    rewards: DenseRewards,
    malformed: Collection[int],
) -> Json:
    response = batch.responses[index]
    length = len(response.token_ids)
    arrays = {
        name: _numbers(
            response.rollout_logprobs
            if name == "rollout_logprobs"
            else getattr(batch, name)[index, :length]
        )
        for name in PER_TOKEN
        if name not in _OF_CRITIC or batch.values is not None
    }
    return (
        {
            "prompt": {"id": response.prompt.id, "text": response.prompt.text}
            | ({"answer": response.prompt.answer} if response.prompt.answer else {}),
            "image": {"path": response.prompt.image.path, "sha256": response.prompt.image.sha256},
            "sample": response.sample,
            "version": response.policy_version,
            "finish": response.finish,
            "text": response.text,
            "token_ids": response.token_ids.tolist(),
            "segments": [
                [piece.char_start, piece.char_end, piece.token_start, piece.token_end]
                for piece in segments
            ],
            "malformed": sorted(malformed),
            "probs": {
                kind: [_numbers(row) for row in scores.probs[:, k]]
                for k, kind in enumerate(rewards.centers.kinds)
            },
            "segment_values": [_numbers(row) for row in rewards.values[index]],
            "penalties": _numbers(rewards.penalties[index]),
        }
        | arrays
        | ({"reward": scores.reward} if scores.reward else {})
    )


def _parsed(path: Path, number: int, line: str, read: Callable[[Json], T]) -> T:
    try:
        return read(json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{path}:{number}: not of a dump of rollouts ({what}); only files that training wrote "
            "under policy/rollouts can be read"
        ) from error


def _numbers(array: FloatArray) -> list[float | None]:
    """The shortest decimals that give the same float32 again."""
    return [float(str(value)) if math.isfinite(value) else None for value in array]


def _array(numbers: Any, *shape: int) -> FloatArray:
    array = np.array(numbers, dtype=np.float32)  # None becomes NaN
    return array.reshape(shape) if array.size == 0 else _of_shape(array, shape)


def _of_shape(array: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    if array.shape != shape:
        raise DataError(f"an array is {array.shape} where {shape} was expected")
    return array


def _read_header(row: Json) -> Header:
    if row["format"] != _FORMAT:
        raise DataError(f"format {row['format']}, this version reads {_FORMAT}")
    return Header(
        step=row["step"],
        kl_coef=row["kl_coef"],
        gamma=row["gamma"],
        lam=row["lam"],
        shape=RewardShapeConfig.model_validate(row["shape"]),
        centers=RewardCenters.from_json(row["centers"]),
        estimator=row.get("estimator", "gae"),  # earlier versions knew no other
    )


def _read_row(row: Json, kinds: Sequence[Kind], names: Sequence[str]) -> Row:
    image = ImageRef(path=row["image"]["path"], sha256=row["image"]["sha256"])
    length, count = len(row["token_ids"]), len(row["segments"])
    tokens = {name: _array(row[name], length) for name in names}
    response = Response(
        prompt=Prompt(
            id=row["prompt"]["id"],
            image=image,
            text=row["prompt"]["text"],
            answer=row["prompt"].get("answer", ""),
        ),
        sample=row["sample"],
        text=row["text"],
        token_ids=np.array(row["token_ids"], dtype=np.int64),
        rollout_logprobs=tokens["rollout_logprobs"],
        finish=row["finish"],
        policy_version=row["version"],
    )
    segments = tuple(_segment(i, *span) for i, span in enumerate(row["segments"]))
    for piece in segments:
        if piece.token_end > length or piece.char_end > len(response.text):
            raise DataError(f"segment {piece.index} reaches beyond its response")
    probs = [_array(row["probs"][kind], count, len(SegmentClass)) for kind in kinds]
    return Row(
        response=response,
        segments=segments,
        malformed=frozenset(row["malformed"]),
        probs=np.stack(probs, axis=1),
        segment_values=_array(row["segment_values"], count, len(kinds)),
        penalties=_array(row["penalties"], count),
        tokens=tokens,
        reward=float(row.get("reward", 0.0)),
    )


def _segment(
    index: int, char_start: int, char_end: int, token_start: int, token_end: int
) -> Segment:
    return Segment(
        index=index,
        char_start=char_start,
        char_end=char_end,
        token_start=token_start,
        token_end=token_end,
    )
