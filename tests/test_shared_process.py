"""Roles of one process are called, saved and brought back each for itself."""

import itertools
from pathlib import Path
from typing import Any

import fake_ray
import numpy as np
import pytest
from reward_samples import images, response

from cluster.groups.actor_group import ActorGroup, RestartLimits, Submit
from cluster.groups.placed_actor import PlacedActor
from cluster.groups.shared_process import RolePart, SharedScorers

LIMITS = RestartLimits(call_s=60, start_s=60, restarts=1)


class Process:
    """Two roles; ``add`` multiplies a role's state by 10 and adds, so that it shows all calls."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._state = {"one": 0, "two": 0}

    def call(self, role: str, method: str, *arguments: Any) -> Any:
        return getattr(self, f"_{method}")(role, *arguments)

    def _add(self, role: str, digit: int) -> int:
        order = self._folder / f"die.{role}"
        if order.exists():
            order.unlink()
            self._die()
        self._state[role] = 10 * self._state[role] + digit
        return self._state[role]

    def _save(self, role: str, path: Path) -> None:
        path.write_text(str(self._state[role]))

    def _restore(self, role: str, path: Path) -> None:
        self._state[role] = int(path.read_text())

    def _score_pairs(self, role: str, pairs: list[Any]) -> list[np.ndarray]:
        (self._folder / f"scored{self._number}").write_text(str(len(pairs)))
        return [np.full((len(parts), 3, 3), len(answer.token_ids)) for answer, parts in pairs]

    def _die(self) -> None:
        raise NotImplementedError  # a thread's, see fake_ray


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray.stand_in(monkeypatch)


def processes(folder: Path, count: int = 1) -> ActorGroup:
    def start() -> list[PlacedActor]:
        return [
            PlacedActor(f"shared-{number}", *fake_ray.start(Process, 0.1, folder, number))
            for number in range(count)
        ]

    return ActorGroup("shared", start, LIMITS)


def every(name: str, *arguments: Any) -> Submit:
    return lambda actors: [getattr(actor, name).remote(*arguments) for actor in actors]


def test_a_death_brings_every_role_back_to_its_own_last_state(tmp_path: Path) -> None:
    """Each is restored from what it saved last, and all calls since are made again."""
    group = processes(tmp_path)
    one, two = (RolePart(group, role) for role in ("one", "two"))
    for role, digit in ((one, 1), (two, 5)):
        role.call(every("add", digit), keep=True).result()
    one.save(every("save", tmp_path / "saved")).result()
    one.set_restore_point(every("restore", tmp_path / "saved"))
    one.call(every("add", 2), keep=True).result()
    (tmp_path / "die.two").touch()
    asked = [role.call(every("add", 7), keep=True) for role in (one, two)]
    assert [call.result() for call in asked] == [[127], [57]]
    assert len(one.recoveries) == 1
    two.restore(every("restore", tmp_path / "saved")).result()
    (tmp_path / "die.one").touch()
    assert one.call(every("add", 3), keep=True).result() == [1273]
    assert two.call(every("add", 4), keep=True).result() == [14]
    group.stop()


def test_a_role_of_the_first_process_alone_is_asked_there(tmp_path: Path) -> None:
    group = processes(tmp_path, 2)
    assert RolePart(group, "one").call(every("add", 1), keep=True).result() == [1, 1]
    only = RolePart(group, "two", first_only=True)
    assert only.call(every("add", 1), keep=True).result() == [1]
    group.stop()


def test_scorers_of_all_processes_share_the_responses(tmp_path: Path, tiny_llava_dir: Path) -> None:
    group = processes(tmp_path, 2)
    words = itertools.cycle(["There is a dog. ", "a red star left of it, "])
    texts = [
        response(tiny_llava_dir, image, [next(words)] * (index % 3), index=index)
        for index, image in enumerate(images(tmp_path, 6))
    ]
    scorers = SharedScorers(RolePart(group, "one"))
    scores = scorers.score([r for r, _ in texts], [parts for _, parts in texts]).result()
    for score, (answer, parts) in zip(scores, texts, strict=True):
        assert score.probs.shape == (len(parts), 3, 3)
        assert (score.probs == len(answer.token_ids)).all()
    assert sum(int((tmp_path / f"scored{n}").read_text()) for n in (0, 1)) == 6
    group.stop()
