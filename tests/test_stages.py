"""What a changed key, --force and --resume do to a run: finished work moves, and is never removed.

The stages run over fakes: sampling and PPO are the real ones over fake roles, labels, reward models
and evaluations are files that say what they were made from.
"""

import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import World, two_segments
from PIL import Image
from rich.console import Console

import cluster.pipeline.dry_run as dry_run
import cluster.pipeline.stages as stages
from cluster.pipeline.aside import OUTPUTS, move_aside, next_aside
from cluster.pipeline.dry_run import print_plan
from cluster.pipeline.keys import ORDER, Stage
from cluster.pipeline.stage_status import StageStatus
from cluster.pipeline.stages import make_report
from fgaif.config import Config, load_config
from fgaif.errors import ActorError, CheckpointError, ConfigError, DataError, DivergedError
from fgaif.feedback.store import response_store
from fgaif.pending import Then
from fgaif.ppo.metrics import require_finite
from fgaif.types import GenerationRequest, Response

SMALL = [
    "data.feedback_prompts=3", "data.ppo_prompts=4", "ppo.steps=4", "ppo.rollout_batch=2",
    "ppo.minibatch=2", "ppo.checkpoint_every=2", "ppo.keep_checkpoints=9",
]  # fmt: skip


class Roles(World):
    """The fake roles, with what stages ask of a cluster besides; ``updates`` counts PPO steps."""

    live = None

    def __init__(self) -> None:
        super().__init__()
        self.sampled: list[str] = []
        self.restored: list[str] = []
        self.dies_at_update = 0
        self.diverges_at: float | None = None

    def __enter__(self) -> "Roles":
        return self

    def __exit__(self, *_: object) -> None: ...

    @property
    def updates(self) -> int:
        return self.events.count("update policy")

    def rollouts(self) -> "Roles":
        return self

    learner = rollouts

    def rewards(self, _: Path) -> "Roles":
        return self

    reference = rewards

    def judges(self) -> None: ...

    def engines(self) -> int:
        return 1

    def generate(
        self, requests: Sequence[GenerationRequest], version: int | None = None, chunk: int = 0
    ) -> Then[list[Response | None]]:
        self.sampled += [f"{request.prompt.id}#{request.sample}" for request in requests]
        return super().generate(requests, version)

    def update(self, *arguments: Any) -> Any:
        if self.updates + 1 == self.dies_at_update:
            raise ActorError("learner-0 died")
        if self.diverges_at is not None and self.updates == 2:
            require_finite(3, {"policy/loss": float("nan")}, "ppo.lr", self.diverges_at)
        return super().update(*arguments)

    def restore(self, path: Path) -> Any:
        self.restored.append(path.parent.name)
        return super().restore(path)


