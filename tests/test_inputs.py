"""Inputs of all stages are looked at before the first starts, and by a dry run."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

import cluster.pipeline.inputs as inputs
import cluster.pipeline.stages as stages
from cluster.cli.main import main
from cluster.pipeline.dry_run import feedback_table
from cluster.pipeline.inputs import wrong_inputs
from cluster.pipeline.keys import ORDER
from cluster.pipeline.stages import run_stages
from fgaif.config import Config, load_config
from fgaif.errors import DataError


class Files:
    """Prompts with pictures, and a run on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        Image.new("RGB", (8, 8)).save(root / "a.png")
        for name in ("train", "held_out", "questions", "given"):
            self.write(name, [{"image": "a.png", "prompt": "What is it?", "response": "A dog."}])

    def write(self, name: str, rows: list[object]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.root / f"{name}.jsonl").write_text(text)

    def overrides(self, *more: str) -> list[str]:
        return [
            f"dir={self.root}/runs", "name=run", f"data.train={self.root}/train.jsonl",
            f"data.held_out={self.root}/held_out.jsonl", "ppo.anchor.weight=1",
            f"ppo.anchor.prompts={self.root}/questions.jsonl", *more,
        ]  # fmt: skip

    def config(self, *more: str) -> Config:
        return load_config(None, self.overrides(*more))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


TYPOS = ["data.train=nowhere/a.jsonl", "data.held_out=nowhere/b.jsonl",
         "ppo.anchor.prompts=nowhere/c.jsonl"]  # fmt: skip


@pytest.mark.parametrize("dry", [True, False])
def test_every_misspelt_file_is_named_before_anything_starts(
    files: Files,
    dry: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stages, "Cluster", None)
    flags = ["--dry-run"] if dry else []
    monkeypatch.setattr(sys, "argv", ["fgaif", "run", *flags, *files.overrides(*TYPOS)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    for line, typo in zip(said, TYPOS, strict=True):
        key, path = typo.split("=")
        assert f"{key}: {path}: No such file or directory; give an existing file" in line
    assert not (files.root / "runs").exists()


def test_right_inputs_are_not_refused(files: Files) -> None:
    assert wrong_inputs(files.config(), ORDER) == {}
    given = files.config(f"data.responses={files.root}/given.jsonl")
    assert wrong_inputs(given, ORDER) == {}
    assert wrong_inputs(load_config(None, [f"dir={files.root}"]), ORDER) == {}


def test_only_the_stages_that_run_are_asked(files: Files) -> None:
    config = files.config(*TYPOS)
    assert set(wrong_inputs(config, ["sample"])) == {"data.train"}
    assert set(wrong_inputs(config, ["eval-before"])) == {"data.held_out"}
    assert set(wrong_inputs(config, ["train"])) == {"data.train", "ppo.anchor.prompts"}
    assert wrong_inputs(config, ["annotate", "train-reward", "report"]) == {}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"picture": "a.png", "prompt": "?"}], "no column `image`, only picture, prompt"),
        ([{"image": "a.png", "text": "?"}], "no column `prompt`"),
        ([{"image": "a.png", "prompt": " "}], "expected a text that is not empty"),
        ([7], "a row must be an object"),
        ([], "no rows"),
        (
            [{"image": "b.png", "prompt": "?", "response": "A."}] * 2,
            "none of the first 2 images can be used",
        ),
    ],
)
def test_rows_and_images_are_looked_at(files: Files, rows: list[object], message: str) -> None:
    for name in ("train", "held_out", "questions", "given"):
        files.write(name, rows)
    config = files.config()
    found = wrong_inputs(config, ORDER)
    assert set(found) == {"data.train", "data.held_out", "ppo.anchor.prompts"}
    given = wrong_inputs(files.config(f"data.responses={files.root}/given.jsonl"), ["sample"])
    for error in (*found.values(), *given.values()):
        assert message in str(error)


def test_a_few_bad_images_are_left_to_the_stage(files: Files) -> None:
    rows = [{"image": name, "prompt": "?"} for name in ("b.png", "a.png")]
    files.write("train", list(rows))
    assert wrong_inputs(files.config(), ["sample"]) == {}


def lfs_pointer(files: Files) -> list[str]:
    ours = Path(inputs.__file__).parents[2] / "fgaif" / "data" / "scenes" / "models" / "policy"
    copy = shutil.copytree(ours, files.root / "checkpoint")
    for weights in copy.glob("*.safetensors"):
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    return [f"reward.backbone={copy}"]


WRONG: dict[str, tuple[Callable[[Files], list[str]], str]] = {
    "policy.model": (lambda _: ["policy.model=nowhere"], "nowhere"),
    "reward.backbone": (lfs_pointer, "LFS"),
    "feedback.verifier": (lambda _: ["feedback.verifier=nowhere"], "config.json does not exist"),
    "endpoints.judge": (
        lambda _: ["feedback.verifier=api:judge", "feedback.extractor=api:judge",
                   "endpoints.judge.model=m", "endpoints.judge.api_key_env=NO_SUCH_KEY"],
        "set the environment variable NO_SUCH_KEY",
    ),
    "feedback": (lambda _: ["feedback.prompt=nowhere.txt"], "nowhere.txt"),
    "ppo.anchor.prompts": (
        lambda _: ["ppo.anchor.prompts=scenes:questions"], "needs the embedded world"
    ),
    "data.held_out": (lambda _: ["data.held_out=scenes:tst"], "known: train, val, test"),
    "data.train": (lambda _: ["data.train=coco:nowhere"], "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_each_input_is_named_with_its_key(
    files: Files, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    overrides, message = WRONG[key]
    wrong = wrong_inputs(files.config(*overrides(files)), ORDER)
    assert key in wrong
    assert message in str(wrong[key])
    assert set(wrong) - {key} <= {"reward.backbone"}  # which is the policy where it is not named


def test_a_full_disk_is_said_before_anything_is_sampled(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(files.root)._replace(free=2**20)
    monkeypatch.setattr(inputs.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"dir: .*runs/run: 1 MiB are free .* dir=FOLDER"):
        run_stages(files.config(), ORDER, False, Console(file=io.StringIO()))


def test_what_judging_captions_asks_is_in_the_plan_and_needs_prices(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two captions of each image, before and after; a cost limit without prices is refused at
    once, not after an hour of sampling."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    given = [
        "endpoints.gpt.model=big", "feedback.verifier=api:gpt", "feedback.extractor=api:gpt",
        "data.held_out=mine.jsonl", "data.eval_prompts=7", "data.feedback_prompts=5",
    ]  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(feedback_table(files.config(*given), ["annotate", "eval-before", "eval-after"]))
    text = console.export_text()
    assert "14 captions before" in text
    assert "14 captions after" in text
    assert text.count("no price set") == 7
    wrong = wrong_inputs(files.config(*given, "feedback.max_cost=5"), ["eval-before"])
    assert "set the prices of a million tokens" in str(wrong["endpoints.gpt"])
