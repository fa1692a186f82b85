"""How a run's prompts are split: those of the feedback, those of PPO, those of the evaluation."""

from dataclasses import dataclass

from fgaif.config import Config
from fgaif.data.prompts import SCENES, count_prompts
from fgaif.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rows that there are (``rows`` and ``held_out`` at most as many as wanted) and who gets them.

    Rows whose image turns out to be missing or broken are still among them.
    """

    rows: int
    feedback: int
    ppo: int
    shared: bool
    """PPO gets prompts that the reward models learn from, because there are no others."""
    held_out: int | None
    """None where it was not counted."""

    def line(self, config: Config) -> str:
        """The split in a line."""
        data = config.data
        own = "the same" if self.shared else f"{self.ppo:,} others"
        if data.responses is not None:
            feedback = f"the responses of {data.responses} for feedback"
        else:
            feedback = f"{self.feedback:,} prompts of {data.train} for feedback"
        held_out = (
            "" if self.held_out is None else f"; {self.held_out:,} of {data.held_out} held out"
        )
        return f"{feedback}, {own} for PPO{held_out}"

    def warnings(self, config: Config) -> list[str]:
        """What the split does that nobody may have meant."""
        data, found = config.data, []
        if self.shared and data.responses is None:
            found.append(
                f"{data.train}: PPO trains on the prompts that the reward models learn from, "
                f"because all {self.rows:,} rows go to data.feedback_prompts = "
                f"{data.feedback_prompts}; lower it, or give more rows"
            )
        elif self.ppo < data.ppo_prompts:
            found.append(
                f"{data.train}: {self.ppo:,} rows are left for PPO, of data.ppo_prompts = "
                f"{data.ppo_prompts}; lower data.feedback_prompts, or give more rows"
            )
        if self.held_out is not None and self.held_out < data.eval_prompts:
            found.append(
                f"{data.held_out}: {self.held_out:,} rows, of data.eval_prompts = "
                f"{data.eval_prompts}: intervals will be wider"
            )
        return found


def split_of(config: Config, *, held_out: bool = True) -> Split:
    """Count the rows and tell the split, as ``fgaif.data.sources.split_prompts`` makes it.

    Args:
        held_out: count those of the evaluation too.

    Raises:
        DataError: a file cannot be read.
    """
    data = config.data
    wanted = data.feedback_prompts + data.ppo_prompts
    rows = count_prompts(data.train, data.image_root, wanted)
    feedback = min(rows, data.feedback_prompts)
    left = rows - feedback
    return Split(
        rows=rows,
        feedback=feedback,
        ppo=min(left or rows, data.ppo_prompts),
        shared=not left,
        held_out=count_prompts(data.held_out, data.image_root, data.eval_prompts)
        if held_out
        else None,
    )


def refuse_too_few(split: Split, config: Config) -> None:
    """Refuse to begin a run that wants more prompts for feedback than there are rows.

    Raises:
        ConfigError: says how many there are and how to share them out.
    """
    data = config.data
    if data.responses is not None or data.train.startswith(SCENES):
        return
    if split.rows < data.feedback_prompts:
        most = max(
            1, split.rows * data.feedback_prompts // (data.feedback_prompts + data.ppo_prompts)
        )
        raise ConfigError(
            f"data.feedback_prompts = {data.feedback_prompts}: {data.train} has {split.rows} rows, "
            "so that PPO would train on the prompts that the reward models learn from; give more "
            f"rows, or set data.feedback_prompts={most}, which leaves {split.rows - most} for PPO"
        )
