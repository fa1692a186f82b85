"""`fgaif run` with counting as a fourth kind: a configuration, and a model behind an API."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from counting_world import ALL, COLOUR, KINDS, CountingWorld
from fault_server import FaultServer

from fgaif.feedback.store import label_store


@pytest.mark.long
def test_a_run_with_a_fourth_kind(tmp_path: Path) -> None:
    world = CountingWorld(tmp_path, 12)
    rows = [
        {"id": f"{index}", "image": f"{index}.png", "prompt": response.prompt.text}
        for index, response in enumerate(world.responses)
    ]
    said = [row | {"response": world.responses[n].text} for n, row in enumerate(rows)]
    for name, lines in (("prompts", rows), ("said", said)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    with FaultServer(world.reply) as server:
        config = {
            "name": "counted",
            "dir": str(tmp_path),
            "kinds": KINDS,
            "data": {
                "train": str(tmp_path / "prompts.jsonl"),
                "responses": str(tmp_path / "said.jsonl"),
                "held_out": str(tmp_path / "prompts.jsonl"),
                "feedback_prompts": 6,
                "ppo_prompts": 6,
                "eval_prompts": 2,
            },
            "policy": {"max_new_tokens": 24, "lora": {"r": 4}},
            "segment": {"min_words": 4},
            "feedback": {"extractor": "api:world", "verifier": "api:world"},
            "endpoints": {"world": {"model": "world", "base_url": server.base_url}},
            "reward": {"lora": {"r": 4}, "batch_size": 4, "epochs": 1, "evals": 1},
            "ppo": {
                "steps": 2, "rollout_batch": 4, "minibatch": 2, "micro_batch": 2, "epochs": 1,
                "value_init": "counting", "shape": {"order": ["object", "counting"]},
            },
            "cluster": {
                "local_cpus": 2,
                **{role: {"cpus": 0.2} for role in ("rollout", "reference", "learner")},
                "reward": {"cpus": 0.1, "shared": True},
                "engine": {"max_num_seqs": 8, "max_model_len": 256},
            },
        }  # fmt: skip
        file = tmp_path / "counted.yaml"
        file.write_text(yaml.safe_dump(config))
        done = subprocess.run(
            [sys.executable, "-m", "fgaif", "run", "--config", str(file)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OPENAI_API_KEY": "x"},
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "counted"
    labels = list(label_store(run / "feedback" / "labels.jsonl", ALL))
    assert [item.of_kind("counting").tolist() for item in labels] == [
        [0, 1 if right else 2] for right in world.truths
    ]
    assert {path.name for path in (run / "rewards").iterdir()} == set(ALL)
    steps = [json.loads(line) for line in (run / "policy" / "metrics.jsonl").open()]
    assert [f"reward/{kind}" in steps[-1]["metrics"] for kind in ALL] == [True] * 4
    assert steps[-1]["metrics"]["sync/arrived"] == pytest.approx(1)
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["kinds"] == list(report["rewards"]) == list(ALL)
    assert list(report["after"]["sampled"])[:4] == list(ALL)
    assert COLOUR in (run / "report" / "report.html").read_text()
