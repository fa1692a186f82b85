"""Train the reward models on Ray Train, stepped by DeepSpeed.

The kinds are dealt to tasks, as many as ``reward.parallel`` allows at the same time. A task is one
Ray Train run of ``reward.workers`` workers that trains its kinds one after the other, so start-up
and image features are paid once per task. Each finished kind is in ``out_dir/KIND`` at once.
"""

import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from cluster.pipeline.keys import kind_of, leaf_keys
from cluster.pipeline.reward_task import RewardTask
from fgaif.config import Config
from fgaif.errors import ActorError, FgaifError
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.reward.checkpoint import CARD, checkpoint_digest, read_card, record_shape
from fgaif.reward.dataset import read_data
from fgaif.types import DEFAULT_KINDS, Kind, LabeledResponse

Progress = Callable[[Kind, int, int, dict[str, float]], None]
"""Told kind, steps done, steps planned and figures. A kind that is skipped, or finished by early
stopping, reports done == planned."""

_POLL_S = 0.2
_RAY_TRAIN_ENV = {
    # Relative image paths must mean the same in the workers as here.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Runs of a minute should not wait 2 s for the controller to notice that they have ended.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # One process less per run: a run that loses its node is simply started again by the user.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def train_rewards(
    config: Config, rows: Sequence[LabeledResponse], out_dir: Path, progress: Progress
) -> dict[Kind, dict[str, float]]:
    """Train and save ``out_dir/KIND`` for every kind; return their metrics on held-out images.

    A kind whose saved model was trained on equal inputs is kept. Ray must be running, and
    ``out_dir`` be on storage that all nodes share.

    Raises:
        DataError: too few images with judged segments.
        ActorError: a worker failed; models that were finished are kept.
    """
    out_dir = out_dir.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    backbone = checkpoint_digest(resolve_checkpoint(config.reward_backbone))
    kinds = config.kind_names
    digests = {kind: input_digest(kind, rows, config, backbone) for kind in kinds}
    earlier = {kind: input_digest(kind, rows, config, backbone, ("micro_batch",)) for kind in kinds}
    pending = [
        kind for kind in kinds if not _is_done(out_dir / kind, {digests[kind], earlier[kind]})
    ]
    for kind in kinds:
        if kind not in pending:
            record_shape(out_dir / kind, config.ppo.shape)
            progress(kind, 1, 1, read_card(out_dir / kind).metrics)
    for kind in pending:  # data that cannot be trained on is found before anything is started
        read_data(kind, rows, config)
    if pending:
        slim = ray.put([replace(row, facts=(), verdicts={}) for row in rows])
        parts = np.array_split(pending, min(config.reward.parallel, len(pending)))

        def fits(queue: Queue) -> list[Callable[[], None]]:
            return [
                partial(
                    _fit,
                    RewardTask(
                        kinds=tuple(str(kind) for kind in part),
                        digests=digests,
                        backbone_digest=backbone,
                        rows=slim,
                        config=config,
                        out_dir=out_dir,
                        queue=queue,
                    ),
                )
                for part in parts
            ]

        run_trainings(config, fits, progress)
    return {kind: read_card(out_dir / kind).metrics for kind in kinds}


