"""From scored rollouts to a training batch, and how a batch is cut for training."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from fgaif.config import Estimator
from fgaif.errors import DataError
from fgaif.ppo.advantages import gae, grpo, reinforce, rloo, token_grpo, whiten
from fgaif.ppo.importance import importance_weights
from fgaif.ppo.kl import kl_k1
from fgaif.types import Evaluation, FloatArray, IntArray, Prompt, Response, TrainBatch


def make_batch(
    responses: Sequence[Response],
    old_logprobs: Sequence[FloatArray],
    evaluations: Sequence[Evaluation],
    task_rewards: Sequence[FloatArray],
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
    tis_cap: float | None = None,
    estimator: Estimator = "gae",
    own_rewards: Sequence[FloatArray] = (),
    token_penalty: float = 0.0,
    kl_in_loss: bool = False,
) -> TrainBatch:
    """Pad rollouts to (B, T), subtract the KL term from the rewards, estimate advantages.

        r_t = task_t - kl_coef (log pi_old - log pi_ref)_t

    Advantages of ``gae`` and ``reinforce`` are whitened over the batch; those that compare the
    responses to a prompt are relative already.

    Args:
        responses: B rollouts.
        old_logprobs: per response (T,), the learner's log-probs before this step's update.
        evaluations: per response, reference log-probs and, for ``gae``, values, both (T,).
        task_rewards: per response (T,), the fine-grained rewards without KL.
        kl_coef: beta.
        gamma, lam: discount and GAE's lambda.
        tis_cap: cap of the importance weights from engine to learner; None gives the batch none.
        estimator: of the advantages; see `fgaif.ppo.advantages`.
        own_rewards: for ``token_grpo``, per response (T,), each token's segment's reward.
        token_penalty: of ``token_grpo``.
        kl_in_loss: leave the KL term out of the rewards; the batch carries its coefficient.

    Raises:
        DataError: lengths differ (the message names the response), values are missing, or a
            response has none to be compared with.
    """
    _check_lengths(responses, old_logprobs, evaluations, task_rewards)
    mask = pad([np.ones(len(response.token_ids), np.float32) for response in responses])
    old = pad(old_logprobs)
    reference = pad([evaluation.reference_logprobs for evaluation in evaluations])
    task = pad(task_rewards)
    rewards = task if kl_in_loss else task - np.float32(kl_coef) * kl_k1(old, reference, mask)
    values = returns = None
    if estimator == "gae":
        values = pad(_values(responses, evaluations))
        advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
        advantages = whiten(advantages, mask)
    elif estimator == "reinforce":
        advantages = whiten(reinforce(rewards, mask, gamma=gamma), mask)
    elif estimator == "token_grpo":
        own, groups = pad(own_rewards), prompt_groups(responses)
        advantages = token_grpo(rewards, own, groups, mask, penalty=token_penalty)
    else:
        compare = grpo if estimator == "grpo" else rloo
        advantages = compare(rewards, prompt_groups(responses), mask)
    weights = None
    if tis_cap is not None:
        rollout = pad([response.rollout_logprobs for response in responses])
        weights = importance_weights(old, rollout, mask, cap=tis_cap)
    return TrainBatch(
        responses=tuple(responses),
        mask=mask,
        old_logprobs=old,
        reference_logprobs=reference,
        values=values,
        task_rewards=task,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        weights=weights,
        kl_loss_coef=kl_coef if kl_in_loss else 0.0,
    )


def prompt_groups(responses: Sequence[Response]) -> IntArray:
    """Number (B,) of each response's prompt, from 0 in order of appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(r.prompt.id, len(numbers)) for r in responses], np.int64)


