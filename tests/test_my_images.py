"""Somebody's own photographs and LLaVA-1.5 checkpoint through the same commands as the demo.

The checkpoint has the shape of llava-1.5 (336 px, patch 14, 576 image tokens, Vicuna template,
metaspace BPE) under the public weight names, with few and random weights: what it says means
nothing, so the test looks at the machinery, not at quality. Policy, reward models, reference and
engines are in bfloat16 throughout, as in every configuration for GPUs.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from typer.testing import CliRunner

from cluster.cli.main import app
from fgaif.eval.run_results import REWARDS
from fgaif.types import DEFAULT_KINDS

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, llava15_dir: Path, photos: Path
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("my_images")
    rows = (photos / "prompts.jsonl").read_text().splitlines()
    broken = json.dumps({"id": "gone", "image": "gone.jpg", "prompt": "What is this?"})
    (folder / "train.jsonl").write_text("\n".join([*rows, broken]) + "\n")
    config = {
        "name": "photos",
        "dir": str(folder),
        "data": {
            "train": str(folder / "train.jsonl"),
            "held_out": str(photos / "prompts.jsonl"),
            "image_root": str(photos),
            "feedback_prompts": len(rows),
            "ppo_prompts": len(rows),
            "eval_prompts": 2,
        },
        "policy": {
            "model": str(llava15_dir),
            "dtype": "bfloat16",
            "max_new_tokens": 24,
            "lora": {"r": 4},
        },
        "feedback": {
            "extractor": "segment",
            "verifier": str(llava15_dir),
            "prompt": "faithscore",
            "samples_per_prompt": 2,
        },
        "segment": {"min_words": 2},
        "reward": {"lora": {"r": 4}, "batch_size": 4, "epochs": 1, "evals": 1, "val_fraction": 0.4},
        "ppo": {"steps": 1, "rollout_batch": 2, "minibatch": 2, "micro_batch": 2, "epochs": 1},
        "cluster": {
            "local_cpus": 2,
            **{role: {"cpus": 0.2} for role in ("rollout", "judge", "reference", "learner")},
            "reward": {"cpus": 0.1},
            "engine": {"max_num_seqs": 8, "max_model_len": 1024},
        },
    }
    (folder / "my_images.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "fgaif", "run", "--config", str(folder / "my_images.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "photos", done.stdout


def test_every_stage_runs_and_what_cannot_be_known_is_null(
    finished: tuple[Path, str], llava15_dir: Path
) -> None:
    run, _ = finished
    report = json.loads((run / "report" / "report.json").read_text())
    assert set(report["rewards"]) == set(DEFAULT_KINDS)
    assert report["after"]["sampled"]["length"] > 0
    assert report["after"]["sampled"]["recall"] is None
    assert report["judge"] == f"the verifier {llava15_dir.name}"
    assert list(report["before"]["others"]) == [REWARDS]
    assert report["before"]["judging"]["requests"] > 0
    assert report["after"]["pope"] is None
    assert report["feedback"] == {}
    lines = (run / "policy" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(lines[0])["metrics"]
    assert metrics["mismatch/mean"] < 0.005
    assert metrics["sync/arrived"] >= 0.99
    assert metrics["sync/noise"] > 0
    with safe_open(run / "policy" / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_policy_in_bfloat16_is_exported(finished: tuple[Path, str], tmp_path: Path) -> None:
    """In another precision, and unmerged."""
    run, _ = finished
    settings = ["--config", str(run / "config.yaml")]
    for name, arguments, words in (
        ("whole", ["--dtype", "float32"], "of the update survive in float32"),
        ("alone", ["--adapter-only"], "the adapter, to be loaded on"),
    ):
        done = CliRunner().invoke(app, ["export", str(tmp_path / name), *arguments, *settings])
        assert done.exit_code == 0, done.exception
        assert words in done.stdout.replace("\n", " ")
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    assert (tmp_path / "alone" / "adapter_model.safetensors").is_file()


def test_a_missing_photograph_is_named_and_counted(finished: tuple[Path, str]) -> None:
    run, printed = finished
    assert "gone.jpg" in printed
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["provenance"]["skipped"] == {"rows": 1}
