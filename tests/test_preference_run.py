"""`fgaif run` with Fact-RLHF's reward model: pairs, captions, and PPO paid at the last token."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

OVERRIDES = (
    "name=fact data.feedback_prompts=60 feedback.samples_per_prompt=2 data.ppo_prompts=32 "
    "data.eval_prompts=8 ppo.steps=2 ppo.rollout_batch=16 ppo.minibatch=16 ppo.micro_batch=16 "
    "reward.form=preference reward.captions=scenes reward.batch_size=8 tracking.rollouts=1"
)


@pytest.mark.long
def test_a_run_of_fact_rlhf(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fgaif", "run", f"dir={tmp_path}", *OVERRIDES.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "fact"
    card = json.loads((run / "rewards" / "preference" / "preference.json").read_text())
    assert card["captions"] == "scenes"
    assert card["pairs"]["train"] + card["pairs"]["val"] == card["pairs"]["pairs"] > 20
    steps = [json.loads(line)["metrics"] for line in (run / "policy" / "metrics.jsonl").open()]
    assert steps[-1]["sync/arrived"] == pytest.approx(1)
    assert steps[-1]["kl/response"] > 0
    _, *rows = map(json.loads, (run / "policy" / "rollouts" / "step_000001.jsonl").open())
    for row in rows:
        assert row["task_rewards"][-1] == pytest.approx(row["reward"], abs=0.51)  # less a penalty
        assert row["reward"] != 0
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["rewards"] == {}
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "train-reward: up to date" in again.stdout
