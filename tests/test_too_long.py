"""A prompt that the engine has no room for is left out before the first step, said and counted."""

import json
from pathlib import Path

import pytest
from PIL import Image
from test_stages import Runs

from actors.vllm_engine import context_length
from fgaif.config import Config
from fgaif.data.prompts import split_by_length
from fgaif.errors import ConfigError, DataError
from fgaif.eval.run_folder import read_run
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.types import ImageRef, Prompt

LONG = {2, 5}
"""Of the prompts 0 to 6: 0-2 are for feedback, 3-6 for PPO."""


class LongRuns(Runs):
    def config(self, *overrides: str) -> Config:
        return super().config(
            f"data.train={self._root}/train.jsonl", "ppo.anchor.weight=0", *overrides
        )


def runs_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: set[int]) -> LongRuns:
    rows = []
    for index in range(7):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
        words = 2000 if index in long else 1
        rows.append({"id": f"p{index}", "image": f"{index}.png", "prompt": "dog " * words})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(text)
    return LongRuns(tmp_path, monkeypatch)


def ids(asked: list[str]) -> set[str]:
    return {name.split("#")[0] for name in asked}


def test_long_prompts_are_left_out_of_sampling_and_ppo_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_with(tmp_path, monkeypatch, LONG)
    runs(only=["sample"])
    assert ids(runs.roles.sampled) == {"p0", "p1"}
    assert "sample: prompts too long: skipped 1 of 3 rows" in runs.printed
    assert "prompt p2: " in runs.printed
    assert "lower policy.max_new_tokens, or raise cluster.engine.max_model_len" in runs.printed
    runs(only=["annotate", "train-reward", "eval-before", "train"])
    assert runs.roles.updates == 4
    assert ids(runs.roles.sampled) == {"p0", "p1", "p3", "p4", "p6"}
    assert "train: prompts too long: skipped 1 of 4 rows" in runs.printed
    kept = json.loads((runs.folder / "data" / "too_long.json").read_text())
    assert kept == {"sample": 1, "train": 1}


def test_the_report_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_with(tmp_path, monkeypatch, {2})
    runs(only=["sample"])
    assert read_run(runs.folder).provenance["skipped"] == {"prompts too long: sample": 1}


def test_a_training_without_some_prompts_goes_on_with_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_with(tmp_path, monkeypatch, LONG)
    runs()
    runs("ppo.steps=6")
    assert set(runs.roles.restored) == {"step_000004"}
    monkeypatch.setattr("cluster.pipeline.stages.context_length", lambda *_: 10**6)
    with pytest.raises(ConfigError, match="restore the prompts it was made with"):
        runs("ppo.steps=8", only=["train"])


def test_nothing_is_said_or_written_where_all_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_with(tmp_path, monkeypatch, set())
    runs()
    assert "too long" not in runs.printed
    assert not (runs.folder / "data" / "too_long.json").exists()


def test_room_for_no_prompt_is_refused_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_with(tmp_path, monkeypatch, set(range(7)))
    with pytest.raises(DataError, match=r"skipped 3 of 3 rows(.|\n)*lower policy.max_new_tokens"):
        runs()
    assert runs.roles.sampled == []


def test_prompts_up_to_the_context_fit() -> None:
    image = ImageRef(path="a.png", sha256="a" * 64)
    prompts = [Prompt(id=str(n), image=image, text="x" * n) for n in (3, 5, 4, 6)]
    fitting, skipped = split_by_length(prompts, lambda prompt: len(prompt.text), 5)
    assert [prompt.id for prompt in fitting] == ["3", "5", "4"]
    assert [(item.row, item.reason) for item in skipped] == [("prompt 6", "6 tokens")]


def test_the_context_is_that_of_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Runs(tmp_path, monkeypatch).config("cluster.engine.max_model_len=64")
    assert context_length(resolve_checkpoint("scenes:policy"), config) == 64