class Runs:
    """One run folder and commands on it."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = tmp_path
        self.folder = tmp_path / "scenes"
        self.done: list[str] = []
        self.roles = Roles()
        self.printed = ""
        patch = monkeypatch.setattr
        patch(stages, "Cluster", lambda *_, **__: self.roles)
        patch(stages, "make_report", lambda config, *_: config.run_dir / "report")
        patch(dry_run, "_label_damage", lambda _: "")  # the labels here are no labels
        patch(stages.Run, "_segmenter", lambda _, response: two_segments(response))
        patch(stages.Run, "_malformed", lambda *_: ())
        patch(stages.Run, "annotate", lambda run: self._annotate())
        patch(stages.Run, "train_reward", lambda run: self._write("rewards/object/reward.json"))
        patch(stages.Run, "evaluate", lambda run, phase: self._evaluate(phase))
        real = stages.Run.stage
        patch(stages.Run, "stage", lambda run, name: (self.done.append(name), real(run, name)))

    def config(self, *overrides: str) -> Config:
        return load_config(None, [f"dir={self._root}", *SMALL, *overrides])

    def checkpoint(self, step: int) -> Path:
        return self.folder / "policy" / "checkpoints" / f"step_{step:06d}"

    def __call__(self, *overrides: str, only: Sequence[Stage] = ORDER, force: bool = False) -> None:
        """Run a command; ``done`` lists the stages that ran, ``printed`` what it said."""
        self.done, self.roles = [], Roles() if self.roles.updates else self.roles
        console = Console(width=1000, record=True, file=io.StringIO())
        try:
            stages.run_stages(self.config(*overrides), only, force, console)
        finally:
            self.printed = console.export_text()

    def dry(self, *overrides: str, only: Sequence[Stage] = ORDER, force: bool = False) -> str:
        console = Console(width=1000, record=True, file=io.StringIO())
        print_plan(self.config(*overrides), only, force, console)
        return console.export_text()

    def _annotate(self) -> None:
        responses = list(response_store(self.folder / "responses" / "responses.jsonl"))
        labels = self.folder / "feedback" / "labels.jsonl"
        labels.parent.mkdir(exist_ok=True)
        known = len(labels.read_text().splitlines()) if labels.exists() else 0
        with labels.open("a") as file:
            file.writelines(f"label of {response.id}\n" for response in responses[known:])

    def _evaluate(self, phase: str) -> None:
        self._write(f"eval/{phase}.json")
        self._write(f"eval/{phase}_captions.jsonl")

    def _write(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}, written by {len(self.done)} stages\n")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs(tmp_path, monkeypatch)
    made()
    assert made.done == list(ORDER[:-1])
    return made


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder that a stage wrote, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("stages.json", "config.yaml", "driver.lock")
    }


def files_in(found: dict[str, bytes]) -> dict[str, bytes]:
    """Those of ``everything`` that a stage wrote."""
    own = ("stages.json", "config.yaml", "driver.lock")
    return {name: content for name, content in found.items() if Path(name).name not in own}


def missing(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """What was there before and is nowhere now, neither in its place nor aside."""
    kept = list(after.values())
    return [name for name, content in before.items() if content not in kept]


@pytest.mark.parametrize(
    "override",
    ["ppo.micro_batch=1", "policy.gradient_checkpointing=true", "policy.attention=eager",
     "ppo.max_staleness=1", "reward.parallel=3", "reward.micro_batch=1", "reward.zero_stage=0",
     "cluster.engine.adapters=merged"],
)  # fmt: skip
def test_a_finished_run_stays_done_when_only_its_execution_changes(
    runs: Runs, override: str
) -> None:
    before = files(runs.folder)
    runs(override)
    assert runs.done == []
    assert files(runs.folder) == before


def test_a_result_key_moves_the_outputs_aside_and_names_itself(runs: Runs) -> None:
    before = files(runs.folder)
    said = runs.dry("ppo.lr=1e-5")
    assert files(runs.folder) == before, "a dry run changes nothing"
    runs("ppo.lr=1e-5")
    assert runs.done == ["train", "eval-after"]
    after = files(runs.folder)
    assert missing(before, after) == []
    aside = {name: content for name, content in before.items() if name.startswith("policy/")}
    assert {name: after[f"aside/train-1/{name}"] for name in aside} == aside
    for text, verb in ((said, "moves"), (runs.printed, "moved")):
        assert f"train: {verb} policy to {runs.folder / 'aside' / 'train-1'}: " in text
        assert "ppo.lr was 3e-05, is 1e-05" in text
    note = json.loads((runs.folder / "aside" / "train-1" / "aside.json").read_text())
    assert note["why"] == "ppo.lr was 3e-05, is 1e-05"
    assert note["stages.json"]["keys"]["ppo.lr"] == 3e-5
    runs("ppo.lr=2e-5")
    assert missing(after, files(runs.folder)) == []
    assert (runs.folder / "aside" / "train-2" / "policy").is_dir()


def test_force_moves_aside_too(runs: Runs) -> None:
    before = files(runs.folder)
    runs(force=True)
    assert runs.done == list(ORDER[:-1])
    assert missing(before, files(runs.folder)) == []
    moved = {path.name for path in (runs.folder / "aside").iterdir()}
    assert moved == {f"{stage}-1" for stage in ORDER[:-1]}


def test_more_steps_go_on_from_the_last_checkpoint(runs: Runs) -> None:
    before = files(runs.folder)
    assert "go on" in runs.dry("ppo.steps=6")
    runs("ppo.steps=6")
    assert runs.done == ["train", "eval-after"]
    assert set(runs.roles.restored) == {"step_000004"}
    assert runs.roles.updates == 2
    kept = files(runs.folder)
    checkpoints = [name for name in before if name.startswith("policy/checkpoints/step_")]
    assert checkpoints
    assert all(kept[name] == before[name] for name in checkpoints)
    assert any(name.startswith("aside/train-1/policy/adapter/") for name in kept)


def test_more_prompts_go_on_in_sampling_and_labelling(runs: Runs) -> None:
    before = files(runs.folder)
    runs("data.feedback_prompts=5", only=("sample", "annotate"))
    assert runs.done == ["sample", "annotate"]
    assert len(runs.roles.sampled) == 2 * runs.config().feedback.samples_per_prompt
    after = files(runs.folder)
    for name in ("responses/responses.jsonl", "feedback/labels.jsonl"):
        assert after[name].startswith(before[name])
        assert len(after[name]) > len(before[name])


def test_an_interrupted_training_goes_on_with_another_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkpoints of an interrupted run were lost to such a key."""
    runs = interrupted(tmp_path, monkeypatch, at=4)
    kept = runs.checkpoint(3)
    before = files(kept)
    runs("ppo.resume=latest", "ppo.micro_batch=1")
    assert set(runs.roles.restored) == {kept.name}
    assert files(kept) == before
    assert not (runs.folder / "aside").exists()