def input_digest(
    kind: Kind,
    rows: Sequence[LabeledResponse],
    config: Config,
    backbone_digest: str,
    counting: Collection[str] = (),
) -> str:
    """SHA-256 of everything that a reward model depends on, apart from how it is executed.

    ``counting`` names keys of execution that count too, as in digests of earlier versions.
    """
    keys = [key for key in leaf_keys() if key.startswith("reward.")]
    results = {key for key in keys if kind_of(config, "train-reward", key) == "result"}
    counted = {key.split(".")[1] for key in results}.union(counting)
    # The backbone's digest tells more than its name; of the noise only this kind's counts.
    # Those of preference models, which these are not, would change the digests of earlier versions.
    counted -= {"backbone", "noise", "noise_seed", "form", "pairs", "captions"}
    noise = config.reward.noise.get(kind)
    settings = config.reward.model_dump_json(include=counted)
    parts = [kind, settings, str(config.seed), config.policy.dtype, backbone_digest]
    if noise is not None:  # without noise the digest is that of versions that knew none
        parts += [noise.model_dump_json(), str(config.reward.noise_seed)]
    if config.kind_names != DEFAULT_KINDS:  # the seeds depend on number and place
        parts.append(" ".join(config.kind_names))
    digest = hashlib.sha256("\n".join(parts).encode())
    for row in rows:
        response = row.response
        spans = [(s.token_start, s.token_end) for s in row.segments]
        digest.update(f"{response.prompt.image.sha256}{response.prompt.text}{spans}".encode())
        digest.update(response.token_ids.tobytes())
        digest.update(row.of_kind(kind).tobytes())
    return digest.hexdigest()


def _is_done(directory: Path, digests: Collection[str]) -> bool:
    return (directory / CARD).is_file() and read_card(directory).input_digest in digests


def run_trainings(
    config: Config, fits: Callable[[Queue], Sequence[Callable[[], None]]], progress: Progress
) -> None:
    """Run Ray Train runs at the same time, which ``fits`` makes of the queue they report to.

    Raises:
        FgaifError: the first cause of the first that failed.
    """
    os.environ.update(_RAY_TRAIN_ENV)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.cluster.start_timeout_s)
    queue = Queue(actor_options={"num_cpus": 0})
    try:
        _follow(fits(queue), queue, progress)
    finally:
        queue.shutdown(force=True)


def _follow(fits: Sequence[Callable[[], None]], queue: Queue, progress: Progress) -> None:
    """Run trainings at the same time and pass on what they report, until all have ended.

    Raises:
        FgaifError: the first cause of the first that failed.
    """
    failures: list[Exception] = []

    def run(fit: Callable[[], None]) -> None:
        try:
            fit()
        except Exception as error:  # kept for the main thread, which raises it
            failures.append(error)

    # Daemons: Ctrl-C in the main thread must not wait for them.
    threads = [threading.Thread(target=run, args=(fit,), daemon=True) for fit in fits]
    for thread in threads:
        thread.start()
    running = True
    while running:
        running = any(thread.is_alive() for thread in threads)
        try:
            while True:
                progress(*queue.get(timeout=_POLL_S))
        except Empty:
            continue
    if failures:
        raise explain_failure(failures[0]) from failures[0]


def _fit(task: RewardTask) -> None:
    def train(settings: dict[str, RewardTask]) -> None:
        # Nested, so that it travels by value: Ray Train's controller imports it too, and it should
        # not wait for torch, transformers and peft, which only the workers need.
        from cluster.pipeline.reward_worker import run_reward_task

        run_reward_task(settings["task"])

    fit_in_ray_train(
        train, task, task.config, task.out_dir,
        name="-".join(task.kinds), workers=task.config.reward.workers,
    )  # fmt: skip


def fit_in_ray_train(
    train: Callable[[dict[str, Any]], None],
    task: Any,
    config: Config,
    out_dir: Path,
    *,
    name: str,
    workers: int,
) -> None:
    """Run ``train({"task": task})`` in workers of Ray Train with the resources of ``reward``."""
    settings = config.reward
    scratch = tempfile.mkdtemp(prefix=".ray-train-", dir=out_dir)
    resources = {"CPU": settings.cpus_per_worker}
    if settings.gpus_per_worker:
        resources["GPU"] = settings.gpus_per_worker
    try:
        TorchTrainer(
            train,
            train_loop_config={"task": task},
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=scratch,
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def explain_failure(error: Exception) -> FgaifError:
    """The first cause of a failed run: our own error as it is, else its type and message."""
    failed = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failed.items()):
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, FgaifError):
            return type(cause)(str(cause))
        return ActorError(
            f"reward training, worker {rank}: {type(cause).__name__}: {cause}; finished reward "
            "models are kept, run the command again to train the others"
        )
    return ActorError(f"reward training failed: {error}")
