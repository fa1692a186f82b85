"""``fgaif baseline``: TRL's trainers on pairs and conversations, and DPO in rounds.

RUN/baselines/METHOD/    adapter/, baseline.json, metrics.jsonl
RUN/baselines/dpo-iterative/round-N/   responses.jsonl, preference.jsonl, dpo/adapter/, ...
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from cluster.console import progress_bars
from cluster.pipeline.aside import move_aside
from cluster.pipeline.pairs import (
    BY_REWARDS,
    Score,
    open_rewards,
    pairs_card,
    reward_scores,
    say_pairs,
    scored_texts,
)
from cluster.pipeline.run_lock import driver_lock
from cluster.pipeline.sample import sample_all
from fgaif.baselines.files import (
    PREFERENCES,
    SFT,
    Example,
    Examples,
    check_base,
    examples_of,
    read_preferences,
    read_sft,
    write_pairs,
)
from fgaif.baselines.pairs import make_pairs, require_pairs
from fgaif.baselines.trainer import (
    ADAPTER,
    planned_steps,
    read_result,
    require_trl,
    settings_of,
    train_baseline,
)
from fgaif.baselines.trainer import Method as TrlMethod
from fgaif.config import Config
from fgaif.data.order import request_seed
from fgaif.data.sources import open_source, split_prompts
from fgaif.errors import ConfigError, DataError
from fgaif.feedback.store import response_store
from fgaif.files import write_json
from fgaif.lvlm.adapters import ADAPTER_FILES, read_adapter
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.reward.checkpoint import checkpoint_digest, read_cards
from fgaif.types import GenerationRequest, Prompt, Response

Method = Literal["sft", "dpo", "dpo-iterative"]
Sample = Callable[[Sequence[GenerationRequest], Path | None], Sequence[Response]]
"""Samples responses from the policy with an adapter, or without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineOptions:
    """What ``fgaif baseline`` was asked for."""

    data: Path | None = None
    """Rows to train on; default: those of ``fgaif pairs``."""
    start: Path | None = None
    """Adapter to go on from."""
    any_base: bool = False
    """Take pairs of another policy."""
    rewards: Path | None = None
    """Of dpo-iterative; default: the run's."""
    dry_run: bool = False


def run_baseline(
    config: Config, method: Method, options: BaselineOptions, console: Console
) -> None:
    """Train a baseline unless it is there already; an older one of other settings moves aside.

    Raises:
        FgaifError: what is asked for cannot be done; nothing was changed then.
    """
    require_trl()
    if options.start is not None:
        read_adapter(options.start)
    folder = config.run_dir / "baselines" / method
    if method == "dpo-iterative":
        if options.data is not None or options.any_base:
            raise ConfigError(
                "fgaif baseline dpo-iterative samples its own pairs: leave out --data and "
                "--any-base, or use `fgaif baseline dpo`"
            )
        _run_iterative(config, options, folder, console)
        return
    if options.rewards is not None:
        raise ConfigError("--rewards is for dpo-iterative; `fgaif pairs` scores for the others")
    examples = _open_data(config, method, options)
    if warning := examples.warning():
        console.print(warning, style="yellow", markup=False)
    _say_plan(config, method, len(examples.rows), examples.source, folder, console)
    if options.dry_run:
        return
    with driver_lock(config.run_dir):
        train_in(config, method, examples.rows, folder, options.start, console)


def _open_data(config: Config, method: TrlMethod, options: BaselineOptions) -> Examples:
    name = SFT if method == "sft" else PREFERENCES
    path = options.data or config.run_dir / "pairs" / name
    if not path.is_file():
        raise DataError(f"{path}: no pairs there; make them with `fgaif pairs`, or give --data")
    if not options.any_base:
        model = config.policy.model
        check_base(path, model, checkpoint_digest(resolve_checkpoint(model)))
    read = read_sft if method == "sft" else read_preferences
    return read(path, root=config.data.image_root, max_pixels=config.data.max_image_pixels)


def _say_plan(
    config: Config, method: TrlMethod, rows: int, source: str, folder: Path, console: Console
) -> None:
    lora, settings = config.policy.lora, config.baseline
    rate = settings.sft_lr if method == "sft" else settings.dpo_lr
    console.print(
        f"{method}: {rows} rows of {source}, {planned_steps(rows, config)} steps of "
        f"{settings.batch_size} at {rate:g}, LoRA r = {lora.r}, alpha = {lora.alpha:g} on "
        f"{config.policy.model} -> {folder}",
        markup=False,
        highlight=False,
    )