@pytest.mark.parametrize(
    ("overrides", "force", "message"),
    [
        (("ppo.resume=latest", "ppo.lr=1e-5"), False, r"ppo\.lr was 3e-05, is 1e-05"),
        (("ppo.steps=2",), False, r"ppo\.steps = 2, but the training .* has gone 4 steps"),
        (("ppo.resume=latest",), True, "leave out one of them"),
    ],
)
def test_what_cannot_go_on_is_refused_before_anything_changes(
    runs: Runs, overrides: tuple[str, ...], force: bool, message: str
) -> None:
    before = files(runs.folder)
    for command in (runs, runs.dry):
        with pytest.raises(ConfigError, match=message):
            command(*overrides, force=force)
    assert files(runs.folder) == before


@pytest.mark.parametrize("place", ["own", "elsewhere"])
def test_a_result_key_changed_on_a_named_checkpoint_is_refused_with_both_values(
    runs: Runs, place: str, tmp_path: Path
) -> None:
    checkpoint = runs.checkpoint(2)
    if place == "elsewhere":
        checkpoint = shutil.copytree(checkpoint, tmp_path / "kept" / checkpoint.name)
    before = files(runs.folder)
    for command in (runs, runs.dry):
        with pytest.raises(
            ConfigError,
            match=rf"{checkpoint} was made with other settings: ppo\.lr was 3e-05, is 1e-05",
        ):
            command(f"ppo.resume={checkpoint}", "ppo.lr=1e-5", only=["train"])
    assert files(runs.folder) == before


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> Runs:
    runs = Runs(tmp_path, monkeypatch)
    runs.roles.dies_at_update = at
    with pytest.raises(ActorError):
        runs("ppo.checkpoint_every=1")
    return runs


def damage(checkpoint: Path) -> None:
    (checkpoint / "learner" / "state.json").write_text('{"parameter": 7, "values": 7}')