def pad(rows: Sequence[FloatArray]) -> FloatArray:
    """Right-pad B arrays (T_i,) with zeros to (B, T) float32."""
    padded = np.zeros((len(rows), max((len(row) for row in rows), default=0)), np.float32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def response_lengths(responses: Sequence[Response]) -> IntArray:
    """Tokens of each response, (B,)."""
    return np.array([len(response.token_ids) for response in responses], dtype=np.int64)


def row_lengths(
    responses: Sequence[Response], prompt_ids: Callable[[Prompt], Sequence[int]] | None
) -> IntArray:
    """What `micro_batches` sorts and cuts by, (B,): tokens of each response and, where ``tokens``
    are counted, those that ``prompt_ids`` gives its prompt."""
    lengths = response_lengths(responses)
    if prompt_ids is None:
        return lengths
    return lengths + np.array([len(prompt_ids(response.prompt)) for response in responses])


def minibatches(count: int, size: int, seed: Sequence[int]) -> Iterator[IntArray]:
    """Cut a seeded shuffle of ``range(count)`` into the fewest index arrays of at most ``size``.

    Their sizes differ by one at most: a few rows left over would get a whole optimiser step, in
    which Adam moves as far for one row as for ``size``. ``seed`` is a tuple such as (run seed,
    step, epoch): the order depends on nothing else. ``count`` is at least 1.
    """
    order = np.random.default_rng(list(seed)).permutation(count)
    yield from np.array_split(order, -(-count // size))


def micro_batches(
    indexes: IntArray,
    lengths: IntArray,
    *,
    size: int,
    tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[tuple[IntArray, FloatArray]]:
    """Cut one rank's share of a minibatch into micro-batches of similar length.

    Shares are disjoint and cover the minibatch. Every rank gets the same number of micro-batches
    of the same sizes, because each backward pass is a collective operation; where the count does
    not divide, the shorter shares repeat a row with weight 0.

    Args:
        indexes: (M,) rows of the minibatch.
        lengths: (B,) tokens of each row of the batch.
        size: rows per micro-batch at most.
        tokens: and tokens, padding included: rows times the longest one. A row that has more is
            alone.
        rank, world_size: which share.

    Returns:
        per micro-batch: row indexes (m,), longest first, and weights (m,) of 1 or 0.
    """
    ordered = indexes[np.argsort(-lengths[indexes], kind="stable")]
    share_size = -(-len(ordered) // world_size)
    share = ordered[rank::world_size]
    weights = np.ones(share_size, np.float32)
    weights[len(share) :] = 0.0
    share = np.concatenate([share, ordered[-1:].repeat(share_size - len(share))])
    # The first rank has the longest row at every place: what fits it fits all.
    cuts = _cuts(lengths[ordered[::world_size]].tolist(), size, tokens)
    return [(share[start:end], weights[start:end]) for start, end in pairwise(cuts)]


def _cuts(longest_first: Sequence[int], size: int, tokens: int | None) -> list[int]:
    """Where rows of these lengths are cut, both ends included."""
    cuts = [0]
    for row in range(1, len(longest_first)):
        rows = row + 1 - cuts[-1]
        if rows > size or (tokens is not None and rows * longest_first[cuts[-1]] > tokens):
            cuts.append(row)
    return [*cuts, len(longest_first)]


def _values(responses: Sequence[Response], evaluations: Sequence[Evaluation]) -> list[FloatArray]:
    found = []
    for response, evaluation in zip(responses, evaluations, strict=True):
        if evaluation.values is None:
            raise DataError(
                f"response {response.id}: no values, which ppo.estimator = 'gae' needs: they come "
                "of a training with that estimator"
            )
        found.append(evaluation.values)
    return found


def _check_lengths(
    responses: Sequence[Response],
    old_logprobs: Sequence[FloatArray],
    evaluations: Sequence[Evaluation],
    task_rewards: Sequence[FloatArray],
) -> None:
    counts = [len(responses), len(old_logprobs), len(evaluations), len(task_rewards)]
    if len(set(counts)) != 1 or not responses:
        raise DataError(
            "a batch needs as many old_logprobs, evaluations and task_rewards as responses, at "
            f"least one: got {counts[1]}, {counts[2]}, {counts[3]} for {counts[0]}"
        )
    for response, old, evaluation, task in zip(
        responses, old_logprobs, evaluations, task_rewards, strict=True
    ):
        shapes = {
            "old_logprobs": old.shape,
            "reference_logprobs": evaluation.reference_logprobs.shape,
            "task_rewards": task.shape,
        }
        if evaluation.values is not None:
            shapes["values"] = evaluation.values.shape
        for name, shape in shapes.items():
            if shape != response.token_ids.shape:
                raise DataError(
                    f"response {response.id}: {name} {shape} for {len(response.token_ids)} tokens"
                )
