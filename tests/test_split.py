"""Who gets which prompts is said and, where a run cannot begin with them, refused."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from test_stages import Runs

from cluster.pipeline.dry_run import print_plan
from cluster.pipeline.split import split_of
from fgaif.config import Config, load_config
from fgaif.data.prompts import count_prompts
from fgaif.data.sources import open_source, split_prompts
from fgaif.errors import ConfigError


def prompts(path: Path, count: int) -> Path:
    Image.new("RGB", (4, 4)).save(path.parent / "a.png")
    rows = [json.dumps({"image": "a.png", "prompt": "?", "id": str(n)}) for n in range(count)]
    path.write_text("\n".join([*rows, ""]))
    return path


def settings(folder: Path, rows: int, feedback: int, ppo: int) -> Config:
    train = prompts(folder / "train.jsonl", rows)
    held_out = prompts(folder / "held.jsonl", 3)
    return load_config(
        None,
        [
            f"dir={folder / 'runs'}", f"data.train={train}", f"data.held_out={held_out}",
            f"data.feedback_prompts={feedback}", f"data.ppo_prompts={ppo}", "data.eval_prompts=5",
            "ppo.anchor.weight=0",
        ],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "feedback", "ppo"), [(9, 4, 5), (9, 7, 5), (9, 9, 5), (9, 20, 5), (9, 1, 2)]
)
def test_the_split_is_the_one_that_the_stages_make(
    tmp_path: Path, rows: int, feedback: int, ppo: int
) -> None:
    config = settings(tmp_path, rows, feedback, ppo)
    source = open_source(config.data.train, config, feedback + ppo)
    for_feedback, for_ppo = split_prompts(source, config)
    split = split_of(config)
    assert (split.feedback, split.ppo) == (len(for_feedback), len(for_ppo))
    assert split.shared == bool({p.id for p in for_feedback} & {p.id for p in for_ppo})
    assert split.held_out == 3


def plan(config: Config) -> str:
    console = Console(width=1000, record=True, file=io.StringIO())
    print_plan(config, ["sample", "train"], False, console, full=False)
    return console.export_text()


def test_few_prompts_for_ppo_are_said(tmp_path: Path) -> None:
    said = plan(settings(tmp_path, 10, 8, 5))
    assert f"8 prompts of {tmp_path}/train.jsonl for feedback, 2 others for PPO" in said
    assert "2 rows are left for PPO, of data.ppo_prompts = 5" in said
    shared = plan(settings(tmp_path, 8, 8, 5))
    assert "8 prompts of" in shared
    assert "the same for PPO" in shared
    assert "PPO trains on the prompts that the reward models learn from" in shared
    assert "warning" not in plan(settings(tmp_path, 13, 8, 5))


def test_more_prompts_wanted_than_there_are_rows_is_refused_with_numbers_that_work(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"train\.jsonl has 6 rows.*leaves 3 for PPO") as refused:
        plan(settings(tmp_path, 6, 4000, 4000))
    assert "set data.feedback_prompts=3," in str(refused.value)
    assert "3 others for PPO" in plan(settings(tmp_path, 6, 3, 4000))


def test_a_run_says_it_too_and_begins_with_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(tmp_path, monkeypatch)
    runs()
    assert "3 prompts of scenes:train for feedback, 4 others for PPO" in runs.printed
    train = prompts(tmp_path / "p.jsonl", 2)
    with pytest.raises(ConfigError, match=r"has 2 rows.*data\.feedback_prompts=1"):
        runs("name=mine", f"data.train={train}", "ppo.anchor.weight=0")
    assert not (tmp_path / "mine").exists()


def test_rows_are_counted_no_further_than_wanted(tmp_path: Path) -> None:
    assert count_prompts("scenes:train", None, 7) == 7
    assert count_prompts(str(prompts(tmp_path / "p.jsonl", 5)), None, 3) == 3
    assert count_prompts(str(tmp_path / "p.jsonl"), None, 9) == 5
