"""``fgaif pairs``: preference pairs and SFT rows of a run's labels, or of scored responses.

RUN/pairs/    preference.jsonl, sft.jsonl, pairs.json
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cluster.console import progress_bars
from cluster.pipeline.feedback_report import open_labels
from fgaif.baselines.files import PREFERENCES, SFT, PairsCard, write_pairs
from fgaif.baselines.pairs import (
    LabelScore,
    Pairing,
    ScoredText,
    make_pairs,
    mean_words,
    require_pairs,
    score_labels,
)
from fgaif.config import Config
from fgaif.errors import ConfigError
from fgaif.feedback.external import read_responses
from fgaif.lvlm.model import load_processor, resolve_checkpoint
from fgaif.reward.checkpoint import checkpoint_digest, read_cards
from fgaif.serving.rewards import Rewards, load_rewards
from fgaif.types import Response

Score = Callable[[Sequence[Response]], Iterable[float]]
"""What each response is worth as a whole."""

BY_REWARDS = "reward models"
_SCORED_AT_ONCE = 64
_MORE_SAMPLES = (
    "sample several responses per prompt, for example feedback.samples_per_prompt=4 name=NEW, or "
    "give responses of your own with --responses"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOptions:
    """What ``fgaif pairs`` was asked for."""

    score: LabelScore = "hallucinations"
    responses: Path | None = None
    """Responses to score with reward models, instead of the run's labels."""
    rewards: Path | None = None
    """Reward models; default: the run's."""
    per_prompt: int = 1
    least: float = 0.0
    draw: int | None = None


def write_run_pairs(
    config: Config, options: PairOptions, folder: Path | None, console: Console
) -> Pairing:
    """Make the pairs of a run's labels, or of a file's responses, and write them.

    Raises:
        DataError: nothing to make them of, or no pairs.
    """
    scored: Iterable[ScoredText]
    if options.responses is None:
        if options.rewards is not None:
            raise ConfigError("--rewards goes with --responses: a run's labels have their scores")
        source = str(config.run_dir / "feedback" / "labels.jsonl")
        scored = score_labels(open_labels(config), options.score, config.ppo.shape)
        what = f"{options.score} of labels"
    else:
        source, what = str(options.responses), BY_REWARDS
        scored = _score_file(config, options.responses, options.rewards, console)
    pairing = make_pairs(
        scored, per_prompt=options.per_prompt, least=options.least, draw=options.draw
    )
    require_pairs(pairing, source, _MORE_SAMPLES)
    target = folder or config.run_dir / "pairs"
    write_pairs(target, pairing, pairs_card(config, what, pairing))
    say_pairs(pairing, target, console)
    return pairing


def pairs_card(config: Config, score: str, pairing: Pairing) -> PairsCard:
    """The card of pairs of the configured policy."""
    path = resolve_checkpoint(config.policy.model)
    return PairsCard(
        policy=config.policy.model,
        policy_digest=checkpoint_digest(path),
        score=score,
        counts={"pairs": len(pairing.pairs), **pairing.counts},
    )


def say_pairs(pairing: Pairing, target: Path, console: Console) -> None:
    """Print what was made, what was left out, and how long chosen and rejected texts are."""
    chosen = mean_words([pair.chosen for pair in pairing.pairs])
    rejected = mean_words([pair.rejected for pair in pairing.pairs])
    console.print(pairing.summary(), markup=False, highlight=False)
    console.print(
        f"words: chosen {chosen:.1f}, rejected {rejected:.1f} on average\nwrote {target}/"
        f"{PREFERENCES} and {SFT}",
        markup=False,
        highlight=False,
    )


def _score_file(
    config: Config, path: Path, rewards: Path | None, console: Console
) -> Iterable[ScoredText]:
    tokenizer = load_processor(resolve_checkpoint(config.policy.model)).tokenizer
    found = read_responses(
        path, tokenizer, root=config.data.image_root, max_pixels=config.data.max_image_pixels
    )
    if warning := found.warning():
        console.print(warning, style="yellow", markup=False)
    models = open_rewards(config, rewards)
    return scored_texts(found.responses, reward_scores(models, console))


def open_rewards(config: Config, folder: Path | None) -> Rewards:
    """The reward models of the run, or of a folder, for the run's policy."""
    where = folder or config.run_dir / "rewards"
    read_cards(where, config.kind_names)  # says what is missing before anything is loaded
    return load_rewards(
        where,
        backbone=config.reward_backbone,
        policy=config.policy.model,
        dtype=config.policy.dtype,
        attention=config.policy.attention,
        micro_batch=config.reward.micro_batch,
    )


def reward_scores(models: Rewards, console: Console) -> Score:
    """Scores of reward models, with a progress bar."""

    def score(responses: Sequence[Response]) -> list[float]:
        found: list[float] = []
        with progress_bars(console, "scoring") as progress:
            for start in range(0, len(responses), _SCORED_AT_ONCE):
                part = responses[start : start + _SCORED_AT_ONCE]
                found += [item.whole for item in models.score_responses(part)]
                progress(len(found), len(responses))
        return found

    return score


def scored_texts(responses: Sequence[Response], score: Score) -> list[ScoredText]:
    """Responses with their scores."""
    return [
        ScoredText(prompt=one.prompt, text=one.text, score=float(value), finish=one.finish)
        for one, value in zip(responses, score(responses), strict=True)
    ]
