"""The command line: help, exit codes, plans, one clear message per mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cluster.pipeline.feedback_report as feedback_report
from cluster.cli.main import main

COMMANDS = [
    "demo", "run", "sample", "annotate", "train-reward", "train", "eval", "report", "export",
    "doctor", "scenes", "submit", "jobs", "status", "scale", "list", "replay", "prompts",
]  # fmt: skip


def fgaif(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fgaif", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_help_names_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fgaif(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert command in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert fgaif(monkeypatch, command, "--help") == 0
    assert "Usage" in capsys.readouterr().out


def test_python_dash_m_works() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fgaif", "version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "0.1.0")


def test_the_version_is_an_option_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fgaif(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


def test_the_shell_completes_commands() -> None:
    environment = {
        **os.environ, "_FGAIF_COMPLETE": "complete_bash", "COMP_WORDS": "fgaif trai",
        "COMP_CWORD": "1",
    }  # fmt: skip
    script = "import sys; sys.argv = ['fgaif']; from cluster.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["train-reward", "train"] or set(done.stdout.split()) == {
        "train", "train-reward"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "ppo.setps=3"], ["ppo.setps", "did you mean ppo.steps?"]),
        (["run", "--config", "nowhere.yaml"], ["nowhere.yaml", "existing file"]),
        (["run", "--dry-run", "policy.model=nowhere"], ["nowhere", "checkpoint"]),
        (["frobnicate"], ["frobnicate"]),
        (["report", "name=never_ran"], ["never_ran"]),
    ],
)
def test_mistakes_exit_with_2_and_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fgaif(monkeypatch, *arguments) == 2
    message = capsys.readouterr().err.replace("\n", " ")
    for word in words:
        assert word in message


def test_an_interrupt_exits_with_130_and_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.pipeline.stages.run_stages", interrupted)
    assert fgaif(monkeypatch, "sample", f"dir={tmp_path}") == 130
    message = capsys.readouterr().err.replace("\n", " ")
    assert "interrupted: what was finished is kept" in message


def test_a_stage_without_its_input_names_the_command_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert fgaif(monkeypatch, "annotate", f"dir={tmp_path}") == 2
    assert "fgaif sample" in capsys.readouterr().err.replace("\n", " ")


def test_dry_run_prints_configuration_placement_and_stages_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert fgaif(monkeypatch, "demo", "--dry-run", "--full", f"dir={tmp_path}", "seed=5") == 0
    text = capsys.readouterr().out
    for word in ("seed: 5", "rollout-0", "reward-relation-0", "memory", "eval-after", "missing"):
        assert word in text
    assert not list(tmp_path.iterdir())


def test_a_dry_run_fits_on_a_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert fgaif(monkeypatch, "run", "--dry-run", f"dir={tmp_path}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 20
    for word in ("eval-after", "2,000 others for PPO", "15,600 questions", "memory, PPO", "fits"):
        assert word in "\n".join(lines)
    assert not list(tmp_path.iterdir())
    assert fgaif(monkeypatch, "run", "--full", f"dir={tmp_path}") == 2
    assert "--full goes with --dry-run" in capsys.readouterr().err


def test_scenes_are_drawn_to_look_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert fgaif(monkeypatch, "scenes", str(tmp_path / "look"), "--count", "3") == 0
    assert len(list((tmp_path / "look" / "images").glob("*.png"))) == 3
    assert (tmp_path / "look" / "scenes.jsonl").is_file()
    theirs = tmp_path / "prompts.jsonl"
    theirs.write_text("theirs")
    assert fgaif(monkeypatch, "scenes", str(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir() if path.name != "look"] == [theirs.name]
    assert theirs.read_text() == "theirs"


def test_something_is_said_before_torch_and_ray_are_loaded(tmp_path: Path) -> None:
    """Their import takes seconds: here it fails, after the first line."""
    script = (
        "import sys\n"
        "sys.modules |= {'torch': None, 'ray': None}\n"
        "import cluster.cli.main as main\n"
        f"sys.argv = ['fgaif', 'train', 'dir={tmp_path}']\n"
        "main.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith(f"{tmp_path}/scenes: train; loading")
    assert "ModuleNotFoundError" in done.stderr


def test_an_export_looks_for_the_adapter_before_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = [str(tmp_path / "out"), f"dir={tmp_path}", "policy.model=nowhere"]
    assert fgaif(monkeypatch, "export", *where) == 2
    said = capsys.readouterr().err
    assert "no adapter there" in said
    assert "run `fgaif train`" in said
    assert list(tmp_path.iterdir()) == []


def test_the_audits_next_command_is_that_of_the_same_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        feedback_report, "prepare_audit", lambda config, size, then, out: said.append(then)
    )
    file = tmp_path / "my own.yaml"
    file.write_text(f"dir: {tmp_path}\n")
    assert fgaif(monkeypatch, "annotate", "-c", str(file), "name=a", "--audit") == 0
    assert said == [f"fgaif annotate --config '{file}' name=a --audit --answers FILE"]


def test_questions_alone_ask_for_answers_or_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question_id": 1, "image": "a.jpg", "text": "?", "label": "yes"}\n')
    assert fgaif(monkeypatch, "eval", "pope", "--questions", str(questions)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "give --answers FILE, or --model CHECKPOINT" in said
