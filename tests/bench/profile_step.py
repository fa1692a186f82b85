"""CPU seconds of each role's part of a PPO step, in one process on one core, and by operator.

    python tests/bench/profile_step.py RUN [--micro-tokens N] [--operators]

RUN is the folder of a finished run of the demo, of which the first responses and the reward models
are used. Seconds are of the processor, not of the clock: they say the same on a busy machine. Also
printed are page faults, and how many tokens with padding an update reads for one without.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

from actors.learner import LearnerActor
from actors.reference import ReferenceActor
from actors.reward import RewardActor
from fgaif.config import Config, load_config
from fgaif.data.sources import open_anchors, open_source, split_prompts
from fgaif.feedback.segment import segment_response
from fgaif.feedback.store import response_store
from fgaif.lvlm.model import load_processor
from fgaif.ppo.batch import make_batch, micro_batches, minibatches, row_lengths
from fgaif.types import Response, Segment

REPEATS = 3


def read(run: Path, config: Config) -> tuple[list[Response], list[tuple[Segment, ...]]]:
    """A step's responses and their segments."""
    stored = response_store(run / "responses" / "responses.jsonl")
    responses = list(islice(stored, config.ppo.rollout_batch))
    tokenizer = load_processor(config.policy.model).tokenizer
    minimum = config.segment.min_words
    return responses, [segment_response(each, tokenizer, minimum) for each in responses]


def padding(responses: list[Response], config: Config, learner: LearnerActor) -> float:
    """Tokens that an update reads, padding included, over those that it needs."""
    ppo, lengths = config.ppo, row_lengths(responses, learner._encoder.prompt_ids)
    padded = sum(
        len(indexes) * int(lengths[indexes].max())
        for epoch in range(ppo.epochs)
        for rows in minibatches(len(responses), ppo.minibatch, (config.seed, 0, epoch))
        for indexes, _ in micro_batches(
            rows, lengths, size=ppo.micro_batch, tokens=ppo.micro_tokens
        )
    )
    return padded / (ppo.epochs * int(lengths.sum()))


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Median CPU seconds of a few calls after the first, and the last answer."""
    found, answer = [], None
    for _ in range(REPEATS + 1):
        begun = time.process_time()
        answer = action()
        found.append(time.process_time() - begun)
    return statistics.median(found[1:]), answer


def main() -> None:
    """Measure, print the table and, if asked, the operators of the largest parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("--micro-tokens", type=int)
    parser.add_argument("--operators", action="store_true")
    arguments = parser.parse_args()
    tokens = "null" if arguments.micro_tokens is None else str(arguments.micro_tokens)
    config = load_config(arguments.run / "config.yaml", [f"ppo.micro_tokens={tokens}"])
    torch.set_num_threads(1)
    responses, segments = read(arguments.run, config)
    rewards = arguments.run / "rewards"
    learner = LearnerActor(config, 0, 1, "", 0)
    reference = ReferenceActor(config, rewards)
    scorers = {kind: RewardActor(rewards / kind, config) for kind in config.kind_names}
    source = open_source(config.data.train, config, config.data.feedback_prompts + 1000)
    anchors = open_anchors(config, source, split_prompts(source, config)[1])[:64]
    rows: dict[str, float] = {}
    for kind, scorer in scorers.items():
        rows[f"score: {kind}"], _ = seconds(lambda each=scorer: each.score(responses, segments))
    rows["score: reference and values"], evaluations = seconds(
        lambda: reference.evaluate(responses)
    )
    rows["score: learner"], old = seconds(lambda: learner.logprobs(responses))
    rng = np.random.default_rng(0)
    given = [rng.normal(size=len(row)).astype(np.float32) for row in old]
    batch = make_batch(responses, old, evaluations, given, kl_coef=0.1, gamma=1.0, lam=0.95)
    parts = {
        "update: learner": lambda: learner.update(batch, anchors),
        "update: values": lambda: reference.update_values(batch),
    }
    for name, part in parts.items():
        rows[name], _ = seconds(part)
    table = Table(title="CPU seconds of a step, medians", title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    for name, value in rows.items():
        table.add_row(name, f"{value:.3f}")
    table.add_row("all", f"{sum(rows.values()):.3f}")
    console = Console()
    console.print(table)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    console.print(
        f"tokens with padding over those without: {padding(responses, config, learner):.2f}; page "
        f"faults of the process: {faults:,}"
    )
    for name, part in parts.items() if arguments.operators else ():
        with profile(activities=[ProfilerActivity.CPU]) as found:
            part()
        averages = found.key_averages()
        print(name, averages.table(sort_by="self_cpu_time_total", row_limit=12), sep="\n")


if __name__ == "__main__":
    main()