@pytest.mark.parametrize("which", ["named", "latest", "unsaid"])
def test_damaged_checkpoints_are_neither_trained_on_nor_overwritten(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = interrupted(tmp_path, monkeypatch, at=4)
    for step in (1, 2, 3):
        damage(runs.checkpoint(step))
    before = files(runs.folder)
    named = f"ppo.resume={runs.checkpoint(2)}"
    override = {"named": [named], "latest": ["ppo.resume=latest"], "unsaid": []}[which]
    for command in (runs, runs.dry):
        with pytest.raises(CheckpointError, match=r"step_000002.*damaged") as refused:
            command(*override, only=["train"])
        assert "step_000003" in str(refused.value), "says what is there"
    assert files(runs.folder) == before


def test_latest_passes_by_a_damaged_one_where_an_older_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = interrupted(tmp_path, monkeypatch, at=4)
    damage(runs.checkpoint(3))
    runs("ppo.resume=latest", only=["train"])
    assert set(runs.roles.restored) == {"step_000002"}


def test_latest_with_nothing_there_is_refused_and_without_it_the_training_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(tmp_path, monkeypatch)
    for command in (runs, runs.dry):
        with pytest.raises(CheckpointError, match=r"no step is kept in .*leave out ppo\.resume"):
            command("ppo.resume=latest")
    assert not runs.folder.exists()
    runs = interrupted(tmp_path, monkeypatch, at=1)
    with pytest.raises(CheckpointError, match="no step is kept"):
        runs("ppo.resume=latest")
    runs.roles.dies_at_update = 0
    runs()
    assert runs.roles.restored == []
    assert runs.roles.updates == runs.config().ppo.steps


def test_the_advice_after_a_loss_that_is_no_number_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lower the named key by the named value, leave out ppo.resume: nothing is lost, it trains."""
    runs = Runs(tmp_path, monkeypatch)
    runs.roles.diverges_at = runs.config().ppo.lr
    with pytest.raises(DivergedError) as stopped:
        runs()
    message = str(stopped.value)
    assert message.endswith(f"\nStep 2 is kept in {runs.checkpoint(2)}")
    assert "ppo.resume=latest" not in message, "going on from there would end the same"
    advice = re.search(r"lower (\S+) = (\S+) and train anew, without ppo\.resume", message)
    assert advice
    before = files(runs.folder)
    runs(f"{advice[1]}={float(advice[2]) / 10}", only=["train"])
    assert runs.roles.updates == runs.config().ppo.steps
    assert runs.roles.restored == []
    assert missing(before, files(runs.folder)) == []
    assert (runs.folder / "aside" / "train-1" / "policy" / "checkpoints" / "step_000002").is_dir()


def test_a_finished_training_does_not_pass_by_a_checkpoint_that_is_not_there(runs: Runs) -> None:
    before = everything(runs.folder)
    with pytest.raises(CheckpointError, match="nope"):
        runs("ppo.resume=nope", only=["train"])
    assert everything(runs.folder) == before


def test_nothing_aside_is_ever_overwritten(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "policy").mkdir()
        target = move_aside(tmp_path, "train", ["policy"], {"why": "test"})
        assert target == tmp_path / "aside" / f"train-{number}"
    assert next_aside(tmp_path, "train").name == "train-3"
    assert set(OUTPUTS) == set(ORDER)


# Outputs that are gone, and files that were edited.


@pytest.mark.parametrize(
    ("gone", "redone"),
    [
        ("policy", ["train", "eval-after"]),
        ("policy/adapter", ["train", "eval-after"]),
        ("rewards", ["train-reward", "eval-before", "train", "eval-after"]),
        ("responses/responses.jsonl", list(ORDER[:-1])),
        ("eval/before.json", ["eval-before"]),
    ],
)
def test_outputs_that_are_gone_are_made_again(runs: Runs, gone: str, redone: list[str]) -> None:
    path = runs.folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = everything(runs.folder)
    if redone[0] != "sample":  # whose dry run would read the fake labels
        assert f"{redone[0]}: " in (said := runs.dry())
        assert gone in said
    runs()
    assert runs.done == redone
    assert path.exists()
    assert missing(files_in(kept), files(runs.folder)) == []
    runs()
    assert runs.done == []


def test_a_lost_adapter_is_written_again_from_the_last_checkpoint(runs: Runs) -> None:
    adapter = runs.folder / "policy" / "adapter"
    before = files(adapter)
    shutil.rmtree(adapter)
    runs(only=["train"])
    assert runs.roles.updates == 0
    assert set(runs.roles.restored) == {"step_000004"}
    assert files(adapter) == before


def test_a_stage_is_not_begun_on_inputs_that_are_gone(runs: Runs) -> None:
    shutil.rmtree(runs.folder / "rewards")
    with pytest.raises(DataError, match=r"train needs train-reward, of which rewards/.* is gone"):
        runs(only=["train"], force=True)


def test_what_a_stage_hashes_is_kept_for_the_next_command(runs: Runs, tmp_path: Path) -> None:
    rows, old = [], time.time() - 60
    for number in range(4):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
        os.utime(path, (old, old))
        rows.append({"image": path.name, "prompt": "What?"})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = runs.config("name=photos", f"data.train={tmp_path / 'p.jsonl'}", "ppo.anchor.weight=0")
    run = stages.Run(config, runs.roles, Console(file=io.StringIO()))  # type: ignore[arg-type]
    assert len(run.train_source.prompts.prompts) == 4
    kept = json.loads((config.run_dir / "data" / "hashes.json").read_text())
    assert set(kept) == {str(tmp_path / f"{number}.png") for number in range(4)}


def test_edited_labels_make_the_reward_models_anew(runs: Runs) -> None:
    with (runs.folder / "feedback" / "labels.jsonl").open("a") as file:
        file.write("one more\n")
    before = files(runs.folder)
    runs()
    assert runs.done == ["train-reward", "eval-before", "train", "eval-after"]
    assert "train-reward: moved rewards to " in runs.printed
    assert "labels.jsonl were edited" in runs.printed
    assert missing(before, files(runs.folder)) == []


def test_a_command_without_work_and_a_refused_one_change_no_settings(runs: Runs) -> None:
    before = everything(runs.folder)
    runs("ppo.micro_batch=1")
    with pytest.raises(DataError, match="train needs train-reward"):
        runs("seed=7", only=["train"])
    assert everything(runs.folder) == before
    runs("ppo.lr=1e-5", only=["train"])
    kept = StageStatus(runs.folder).entries()
    assert kept["train"]["config"]["ppo"]["lr"] == 1e-5
    assert kept["sample"]["config"]["ppo"]["lr"] == 3e-5


# Guards: what is refused changes nothing.


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a folder by name, and what they hold."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("command", ["run", "dry run", "report", "forced"])
def test_a_folder_that_fgaif_did_not_make_is_left_alone(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(tmp_path, monkeypatch)
    theirs = runs.folder / "policy" / "law.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    (runs.folder / "config.yaml").write_text("of: another program")
    before = everything(tmp_path)
    act = {
        "run": runs,
        "dry run": runs.dry,
        "forced": partial(runs, force=True),
        "report": partial(make_report, runs.config(), Console(file=io.StringIO())),
    }[command]
    with pytest.raises(DataError, match=r"holds config\.yaml, policy, but no run of fgaif"):
        act()
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", [".", "..", "a/b", ""])
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name = "):
        load_config(None, [f"dir={tmp_path}", f"name='{name}'"])


class Full(Roles):
    """A cluster without room: it refuses when it is entered."""

    def __enter__(self) -> "Roles":
        raise ConfigError("learner-0: needs 99 CPUs")


def test_a_command_that_the_cluster_refuses_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(tmp_path, monkeypatch)
    runs.roles = Full()
    with pytest.raises(ConfigError, match="99 CPUs"):
        runs()
    assert list(tmp_path.iterdir()) == []
    runs.roles = Roles()
    runs()
    before = everything(tmp_path)
    monkeypatch.setattr(stages, "Cluster", lambda *_, **__: Full())
    with pytest.raises(ConfigError, match="99 CPUs"):
        runs("ppo.lr=1e-5", "seed=3")
    assert everything(tmp_path) == before


def test_a_second_driver_changes_nothing_of_the_first_one_s(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config.yaml was overwritten before the second was refused."""

    def refused(*_: Any) -> None:
        raise ActorError("another run works in this folder")

    before = everything(runs.folder)
    monkeypatch.setattr(stages, "driver_lock", refused)
    with pytest.raises(ActorError, match="another run works"):
        runs("ppo.lr=1e-5")
    assert everything(runs.folder) == before


def test_what_another_command_did_meanwhile_is_not_planned_over(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stages.driver_lock

    @contextmanager
    def late(folder: Path) -> Iterator[None]:
        with real(folder):
            StageStatus(folder).forget("train")
            yield

    monkeypatch.setattr(stages, "driver_lock", late)
    with pytest.raises(DataError, match="meanwhile; run this one again"):
        runs("ppo.lr=1e-5")
    assert (runs.folder / "policy").is_dir()
    assert not (runs.folder / "aside").exists()
