"""What a changed key, --force and --resume do to a run: finished work moves, and is never removed.

The stages run over fakes: sampling and PPO are the real ones over fake roles, labels, reward models
and evaluations are files that say what they were made from.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import World, two_segments
from rich.console import Console

import cluster.stages as stages
from cluster.keys import ORDER, Stage
from cluster.plan import print_plan
from fgaif.config import Config, load_config
from fgaif.errors import ActorError
from fgaif.feedback.store import response_store
from fgaif.pending import Then
from fgaif.types import GenerationRequest, Response

SMALL = [
    "data.feedback_prompts=3", "data.ppo_prompts=4", "ppo.steps=4", "ppo.rollout_batch=2",
    "ppo.minibatch=2", "ppo.checkpoint_every=2", "ppo.keep_checkpoints=9",
]  # fmt: skip
EARLIER_STAGES = ("sample", "annotate", "train-reward")


class Roles(World):
    """The fake roles, with what stages ask of a cluster besides; ``updates`` counts PPO steps."""

    live = None

    def __init__(self) -> None:
        super().__init__()
        self.sampled: list[str] = []
        self.restored: list[str] = []
        self.dies_at_update = 0

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
        patch(stages.Run, "_segmenter", lambda _, response: two_segments(response))
        patch(stages.Run, "_malformed", lambda *_: ())
        patch(stages.Run, "annotate", lambda run: self._annotate())
        patch(stages.Run, "train_reward", lambda run: self._write("rewards/object/reward.json"))
        patch(stages.Run, "evaluate", lambda run, phase: self._evaluate(phase))
        real = stages.Run.stage
        patch(stages.Run, "stage", lambda run, name: (self.done.append(name), real(run, name)))

    def config(self, *overrides: str) -> Config:
        return load_config(None, [f"dir={self._root}", *SMALL, *overrides])

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