def train_in(
    config: Config,
    method: TrlMethod,
    examples: Sequence[Example],
    folder: Path,
    start: Path | None,
    console: Console,
) -> None:
    """Train into a folder, go on there, or see that it is done; other settings move it aside."""
    found = read_result(folder)
    same = found.get("settings") == settings_of(method, examples, config, start)
    whole = all((folder / ADAPTER / name).is_file() for name in ADAPTER_FILES)
    if same and found["done"] and whole:
        console.print(f"{folder}: up to date", markup=False, highlight=False)
        return
    if not same and folder.exists():
        name = folder.relative_to(config.run_dir).as_posix()
        label = f"baseline-{folder.name}"
        target = move_aside(config.run_dir, label, [name], {"why": "other settings or rows"})
        console.print(f"{folder} was made with other settings or rows: moved to {target}")
    with progress_bars(console, method) as progress:
        result = train_baseline(
            method,
            examples,
            config,
            folder,
            start=start,
            report=lambda done, total, note: progress(done, total, note=note),
        )
    console.print(
        f"{method}: loss {result['first'].get('loss', float('nan')):.3f} -> "
        f"{result['last'].get('loss', float('nan')):.3f} in {result['steps']} steps, "
        f"{result['seconds']:.0f} s; wrote {folder / ADAPTER}",
        markup=False,
        highlight=False,
    )


def _run_iterative(
    config: Config, options: BaselineOptions, folder: Path, console: Console
) -> None:
    settings = config.baseline
    rewards = options.rewards or config.run_dir / "rewards"
    read_cards(rewards, config.kind_names)
    count = min(settings.round_prompts, config.data.ppo_prompts)
    console.print(
        f"dpo-iterative: {settings.rounds} rounds of {settings.samples} responses to {count} "
        f"prompts, scored with {rewards} -> {folder}",
        markup=False,
        highlight=False,
    )
    if options.dry_run:
        return

    def sample(requests: Sequence[GenerationRequest], adapter: Path | None) -> list[Response]:
        from cluster.launch import Cluster  # Ray: not for SFT and DPO
        from fgaif.lvlm.weights import manifest_from_adapter

        with Cluster(config, {"rollout"}) as cluster:
            if adapter is not None:
                manifest = manifest_from_adapter(adapter, version=1)
                cluster.rollouts().load_weights(manifest).result()
            return sample_all(cluster, requests, "sampling", console)

    def score(responses: Sequence[Response]) -> Iterable[float]:
        return reward_scores(open_rewards(config, rewards), console)(responses)

    with driver_lock(config.run_dir):  # before the embedded world is drawn into the folder
        wanted = config.data.feedback_prompts + config.data.ppo_prompts
        _, prompts = split_prompts(open_source(config.data.train, config, wanted), config)
        run_rounds(config, prompts, folder, options.start, sample, score, console)


def run_rounds(
    config: Config,
    prompts: Sequence[Prompt],
    folder: Path,
    start: Path | None,
    sample: Sample,
    score: Score,
    console: Console,
) -> Path:
    """Rounds of sampling, scoring and DPO; the reference of each is the policy of the one before.

    Responses of a round are kept: an interrupted call goes on in the round where it was. Returns
    the last adapter, copied to ``folder/adapter``.

    Raises:
        DataError: a round has no pairs.
    """
    adapter = start
    for number in range(1, config.baseline.rounds + 1):
        console.rule(f"round {number} of {config.baseline.rounds}", align="left")
        here = folder / f"round-{number}"
        responses = _round_responses(config, prompts, here, number, adapter, sample)
        pairing = make_pairs(scored_texts(responses, score))
        fix = "raise baseline.samples, baseline.round_prompts or policy.temperature"
        require_pairs(pairing, f"{here}", fix)
        write_pairs(here, pairing, pairs_card(config, BY_REWARDS, pairing))
        say_pairs(pairing, here, console)
        train_in(config, "dpo", examples_of(pairing), here / "dpo", adapter, console)
        adapter = here / "dpo" / ADAPTER
    assert adapter is not None
    target = folder / ADAPTER
    partial = folder / f".{ADAPTER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(adapter, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    write_json(folder / "baseline.json", {"done": True, "rounds": config.baseline.rounds})
    console.print(f"wrote {target}", markup=False, highlight=False)
    return target


def _round_responses(
    config: Config,
    prompts: Sequence[Prompt],
    here: Path,
    number: int,
    adapter: Path | None,
    sample: Sample,
) -> list[Response]:
    count = min(config.baseline.round_prompts, len(prompts))
    first = (number - 1) * count
    chosen = [prompts[at % len(prompts)] for at in range(first, first + count)]
    requests = [
        GenerationRequest(
            prompt=prompt,
            sample=index,
            seed=request_seed(config.seed, "dpo-iterative", number, prompt.id, index),
            temperature=config.policy.temperature,
            max_new_tokens=config.policy.max_new_tokens,
        )
        for prompt in chosen
        for index in range(config.baseline.samples)
    ]
    store = response_store(here / "responses.jsonl")
    known = {response.id for response in store}
    todo = [one for one in requests if f"{one.prompt.id}#{one.sample}" not in known]
    if todo:
        store.append(sample(todo, adapter))
    wanted = {f"{one.prompt.id}#{one.sample}" for one in requests}
    return [response for response in store if response.id in wanted]
