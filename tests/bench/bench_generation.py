"""Answers of `fgaif eval --model` against the bare rollout pool: the same questions, side by side.

    python tests/bench/bench_generation.py [--questions 1024] [--rounds 3]

The embedded policy captions drawn scenes greedily, once through ``generate_answers`` (cache, files,
chunks) and once by one call of the pool. Rounds alternate. Prints a JSON object: tokens per second
of both, and the median ratio.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from cluster.evaluation.generate import ModelSpec, generate_answers, generation_config
from cluster.groups.rollout_group import RolloutGroup
from cluster.launch import Cluster
from fgaif.config import load_config
from fgaif.data.prompts import load_prompts
from fgaif.eval.questions import QuestionSet
from fgaif.types import GenerationRequest, Prompt

CONFIG = Path(__file__).parents[2] / "configs" / "scenes.yaml"
TOKENS = 96


def direct(pool: RolloutGroup, prompts: tuple[Prompt, ...]) -> tuple[float, int]:
    """Seconds and tokens of one call of the pool."""
    requests = [
        GenerationRequest(prompt=prompt, temperature=0.0, max_new_tokens=TOKENS)
        for prompt in prompts
    ]
    start = time.perf_counter()
    responses = pool.generate(requests).result()
    return time.perf_counter() - start, sum(len(item.token_ids) for item in responses)


def benchmark(
    pool: RolloutGroup, model: ModelSpec, prompts: tuple[Prompt, ...], folder: Path
) -> float:
    """Seconds of the way that the command line takes, answer file included."""
    names = tuple(Path(prompt.image.path).name for prompt in prompts)
    questions = QuestionSet(
        prompts=prompts, images=names, max_new_tokens=TOKENS, file=folder / "answers_chair.jsonl"
    )
    start = time.perf_counter()
    generate_answers(model, [questions], folder / "answers.jsonl", lambda: pool)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = ModelSpec.parse("scenes:policy")
    config = generation_config(load_config(CONFIG), model)
    rates: dict[str, list[float]] = {"pool": [], "fgaif eval": []}
    with tempfile.TemporaryDirectory() as name, Cluster(config, {"rollout"}) as cluster:
        folder = Path(name)
        prompts = load_prompts("scenes:test", limit=options.questions, cache=folder).prompts
        pool = cluster.rollouts()
        direct(pool, prompts[:256])  # the engine warms up
        for number in range(options.rounds):
            seconds, tokens = direct(pool, prompts)
            rates["pool"].append(tokens / seconds)
            fresh = folder / str(number)
            fresh.mkdir()
            rates["fgaif eval"].append(tokens / benchmark(pool, model, prompts, fresh))
    pairs = zip(rates["fgaif eval"], rates["pool"], strict=True)
    result = {
        "questions": options.questions,
        "tokens_per_s": {way: [round(rate) for rate in values] for way, values in rates.items()},
        "ratio_median": round(statistics.median(a / b for a, b in pairs), 3),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
