"""Checkpoints are whole or not there; damaged ones are passed by."""

import errno
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from fgaif.checkpoint import (
    arrays_digest,
    latest_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    read_state,
    resume_point,
    verify_checkpoint,
    write_checkpoint,
)
from fgaif.errors import CheckpointError


def write(root: Path, step: int, text: str = "weights", keep: int = 2) -> Path:
    def writer(directory: Path) -> None:
        (directory / "learner").mkdir()
        (directory / "learner" / "a.bin").write_text(f"{text} {step}")

    return write_checkpoint(root, f"step-{step:06d}", writer, keep=keep, state={"step": step})


def test_round_trip(tmp_path):
    path = write(tmp_path, 3)
    assert latest_checkpoint(tmp_path) == path
    assert read_state(path) == {"step": 3}
    assert (path / "learner" / "a.bin").read_text() == "weights 3"
    assert set(json.loads((path / "manifest.json").read_text())["sha256"]) == {
        "learner/a.bin",
        "state.json",
    }


def test_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "never made") is None


def test_old_ones_are_pruned_and_the_same_step_is_replaced(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    write(tmp_path, 3, text="again")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step-000002",
        "step-000003",
    ]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert (latest / "learner" / "a.bin").read_text() == "again 3"


def test_one_that_goes_on_from_an_older_one_is_kept_and_is_the_latest(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step, keep=3)
    written = write(tmp_path, 3, keep=2)
    assert latest_checkpoint(tmp_path) == written
    assert sorted(path.name for path in tmp_path.glob("step*")) == ["step-000003", "step-000006"]


def tear_content(path: Path) -> None:
    (path / "learner" / "a.bin").write_text("torn")


def tear_file(path: Path) -> None:
    (path / "learner" / "a.bin").unlink()


def tear_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"sha256": {"lear')


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize("tear", [tear_content, tear_file, tear_manifest, lose_manifest])
def test_a_torn_checkpoint_is_passed_by_with_a_message(tmp_path, caplog, tear):
    good = write(tmp_path, 1)
    torn = write(tmp_path, 2)
    tear(torn)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == good
    assert "step-000002" in caplog.text
    with pytest.raises(CheckpointError, match="step-000002"):
        verify_checkpoint(torn)


@pytest.mark.parametrize("tear", [tear_content, tear_file, tear_manifest, lose_manifest])
def test_checkpoints_that_are_all_damaged_are_named_not_passed_over(tmp_path, tear):
    for step in (1, 2):
        tear(write(tmp_path, step))
    with pytest.raises(CheckpointError, match=r"none .* is whole.*step-000002.*step-000001"):
        latest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"none .* is whole.*step-000002.*step-000001"):
        resume_point("latest", tmp_path)


def test_what_is_to_be_gone_on_from_is_checked_and_what_is_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no step is kept in .*: leave out ppo\.resume"):
        resume_point("latest", tmp_path / "never")
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    assert resume_point("latest", tmp_path) == second
    assert resume_point(str(first), tmp_path) == first
    tear_content(first)
    with pytest.raises(CheckpointError, match=r"is damaged .*; .* holds step-000002, step-000001$"):
        resume_point(str(first), tmp_path)
    with pytest.raises(CheckpointError, match=r"step-000007 is incomplete.* holds step-000002,"):
        resume_point(str(tmp_path / "step-000007"), tmp_path)


def test_a_kill_before_the_pointer_moved_keeps_the_named_one(tmp_path):
    first = write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "latest").write_text("step-000001")
    assert latest_checkpoint(tmp_path) == first


def test_a_writer_that_dies_leaves_nothing_and_the_next_write_cleans_up(tmp_path):
    good = write(tmp_path, 1)
    (tmp_path / ".aside-step-000002" / "learner").mkdir(parents=True)  # kill -9 in the writer

    def fails(directory: Path) -> None:
        (directory / "half.bin").write_text("half")
        raise RuntimeError("learner died")

    with pytest.raises(RuntimeError, match="learner died"):
        write_checkpoint(tmp_path, "step-000002", fails, keep=2, state={})
    assert latest_checkpoint(tmp_path) == good
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]


def test_a_full_disk_is_one_clear_error_and_the_previous_checkpoint_stays(tmp_path):
    good = write(tmp_path, 1)

    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step-000002: No space left.*free some space"):
        write_checkpoint(tmp_path, "step-000002", full, keep=1, state={})
    assert latest_checkpoint(tmp_path) == good
    verify_checkpoint(good)


def test_read_state_of_something_else(tmp_path):
    with pytest.raises(CheckpointError, match=r"state\.json"):
        read_state(tmp_path)


def test_digest_depends_on_name_shape_and_content():
    base = {"a": np.zeros((2, 3), np.float32), "b": np.ones(1, np.float32)}
    same = dict(reversed(base.items()))
    assert arrays_digest(base) == arrays_digest(same)
    others = [
        {**base, "a": np.zeros((3, 2), np.float32)},
        {**base, "b": np.zeros(1, np.float32)},
        {"a": base["a"], "c": base["b"]},
    ]
    assert len({arrays_digest(other) for other in [base, *others]}) == 4


def train(steps: int, parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (parameter - torch.tensor([1.0, -2.0])).square().sum().backward()
        optimizer.step()


def test_optimizer_state_goes_on_bitwise():
    def fresh() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.zeros(2))
        return parameter, torch.optim.AdamW([parameter], lr=0.1)

    straight, optimizer = fresh()
    train(3, straight, optimizer)
    saved = optimizer_tensors(optimizer, [straight])
    train(2, straight, optimizer)
    resumed, optimizer = fresh()
    train(1, resumed, optimizer)  # state to be thrown away
    load_optimizer_tensors(optimizer, [resumed], saved)
    train(2, resumed, optimizer)
    assert torch.equal(straight, resumed)
    other = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(CheckpointError, match="same model"):
        load_optimizer_tensors(torch.optim.AdamW([other]), [other], saved)
